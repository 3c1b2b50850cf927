"""The distilled-set file: one safe file with everything needed to use a distilled set.

Layout: safetensors with the tensors ``images``, ``labels``, ``classes``, ``preprocessing.*`` and, for soft labels with
views, ``views.*``, and one metadata entry ``lightning_dd`` holding a JSON header. No pickle anywhere; header fields are
plain JSON. Sets with soft labels are format version 2; all others are still written as version 1.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_dd.data import DATA_SETS
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.distilled.views import SoftViews
from lightning_dd.losses.krr import LABEL_KINDS
from lightning_dd.models.factory import Architectures
from lightning_dd.utils.errors import UserError, check_range, unknown_name
from lightning_dd.utils.files import write_atomically

FORMAT_VERSION = 2
LABEL_FORMS = (*LABEL_KINDS, "soft")
"""Forms of the labels in a file: ``soft`` ones are a teacher's logits."""
_HEADER = "lightning_dd"
_PREFIX, _VIEWS = "preprocessing.", "views."
_PLAIN = ("data", "method", "config", "training")  # fields that the header holds as they are


@dataclass
class DistilledSet:
    """A distilled set and what it takes to use it.

    Args:
        images: ``(n, C, H, W)`` float32 in normalised space (not clipped).
        labels: ``(n, num_classes)`` float32 in the form named by ``label_kind``.
        classes: ``(n,)`` int64, the class each row stands for.
        label_kind: ``learned`` or ``centred`` (regression targets around 0), ``hard`` (one-hot) or ``soft`` (a
            teacher's logits of the images).
        class_names: one per class, in label order.
        preprocessing: the map test images must go through.
        data: where it came from, as :meth:`~lightning_dd.data.RealData.origin` says it.
        method: name of the distiller, or ``random-real``.
        config: the distiller's whole configuration, plain values.
        training: outer step, validation score, seed and library versions at the time of writing.
        temperature: students fit ``softmax(logits / temperature)``; for soft labels only.
        views: crops and mixtures of the images with the teacher's logits of each; for soft labels only. They take the
            place of an augmentation; ``labels`` are for students that do without them.

    Raises:
        UserError: shapes disagree, a number is not finite or out of range, or the form of the labels is unknown.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor
    label_kind: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    data: dict[str, Any] = field(default_factory=dict)
    method: str = "unknown"
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    views: SoftViews | None = None

    def __post_init__(self) -> None:
        rows, count = len(self.images), len(self.class_names)
        if self.images.ndim != 4 or rows == 0 or self.labels.shape != (rows, count) or self.classes.shape != (rows,):
            raise UserError(
                f"distilled set: shapes disagree: images {tuple(self.images.shape)}, "
                f"labels {tuple(self.labels.shape)}, classes {tuple(self.classes.shape)}, {count} class names"
            )
        if not bool(torch.isfinite(self.images).all() and torch.isfinite(self.labels).all()):
            raise UserError("distilled set: images or labels hold NaN or infinite values")
        if self.label_kind not in LABEL_FORMS:
            raise unknown_name("label_kind of a distilled set", str(self.label_kind), LABEL_FORMS)
        check_range("positive", "distilled set: ", temperature=self.temperature)
        if self.views is not None:
            self._check_views(self.views)

    def _check_views(self, views: SoftViews) -> None:
        if self.label_kind != "soft":
            raise UserError(f"distilled set: views need soft labels, these are {self.label_kind}")
        if len(views) != len(self) or views.logits.shape[2] != self.num_classes:
            raise UserError(
                f"distilled set: views of {len(views)} images and {views.logits.shape[2]} classes "
                f"for {len(self)} images and {self.num_classes} classes"
            )
        right, bottom = views.pastes[..., 2].max(), views.pastes[..., 3].max()
        if bool((views.pastes < 0).any() or bottom > self.images.shape[2] or right > self.images.shape[3]):
            raise UserError("distilled set: a pasted box lies outside the images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self) // self.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def architecture(self) -> Architectures | None:
        """The architecture, or architectures, it was distilled with, if any."""
        return self.config.get("architecture")

    @property
    def mirror(self) -> bool:
        """Whether its images keep their meaning when they are mirrored left to right."""
        known = DATA_SETS.get(str(self.data.get("name")))  # older files do not say it themselves
        return bool(self.data.get("mirror", known.can_be_mirrored if known else True))

    @property
    def dataset(self) -> TensorDataset:
        """The rows as a dataset of ``(image (C, H, W) normalised, label (num_classes,))`` pairs."""
        return TensorDataset(self.images, self.labels)

    @property
    def test_transform(self) -> Preprocessing:
        """The map from pixels in [0, 1] ``(N, C, H, W)`` to the space the images live in."""
        return self.preprocessing

    def pixels(self) -> Tensor:
        """Return the images as pixels ``(n, C, H, W)``, clipped to [0, 1] for looking at."""
        return self.preprocessing.inverse(self.images).clamp(0, 1)

    def save(self, path: Path | str) -> Path:
        """Write the file atomically and return its path.

        Raises:
            UserError: the folder cannot be written.
        """
        soft = self.label_kind == "soft"
        header = {
            "format_version": FORMAT_VERSION if soft else 1,
            "label_kind": self.label_kind,
            "class_names": list(self.class_names),
            "ipc": self.ipc,
            "label_scale": float(self.labels.norm(dim=1).mean()),
            **{name: getattr(self, name) for name in _PLAIN},
            **({"temperature": self.temperature} if soft else {}),
        }
        tensors = {"images": self.images, "labels": self.labels, "classes": self.classes}
        tensors |= {_PREFIX + name: value for name, value in self.preprocessing.state_dict().items()}
        tensors |= {_VIEWS + name: value for name, value in (self.views.state_dict() if self.views else {}).items()}
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        metadata = {_HEADER: json.dumps(header)}
        return write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))

    @classmethod
    def load(cls, path: Path | str) -> "DistilledSet":
        """Read a file written by :meth:`save`.

        Raises:
            UserError: the file is missing, truncated, of another kind, of a newer format, or inconsistent.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"distilled set '{path}': no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, struct.error) as error:
            raise UserError(f"distilled set '{path}': not a safetensors file, or truncated ({error})") from None
        header = _read_header(path, metadata)
        preprocessing, views = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (_PREFIX, _VIEWS)
        )
        try:
            return cls(
                images=tensors["images"],
                labels=tensors["labels"],
                classes=tensors["classes"],
                label_kind=header["label_kind"],
                class_names=tuple(header["class_names"]),
                preprocessing=Preprocessing.from_state_dict(preprocessing),
                **{name: header[name] for name in _PLAIN},
                temperature=float(header.get("temperature", 1.0)),
                views=SoftViews.from_state_dict(views) if views else None,
            )
        except UserError as error:
            raise UserError(f"'{path}': {error}") from None
        except (KeyError, TypeError) as error:
            raise UserError(f"distilled set '{path}': incomplete, missing or wrong {error}") from None


def library_versions(
    names: Sequence[str] = ("lightning_dd", "torch", "torchvision", "pytorch-lightning", "timm"),
) -> dict[str, str]:
    """Return the installed versions of the libraries a result depends on."""
    return {name: version(name) for name in names}


def _read_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        raise UserError(f"distilled set '{path}': a safetensors file, but not one written by lightning_dd")
    try:
        header = json.loads(metadata[_HEADER])
        version = int(header["format_version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"distilled set '{path}': the header is damaged") from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"distilled set '{path}': format version {version}, this lightning_dd reads up to {FORMAT_VERSION}; "
            "upgrade lightning_dd"
        )
    return dict(header)
