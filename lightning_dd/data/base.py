"""The base DataModule: a real image set, split and preprocessed once, on the device or streamed to it."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dd.data.cache import cached_tensors, content_key, remember
from lightning_dd.data.images import Batch, DataFacts, RawSplit, Split
from lightning_dd.data.preprocess import KINDS, RIDGE, Preprocessing, block_stride, fit_preprocessing
from lightning_dd.data.sampling import EvalBatches, StepCounter, pass_through, scarcest, stratified_cut
from lightning_dd.utils.arguments import RemembersArguments
from lightning_dd.utils.errors import SEED, UserError, check_range
from lightning_dd.utils.machine import memory_of

_BLOCK = 4096  # images hashed at a time


class RealData(RemembersArguments, LightningDataModule, ABC):
    """A real image-classification set, decoded once and kept as one tensor per split, or streamed.

    A subclass says how to read a split (:meth:`read`), and may give published channel statistics. A stratified
    validation split is cut from train; the test split is read only by the ``test`` and ``predict`` stages.
    After ``setup``, :attr:`train`, :attr:`val` and :attr:`test` are :class:`~lightning_dd.data.images.Split` objects,
    whose images are normalised as they are drawn: ``data.train.take(rows).images``. The train loader only counts
    steps, because a distiller draws its real batches itself, with its own generator.

    Whoever draws rows need not know where the pixels lie, and on the CPU standardised images are the same bit for bit
    wherever they are kept. On a GPU, the order of the draws differs, since rows are then drawn on the CPU.

    Args:
        root: folder of the data set; ``None`` where nothing is on disk or the default cache is meant.
        preprocessing: ``standardise``, ``zca`` (FRePo's) or ``kornia-zca`` (MTT's, on raw pixels):
            see :func:`~lightning_dd.data.preprocess.fit_preprocessing`.
        val_fraction: share of train cut off for validation, in [0, 1); 0 means no validation split.
        eval_batch_size: images per validation or test batch.
        split_seed: seed of the train/validation split, kept apart from the run's seed so that seeds compare.
        keep_on_device: keep the pixels on the accelerator. Otherwise they stay in main memory, and each batch is copied
            to the device.
        on_disk: leave the decoded images in a memory-mapped file of the cache, for sets larger than main memory;
            batches then come from there. Only for sets that are cached after decoding.
        workers: threads that read streamed images, one uniform batch ahead; 0 reads when asked.
        zca_block: side of the blocks that ZCA whitens, in pixels; ``None`` whitens images of up to 64 pixels whole
            and larger ones in a checkerboard of blocks of at most 64 (FRePo's way).
        mean: channel means of pixels in [0, 1]; ``None`` takes those the data set gives, else measures them. Papers
            differ here: DC, DSA, DM and MTT divide CIFAR-10 by (.2023, .1994, .2010), FRePo by (.2470, .2435, .2616).
        std: channel standard deviations, likewise.
        zca_ridge: regulariser of ZCA: relative to the mean variance for ``zca``, absolute for ``kornia-zca``; ``None``
            takes the 0.1 of both papers.
        mirror: whether an image keeps its meaning when it is mirrored left to right, so that augmentation may do so;
            ``None`` takes what the data set says of itself (digits do not, anything unknown does).

    Raises:
        UserError: an argument is out of range, or (in ``setup``) the data is not usable.
    """

    channel_mean: Sequence[float] | None = None
    channel_std: Sequence[float] | None = None
    can_stay_on_disk: ClassVar[bool] = False
    """Whether this class can leave its images in a file."""
    can_be_mirrored: ClassVar[bool] = True
    """Whether its images keep their meaning when they are mirrored left to right."""

    tests_every_class: ClassVar[bool] = True
    """Whether a test split that lacks a class is refused: its accuracy would be one of other classes."""

    def __init__(
        self,
        root: str | None = None,
        preprocessing: str = "standardise",
        val_fraction: float = 0.1,
        eval_batch_size: int = 500,
        split_seed: int = 0,
        keep_on_device: bool = True,
        on_disk: bool = False,
        workers: int = 4,
        zca_block: int | None = None,
        mirror: bool | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        zca_ridge: float | None = None,
    ) -> None:
        super().__init__()
        self.name: str = type(self).__name__  # by which a distilled set remembers where it came from
        if preprocessing not in KINDS:
            raise UserError(f"data.preprocessing must be one of {', '.join(KINDS)}, got '{preprocessing}'")
        check_range("in [0, 1)", "data.", val_fraction=val_fraction)
        check_range("at least 1", "data.", eval_batch_size=eval_batch_size, zca_block=zca_block)
        check_range("at least 0", "data.", workers=workers)
        check_range(SEED, "data.", split_seed=split_seed)
        check_range("positive", "data.", zca_ridge=zca_ridge)
        for number in mean or []:
            check_range("in [0, 1]", "data.", mean=number)
        for number in std or []:
            check_range("positive", "data.", std=number)
        if preprocessing == "kornia-zca" and (mean is not None or std is not None):
            raise UserError("data.mean and data.std: preprocessing kornia-zca whitens raw pixels; leave them out")
        if preprocessing == "standardise" and zca_ridge is not None:
            raise UserError("data.zca_ridge: preprocessing standardise does not whiten; set data.preprocessing=zca")
        if on_disk and not self.can_stay_on_disk:
            raise UserError(
                f"data.on_disk: {self.name} is read whole into memory; set data.keep_on_device=false instead"
            )
        self.root = root
        self.preprocessing_kind = preprocessing
        self.val_fraction = val_fraction
        self.eval_batch_size = eval_batch_size
        self.split_seed = split_seed
        self.keep_on_device = keep_on_device
        self.on_disk = on_disk
        self.workers = workers
        self.zca_block = zca_block
        self.mean, self.std, self.zca_ridge = mean, std, zca_ridge
        self.mirror = self.can_be_mirrored if mirror is None else mirror
        self.preprocessing: Preprocessing | None = None
        self.train: Split | None = None
        self.val: Split | None = None
        self.test: Split | None = None
        self._moved: Preprocessing | None = None
        self._facts: DataFacts | None = None

    @abstractmethod
    def read(self, *, train: bool) -> RawSplit:
        """Read and decode the train or the test split.

        Raises:
            UserError: the files are missing or not what this class reads.
        """

    def train_key(self) -> str | None:
        """Return a key of the training split where reading its pixels for one would take long, else ``None``."""
        return None

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data from the class name (never a path)."""
        spec: dict[str, Any] = {
            "preprocessing": self.preprocessing_kind,
            "val_fraction": self.val_fraction,
            "split_seed": self.split_seed,
            **self._chosen(),
        }
        if self.zca_block is not None:
            spec["zca_block"] = self.zca_block
        return spec if self.mirror == self.can_be_mirrored else spec | {"mirror": self.mirror}

    def _chosen(self) -> dict[str, Any]:
        """What was chosen of the preprocessing, beside its kind."""
        chosen = {"mean": self.mean, "std": self.std, "zca_ridge": self.zca_ridge}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Channel means and standard deviations: those asked for, else those the data set gives."""
        mean = self.channel_mean if self.mean is None else self.mean
        return mean, self.channel_std if self.std is None else self.std

    def notes(self) -> list[str]:
        """Return what else a user should know of how the data was found, each in a few words; after ``setup``."""
        return []

    def summary(self) -> str:
        """Say in one line what data was found; after ``setup``."""
        counts = {"training": self.train, "validation": self.val}
        images = " and ".join(f"{len(split):,} {name}" for name, split in counts.items() if split)
        return "; ".join([f"{self.name}: {images} images of {self.facts}", *self.notes()])

    def origin(self) -> dict[str, Any]:
        """Return what a distilled set keeps of its data: name, arguments without paths, fingerprint, mirror."""
        facts = self.facts
        return {"name": self.name, "spec": self.spec(), "fingerprint": facts.fingerprint, "mirror": facts.mirror}

    @property
    def facts(self) -> DataFacts:
        """Classes, image shape and fingerprint; available after ``setup``."""
        if self._facts is None:
            raise RuntimeError("the data has not been set up yet: call setup() first")
        return self._facts

    def use_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Apply this map instead of fitting one: how a distilled set brings its own. Call before ``setup``."""
        self.preprocessing, self._moved = preprocessing, None
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
            self.test = self._split_of(raw, torch.arange(len(raw.labels)))

    def _setup_train(self) -> None:
        raw = self.read(train=True)
        self._check(raw, "train")
        self._check_room(raw)
        kept, held_out = self._split(raw.labels, raw.class_names)
        fingerprint = self._fingerprint(raw, kept)
        if self.preprocessing is None:
            self.preprocessing = self._fitted(raw.images, kept, fingerprint)
        self.train = self._split_of(raw, kept)
        if len(held_out):
            self.val = self._split_of(raw, held_out)
        channels, height, width = raw.images.shape[1:]
        form = str(self.preprocessing).replace("zca", self.preprocessing_kind)
        self._facts = DataFacts(
            name=self.name,
            class_names=raw.class_names,
            image_shape=(channels, height, width),
            preprocessing=", ".join([form, *(f"{name} {value}" for name, value in self._chosen().items())]),
            fingerprint=fingerprint,
            mirror=self.mirror,
        )
        remember(fingerprint, self.recipe())

    def _split(self, labels: Tensor, names: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
        """Return sorted train and validation indices, stratified by class."""
        if self.val_fraction == 0:
            return torch.arange(len(labels)), torch.arange(0)
        try:
            return stratified_cut(labels, self.val_fraction, self.split_seed)
        except ValueError:
            raise UserError(
                f"data.val_fraction={self.val_fraction} cannot be cut from {self.name}: both parts need every class, "
                f"and {scarcest(labels, len(names), names)} of {len(labels)}; set another one, or 0 for no validation"
            ) from None

    def _fitted(self, pixels: Tensor, rows: Tensor, fingerprint: str) -> Preprocessing:
        """Fit the preprocessing, or take it from the cache where fitting takes long."""
        kind, ridge, (mean, std) = self.preprocessing_kind, self.zca_ridge, self.statistics
        stride = 1 if kind == "standardise" else block_stride(pixels.shape[2], pixels.shape[3], self.zca_block)
        device = self._device() if self._device().type == "cuda" else torch.device("cpu")

        def fit() -> Preprocessing:
            return fit_preprocessing(kind, pixels, mean, std, ridge, self.zca_block, device, rows)

        if kind == "standardise" and self.train_key() is None:
            return fit()
        statistics = mean and tuple(mean), std and tuple(std)
        key = content_key("preprocessing", fingerprint, kind, *statistics, ridge or RIDGE, stride)
        channels, numbers = pixels.shape[1], pixels.shape[1:].numel()
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "std"), (channels,))
        if kind != "standardise":
            side = numbers // stride**2
            shapes |= {"zca_mean": (numbers,), "zca_whiten": (side, side), "zca_unwhiten": (side, side)}
        kept = cached_tensors("preprocessing", key, lambda: fit().state_dict(), shapes)
        return Preprocessing.from_state_dict(kept)

    def _fingerprint(self, raw: RawSplit, rows: Tensor) -> str:
        """Hash the training pixels and labels, or recall what they were hashed to."""
        key = self.train_key()
        if key is None:
            return _hashed(raw, rows).hex()
        key = content_key("fingerprint", key, hashlib.blake2b(rows.numpy().data).hexdigest())

        def made() -> dict[str, Tensor]:
            return {"digest": torch.tensor([*_hashed(raw, rows)]).byte()}

        kept = cached_tensors("fingerprints", key, made, {"digest": (16,)})
        return bytes(kept["digest"].tolist()).hex()

    def _split_of(self, raw: RawSplit, rows: Tensor) -> Split:
        """Return rows ready to be drawn: their pixels on the device, or where they were decoded."""
        assert self.preprocessing is not None
        device, pixels, labels = self._device(), raw.images, raw.labels[rows]
        if self._moved is None:
            self._moved = self.preprocessing.to(device)  # one copy for all splits: matrices may take a gigabyte
        names, whitened = raw.class_names, self.preprocessing.kind == "zca"
        if self.on_disk or not self.keep_on_device:
            return Split(pixels, labels, self._moved, device, self.workers, False, rows, names)
        if device.type != "cpu":
            pixels, labels, rows = pixels[rows].to(device), labels.to(device), torch.arange(len(rows), device=device)
        return Split(pixels, labels, self._moved, device, 0, whitened, rows, names)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _check(self, raw: RawSplit, split: str) -> None:
        """Refuse data that no later stage could make sense of, naming the set and the split."""
        where = f"{self.name} ({split} split)"
        if raw.images.ndim != 4 or len(raw.images) != len(raw.labels) or len(raw.images) == 0:
            raise UserError(
                f"{where}: expected images (N, C, H, W) with N labels and N > 0, "
                f"got {tuple(raw.images.shape)} and {len(raw.labels)} labels"
            )
        if raw.images.is_floating_point() and not bool(((raw.images >= 0) & (raw.images <= 1)).all()):
            raise UserError(f"{where}: pixels must be uint8 or floats in [0, 1], never NaN or infinite")
        low, high = int(raw.labels.min()), int(raw.labels.max())
        if low < 0 or high >= len(raw.class_names):
            raise UserError(f"{where}: labels must be in [0, {len(raw.class_names)}), found {low}..{high}")
        counts = torch.bincount(raw.labels, minlength=len(raw.class_names))
        if bool((counts == 0).any()) and (split == "train" or self.tests_every_class):
            missing = raw.class_names[int((counts == 0).nonzero()[0])]
            raise UserError(f"{where}: class '{missing}' has no images; every class needs at least one")

    def _check_room(self, raw: RawSplit) -> None:
        """Refuse to keep on the device what is larger than its whole memory."""
        device = self._device()
        needed = raw.images.numel() * (raw.images.element_size() if self.preprocessing_kind == "standardise" else 4)
        room = None if self.on_disk or not self.keep_on_device else memory_of(device)
        if room is not None and needed > room:
            raise UserError(
                f"{self.name} takes {needed / 2**30:.1f} GiB and the {device.type} has {room / 2**30:.1f}: "
                f"set data.keep_on_device=false{' or data.on_disk=true' if self.can_stay_on_disk else ''}"
            )

    def train_dataloader(self) -> DataLoader[int]:
        """Count steps: one epoch is the whole run when ``max_steps`` is set, else 1,000 steps."""
        steps = 1000
        if self.trainer is not None and self.trainer.max_steps > 0:
            steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return pass_through(StepCounter(steps))

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Batches of the validation split, or nothing when it was not cut."""
        return self._eval_loader(self.val) if self.val is not None else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test split, every sample on exactly one rank."""
        assert self.test is not None
        return self._eval_loader(self.test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test split again."""
        return self.test_dataloader()

    def _eval_loader(self, split: Split) -> DataLoader[Batch]:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return pass_through(EvalBatches(split, self.eval_batch_size, rank, world))


def _hashed(raw: RawSplit, rows: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in torch.split(rows, _BLOCK):
        digest.update(raw.images.index_select(0, part).numpy().data)
    digest.update(raw.labels[rows].numpy().data)
    return digest.digest()
