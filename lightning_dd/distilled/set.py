"""The distilled-set file: one safe file with everything needed to use a distilled set.

Layout: safetensors with the tensors ``images``, ``labels``, ``classes``, ``preprocessing.*`` and, for soft labels with
views, ``views.*``, and two metadata entries: ``lightning_dd``, a JSON header, and ``checksum`` of header and tensors,
which older files lack. Where one stored image stands for several, ``stored`` takes the place of ``images``, and the
header's ``decoding`` says how they are made. No pickle anywhere; header fields are plain JSON. Sets with stored images
and whitened sets, whose matrices are packed, are format version 3, others with soft labels version 2; all others are
still written as version 1.
"""

import json
import struct
from collections.abc import Mapping, Sequence
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
from lightning_dd.distilled.header import CHECKSUM, HEADER, PLAIN, checksum, read_header
from lightning_dd.distilled.hub import fetch_set, is_address
from lightning_dd.distilled.multiformation import MultiFormed
from lightning_dd.distilled.packing import packed, unpacked
from lightning_dd.distilled.views import SoftViews
from lightning_dd.losses.krr import LABEL_KINDS
from lightning_dd.losses.labels import loss_name, student_loss
from lightning_dd.models.factory import Architectures
from lightning_dd.utils.errors import UserError, check_range, unknown_name
from lightning_dd.utils.files import write_atomically

LABEL_FORMS = (*LABEL_KINDS, "soft")
"""Forms of the labels in a file: ``soft`` ones are a teacher's logits."""
FARTHEST_PIXEL = 100.0  # learned pixels leave [0, 1], by less than 1 in good runs; no image of any use goes further
_PREFIX, _VIEWS = "preprocessing.", "views."
_IMAGES, _STORED, _DECODING = "images", "stored", "decoding"
_DTYPES = {_IMAGES: torch.float32, _STORED: torch.float32, "labels": torch.float32, "classes": torch.int64}


