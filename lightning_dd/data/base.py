"""The base DataModule: a real image set as tensors on the device, split and preprocessed once."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from pytorch_lightning import LightningDataModule
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dd.data.preprocess import KINDS, Preprocessing, fit_preprocessing, to_unit
from lightning_dd.data.stream import EvalBatches, StepCounter, pass_through
from lightning_dd.errors import UserError


class RawSplit(NamedTuple):
    """One decoded split: pixels as the reader found them."""

    images: Tensor
    """``(N, C, H, W)``, uint8 or float in [0, 1]."""
    labels: Tensor
    """``(N,)`` int64 in ``[0, num_classes)``."""
    class_names: tuple[str, ...]
    """Name of each label, in label order."""


class ImageTensors(NamedTuple):
    """One split ready for a network."""

    images: Tensor
    """``(N, C, H, W)`` float32, normalised."""
    labels: Tensor
    """``(N,)`` int64."""


@dataclass(frozen=True)
class DataFacts:
    """What a model needs to know of the data; said once, by the data."""

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    preprocessing: str
    fingerprint: str
    """Hash of the training pixels and labels (before preprocessing, so the same on every machine)."""

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
        return cls(
            name=values["name"],
            class_names=tuple(values["class_names"]),
            image_shape=(channels, height, width),
            preprocessing=values["preprocessing"],
            fingerprint=values["fingerprint"],
        )


class RealData(LightningDataModule, ABC):
    """A real image-classification set, decoded once and kept as one tensor per split on the device.

    A subclass says how to read a split (:meth:`read`), and may give published channel statistics. A stratified
    validation split is cut from train; the test split is read only by the ``test`` and ``predict`` stages.
    After ``setup``, :attr:`train`, :attr:`val` and :attr:`test` hold normalised images; the train loader only
    counts steps, because a distiller draws its real batches itself, with its own generator.

    Args:
        root: folder of the data set; ``None`` where nothing is on disk or the default cache is meant.
        preprocessing: ``standardise`` or ``zca``.
        val_fraction: share of train cut off for validation, in [0, 1); 0 means no validation split.
        eval_batch_size: images per validation or test batch.
        split_seed: seed of the train/validation split, kept apart from the run's seed so that seeds compare.
        keep_on_device: move the tensors to the accelerator once; off for sets that do not fit.

    Raises:
        UserError: an argument is out of range, or (in ``setup``) the data is not usable.
    """

    channel_mean: ClassVar[Sequence[float] | None] = None
    channel_std: ClassVar[Sequence[float] | None] = None

    def __init__(
        self,
        root: str | None = None,
        preprocessing: str = "standardise",
        val_fraction: float = 0.1,
        eval_batch_size: int = 500,
        split_seed: int = 0,
        keep_on_device: bool = True,
    ) -> None:
        super().__init__()
        if preprocessing not in KINDS:
            raise UserError(f"data.preprocessing must be one of {', '.join(KINDS)}, got '{preprocessing}'")
        if not 0 <= val_fraction < 1:
            raise UserError(f"data.val_fraction must be in [0, 1), got {val_fraction}")
        if eval_batch_size < 1:
            raise UserError(f"data.eval_batch_size must be at least 1, got {eval_batch_size}")
        self.name: str = type(self).__name__  # by which a distilled set remembers where it came from
        self.root = root
        self.preprocessing_kind = preprocessing
        self.val_fraction = val_fraction
        self.eval_batch_size = eval_batch_size
        self.split_seed = split_seed
        self.keep_on_device = keep_on_device
        self.preprocessing: Preprocessing | None = None
        self.train: ImageTensors | None = None
        self.val: ImageTensors | None = None
        self.test: ImageTensors | None = None
        self._facts: DataFacts | None = None

    @abstractmethod
    def read(self, *, train: bool) -> RawSplit:
        """Read and decode the train or the test split.

        Raises:
            UserError: the files are missing or not what this class reads.
        """

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data from the class name (never a path)."""
        return {
            "preprocessing": self.preprocessing_kind,
            "val_fraction": self.val_fraction,
            "split_seed": self.split_seed,
        }

    @property
    def facts(self) -> DataFacts:
        """Classes, image shape and fingerprint; available after ``setup``."""
        if self._facts is None:
            raise RuntimeError("the data has not been set up yet: call setup() first")
        return self._facts

    def use_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Apply this map instead of fitting one: how a distilled set brings its own. Call before ``setup``."""
        self.preprocessing = preprocessing
        self.preprocessing_kind = preprocessing.kind

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and preprocess what ``stage`` needs; later calls add only what is missing."""
        if self.train is None:
            self._setup_train()
        if stage in (None, "test", "predict") and self.test is None:
            raw = self.read(train=False)
            self._check(raw, "test")
            if tuple(raw.images.shape[1:]) != self.facts.image_shape or raw.class_names != self.facts.class_names:
                raise UserError(f"{self.name}: the test split has other image shapes or classes than the train split")
            self.test = self._normalise(raw.images, raw.labels)

    def _setup_train(self) -> None:
        raw = self.read(train=True)
        self._check(raw, "train")
        kept, held_out = self._split(raw.labels)
        kept_pixels = raw.images[kept]
        if self.preprocessing is None:
            self.preprocessing = fit_preprocessing(
                self.preprocessing_kind, kept_pixels, self.channel_mean, self.channel_std
            )
        self.train = self._normalise(kept_pixels, raw.labels[kept])
        if len(held_out):
            self.val = self._normalise(raw.images[held_out], raw.labels[held_out])
        channels, height, width = raw.images.shape[1:]
        self._facts = DataFacts(
            name=self.name,
            class_names=raw.class_names,
            image_shape=(channels, height, width),
            preprocessing=self.preprocessing.kind,
            fingerprint=_fingerprint(kept_pixels, raw.labels[kept]),
        )

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return sorted train and validation indices, stratified by class."""
        everything = torch.arange(len(labels))
        if self.val_fraction == 0:
            return everything, everything[:0]
        try:
            kept, held_out = train_test_split(
                everything.numpy(),
                test_size=self.val_fraction,
                stratify=labels.numpy(),
                random_state=self.split_seed,
            )
        except ValueError as error:
            raise UserError(f"data.val_fraction={self.val_fraction} cannot be cut from {self.name}: {error}") from None
        return torch.from_numpy(kept).sort().values, torch.from_numpy(held_out).sort().values

    def _normalise(self, pixels: Tensor, labels: Tensor) -> ImageTensors:
        assert self.preprocessing is not None
        device = self._device()
        blocks = [self.preprocessing(to_unit(block.to(device))) for block in torch.split(pixels, 4096)]
        return ImageTensors(torch.cat(blocks), labels.to(device))

    def _device(self) -> torch.device:
        if self.trainer is None or not self.keep_on_device:
            return torch.device("cpu")
        return self.trainer.strategy.root_device

    def _check(self, raw: RawSplit, split: str) -> None:
        """Refuse data that no later stage could make sense of, naming the set and the split."""
        where = f"{self.name} ({split} split)"
        if raw.images.ndim != 4 or len(raw.images) != len(raw.labels) or len(raw.images) == 0:
            raise UserError(
                f"{where}: expected images (N, C, H, W) with N labels and N > 0, "
                f"got {tuple(raw.images.shape)} and {len(raw.labels)} labels"
            )
        if raw.images.is_floating_point():
            if not bool(torch.isfinite(raw.images).all()):
                raise UserError(f"{where}: the images hold NaN or infinite values")
            if float(raw.images.min()) < 0 or float(raw.images.max()) > 1:
                raise UserError(f"{where}: pixels must be uint8 or floats in [0, 1]")
        low, high = int(raw.labels.min()), int(raw.labels.max())
        if low < 0 or high >= len(raw.class_names):
            raise UserError(f"{where}: labels must be in [0, {len(raw.class_names)}), found {low}..{high}")
        counts = torch.bincount(raw.labels, minlength=len(raw.class_names))
        if split == "train" and bool((counts == 0).any()):
            missing = raw.class_names[int((counts == 0).nonzero()[0])]
            raise UserError(f"{where}: class '{missing}' has no images; every class needs at least one")

    def train_dataloader(self) -> DataLoader[int]:
        """Count steps: one epoch is the whole run when ``max_steps`` is set, else 1,000 steps."""
        steps = 1000
        if self.trainer is not None and self.trainer.max_steps > 0:
            steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return pass_through(StepCounter(steps))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        """Batches of the validation split, or nothing when it was not cut."""
        return self._eval_loader(self.val) if self.val is not None else []

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of the test split, every sample on exactly one rank."""
        assert self.test is not None
        return self._eval_loader(self.test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The test split again."""
        return self.test_dataloader()

    def _eval_loader(self, split: ImageTensors) -> DataLoader[tuple[Tensor, Tensor]]:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return pass_through(EvalBatches(split.images, split.labels, self.eval_batch_size, rank, world))


def _fingerprint(pixels: Tensor, labels: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(pixels.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()
