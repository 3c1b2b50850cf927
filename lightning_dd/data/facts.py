"""What a model needs to know of the data; said once, by the data."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataFacts:
    """Facts of a data set as it is used: plain values, which go into checkpoints and into the distilled-set file."""

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """``(channels, height, width)``."""
    preprocessing: str
    """In words: ``standardise``, ``zca``, ``zca in 2x2 blocks``."""
    fingerprint: str
    """Hash of the training pixels and labels (before preprocessing, so the same on every machine)."""
    mirror: bool = True
    """Whether an image keeps its meaning when it is mirrored left to right; digits do not."""

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for a checkpoint or a JSON header."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataFacts":
        """Rebuild from :meth:`to_dict`."""
        channels, height, width = values["image_shape"]
        return cls(**(values | {"class_names": tuple(values["class_names"]), "image_shape": (channels, height, width)}))