@dataclass(repr=False)
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
        training: outer step, validation score, seed, library versions and commit at the time of writing.
        run: the whole run as ``lightning-dd fit`` takes it: seed, trainer with its callbacks, model and data, without
            paths; empty in older files and in sets that no run has made.
        temperature: students fit ``softmax(logits / temperature)``; for soft labels only.
        views: crops and mixtures of the images with the teacher's logits of each; for soft labels only. They take the
            place of an augmentation; ``labels`` are for students that do without them.
        stored: what a file keeps in place of ``images``, where each stored image stands for several.

    Raises:
        UserError: shapes disagree, a number is not finite or out of range, the form of the labels is unknown, or
            classes disagree with hard labels.
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
    run: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    views: SoftViews | None = None
    stored: MultiFormed | None = None

    def __post_init__(self) -> None:
        rows, count = len(self.images), len(self.class_names)
        shapes = self.labels.shape, self.classes.shape
        if self.images.ndim != 4 or self.images.numel() == 0 or shapes != ((rows, count), (rows,)):
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
        self._check_classes()

    def _check_classes(self) -> None:
        count, low, high = self.num_classes, int(self.classes.min()), int(self.classes.max())
        if low < 0 or high >= count:
            raise UserError(f"distilled set: classes must be in [0, {count}), found {low} to {high}")
        if self.label_kind == "hard" and not self.labels.argmax(1).equal(self.classes):
            raise UserError("distilled set: hard labels must be largest at the row's class")

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

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image_shape)) + self.shown_as
        return (
            f"DistilledSet({self.method} of {self.data.get('name', 'unknown data')}, {self.num_classes} classes x "
            f"{self.ipc} of {size}, {self.label_kind} labels; train with .loss: {self.loss_name})"
        )

    @property
    def loss_name(self) -> str:
        """What :meth:`loss` is, in words."""
        return loss_name(self.label_kind, self.temperature)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss that fits these labels, the one students are trained with.

        Args:
            outputs: logits of a network ``(B, num_classes)``.
            labels: rows of :attr:`labels` ``(B, num_classes)``, with their values unchanged.
        """
        return student_loss(outputs, labels, self.label_kind, self.temperature)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shown_ipc(self) -> int:
        """Images per class that a student sees."""
        return len(self) // self.num_classes

    @property
    def ipc(self) -> int:
        """Images per class that are stored, by which sets are compared."""
        return self.shown_ipc if self.stored is None else self.shown_ipc // self.stored.factor**2

    @property
    def shown_as(self) -> str:
        """What a report adds to the images per class where a student sees others than are stored."""
        return "" if self.stored is None else f" (shown as {self.shown_ipc})"

    @property
    def image_bytes(self) -> int:
        """Bytes of the images as they are stored; labels, views and preprocessing come on top."""
        return (self.images if self.stored is None else self.stored.images).nbytes

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
            UserError: the folder cannot be written, or the images are others than the stored ones make.
        """
        soft = self.label_kind == "soft"
        header = {
            "format_version": 3 if self.stored or self.preprocessing.kind == "zca" else 2 if soft else 1,
            "label_kind": self.label_kind,
            "loss": self.loss_name,
            "class_names": list(self.class_names),
            "ipc": self.ipc,
            "label_scale": float(self.labels.norm(dim=1).mean()),
            **{name: getattr(self, name) for name in PLAIN},
            **({"temperature": self.temperature} if soft else {}),
            **({_DECODING: self.stored.header()} if self.stored else {}),
        }
        images = {_IMAGES: self.images} if self.stored is None else {_STORED: self._unchanged(self.stored)}
        tensors = {**images, "labels": self.labels, "classes": self.classes}
        tensors |= {_PREFIX + name: value for name, value in packed(self.preprocessing, self.images).items()}
        tensors |= {_VIEWS + name: value for name, value in (self.views.state_dict() if self.views else {}).items()}
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        text = json.dumps(header)
        metadata = {HEADER: text, CHECKSUM: checksum(text, plain)}
        return write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))

    def _unchanged(self, stored: MultiFormed) -> Tensor:
        """Return the stored images, if they still make those of the set."""
        again = stored.shown(self.preprocessing)
        if again.shape != self.images.shape or not again.allclose(self.images.cpu(), 1e-3, 1e-3):
            raise UserError("distilled set: its images were changed, and the stored ones that make them were not")
        return stored.images

    @classmethod
    def load(cls, path: Path | str) -> "DistilledSet":
        """Read a file written by :meth:`save`, or the best one of a run's folder.

        Nothing that it says is executed, and no path in it is opened.

        Raises:
            UserError: the file is missing, truncated, of another kind, of a newer format, inconsistent, implausible, or
                not as it was written.
        """
        path = find_set(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # Copies: the library's tensors are a map of the file, and change with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, struct.error) as error:
            raise UserError(f"distilled set '{path}': not a safetensors file, or truncated ({error})") from None
        try:
            return cls._of(metadata, tensors)
        except KeyError as error:
            raise UserError(f"distilled set '{path}': incomplete, {error} is missing") from None
        except UserError as error:
            raise UserError(f"'{path}': {error}") from None

    @classmethod
    def _of(cls, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> "DistilledSet":
        """Make a set of what a file holds."""
        header = read_header(metadata)
        if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(metadata[HEADER], tensors):
            raise UserError("distilled set: its checksum differs: the file was edited or damaged after it was written")
        for name, value in tensors.items():
            if not name.startswith((_PREFIX, _VIEWS)) and value.dtype != _DTYPES.get(name):
                raise UserError(f"distilled set: {name} must be {_DTYPES.get(name, 'left out')}, got {value.dtype}")
        preprocessing, views = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (_PREFIX, _VIEWS)
        )
        plain = {name: header[name] for name in ("label_kind", *PLAIN) if name != "run"}
        into, stored = Preprocessing.from_state_dict(unpacked(preprocessing)), None
        if _DECODING in header:
            stored = MultiFormed.read(tensors[_STORED], header[_DECODING], sum(tensors["labels"].shape[:1]))
            _check_fit(stored.images, into)
        if (unread := _STORED if stored is None else _IMAGES) in tensors:
            raise UserError(f"distilled set: {unread} must be left out")
        made = cls(
            images=tensors[_IMAGES] if stored is None else stored.shown(into),
            labels=tensors["labels"],
            classes=tensors["classes"],
            class_names=tuple(header["class_names"]),
            preprocessing=into,
            **plain,
            run=header.get("run", {}),  # older files lack it
            temperature=header.get("temperature", 1.0),
            views=SoftViews.from_state_dict(views) if views else None,
            stored=stored,
        )
        _check_plausible(made)
        return made


def find_set(path: Path | str) -> Path:
    """Return a file by path, address, or folder of a run (its ``best``, else ``last``) or runs (the newest with a set).

    Raises:
        UserError: there is none.
    """
    if is_address(path):
        return fetch_set(path)
    path = Path(path)
    if path.is_dir():
        versions = sorted(path.glob("version_*"), key=lambda run: run.stat().st_mtime, reverse=True)
        found = [run / f"{name}.safetensors" for run in (path, *versions) for name in ("best", "last")]
        there = [file for file in found if file.is_file()]
        if not there:
            raise UserError(f"distilled set '{path}': the folder holds neither best.safetensors nor last.safetensors")
        return there[0]
    if not path.is_file():
        raise UserError(f"distilled set '{path}': no such file")
    return path


def library_versions(
    names: Sequence[str] = ("lightning_dd", "torch", "torchvision", "pytorch-lightning", "timm"),
) -> dict[str, str]:
    """Return the installed versions of the libraries a result depends on."""
    return {name: version(name) for name in names}


def _check_fit(images: Tensor, preprocessing: Preprocessing) -> None:
    """Refuse a preprocessing of other images."""
    channels, numbers = images.shape[1], images[0].numel()
    flat = numbers if preprocessing.zca_mean is None else preprocessing.zca_mean.numel()
    if len(preprocessing.mean) != channels or flat != numbers:
        raise UserError(f"distilled set: the preprocessing is of other images than {tuple(images.shape[1:])}")


def _check_plausible(distilled: DistilledSet) -> None:
    """Refuse images that no preprocessing like this makes, and classes of different numbers of images."""
    images, preprocessing = distilled.images, distilled.preprocessing
    _check_fit(images, preprocessing)
    sizes = torch.bincount(distilled.classes, minlength=distilled.num_classes)
    if bool((sizes != sizes[0]).any()):
        few, many = int(sizes.min()), int(sizes.max())
        raise UserError(f"distilled set: classes must have equally many images, found {few} to {many}")
    pixels = preprocessing.inverse(images)
    if not bool((pixels.abs() <= FARTHEST_PIXEL).all()):
        low, high = float(pixels.min()), float(pixels.max())
        raise UserError(f"distilled set: images: pixels lie in [{low:.3g}, {high:.3g}], far beyond [0, 1]")
    again = preprocessing(pixels[:1])
    if not bool((again - images[:1]).norm() <= 1e-2 * images[:1].norm().clamp_min(1)):
        raise UserError("distilled set: preprocessing: its two matrices do not undo each other")
