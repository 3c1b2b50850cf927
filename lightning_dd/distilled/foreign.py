"""Distilled sets as other projects store them, read without running anything that the files hold."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from lightning_dd.data.images import DataFacts
from lightning_dd.data.readers import EXTENSIONS, decode_images
from lightning_dd.utils.errors import UserError, first_line
from lightning_dd.utils.files import load_torch

_EXPORT = "export it with numpy.savez(file, image=state['params']['x_proto'], label=state['params']['y_proto'])"

# What scores look like in the files of DC and its kin: numpy numbers, whose loading runs nothing. Old files say
# numpy.core, new ones numpy._core.
_make_number = np.float64(0).__reduce__()[0]
_SCORES: list[Any] = [
    np.dtype,
    *(getattr(np.dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType")),
    *((_make_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of every channel."""


_LARGEST_ARRAYS = 2**32
"""Bytes that the arrays of an .npz file may unpack to."""
_IMAGES, _ROWS = "images, channels, height, width", "images, classes"


class ForeignSet(NamedTuple):
    """Images and labels as they were found."""

    images: Tensor
    """``(n, C, H, W)``: uint8 pixels where the layout holds image files, float32 else."""
    labels: Tensor
    """``(n,)`` int64, or ``(n, num_classes)`` float32."""
    label_kind: str
    """``hard``, ``learned`` or ``soft``, as in :class:`~lightning_dd.distilled.set.DistilledSet`."""


def _read_frepo(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """FRePo: 'image' (n, H, W, C) and 'label' of an .npz file, or the checkpoint of its PyTorch branch."""
    torch_branch = images.suffix in (".pt", ".pth")
    state = _entry(_load_torch(images), "syndata_state_dict", images) if torch_branch else _load_npz(images)
    keys = ("x_syn", "y_syn") if torch_branch else ("image", "label")
    found, targets = (_entry(state, key, images) for key in keys)
    pictures = _tensor(found, keys[0], images, _IMAGES)
    if not torch_branch and tuple(pictures.shape[1:]) != facts.image_shape:
        pictures = pictures.permute(0, 3, 1, 2).contiguous()
    return ForeignSet(pictures, _tensor(targets, keys[1], images, _ROWS).float(), "learned")


def _read_dc(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """DC, DSA and DM: 'data' is a list with one pair of images and labels for each experiment."""
    pairs = _entry(_load_torch(images), "data", images)
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UserError(f"'{images}': 'data' must be a list of pairs of images and labels")
    if not 0 <= experiment < len(pairs):
        raise UserError(f"experiment must be in [0, {len(pairs)}) for '{images}', got {experiment}")
    pictures, targets = pairs[experiment]
    return ForeignSet(_tensor(pictures, "images", images, _IMAGES), _classes(targets, images), "hard")


def _read_mtt(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """MTT, and DATM with logits for labels: a tensor in each of two files."""
    assert labels is not None
    pictures, targets = (
        _tensor(_load_torch(images), "images", images, _IMAGES),
        _load_torch(labels),
    )
    if isinstance(targets, Tensor) and targets.ndim == 2:
        return ForeignSet(pictures, _tensor(targets, "labels", labels, _ROWS).float(), "soft")
    return ForeignSet(pictures, _classes(targets, labels), "hard")


def _read_folders(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """SRe2L (``new000/class000_id000.jpg``) and RDED (``00000/class00000_id00000.jpg``): a folder for each class."""
    folders = sorted(item for item in images.iterdir() if item.is_dir() and not item.name.startswith("."))
    by_name = _classes_of_folders([folder.name for folder in folders], images, facts)
    listed = [
        (file, by_name[folder.name])
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()
    ]
    if not listed:
        raise UserError(f"images '{images}': the folders hold no image files")
    pixels = decode_images(((str(file), file) for file, _ in listed), len(listed), channels=facts.image_shape[0])
    return ForeignSet(pixels, torch.tensor([label for _, label in listed]), "hard")


def _classes_of_folders(folders: list[str], root: Path, facts: DataFacts) -> dict[str, int]:
    """Return the label of each folder: by the name of a class, else by its number."""
    if set(folders) == set(facts.class_names):
        return {name: label for label, name in enumerate(facts.class_names)}
    numbers = {name: int(found[1]) for name in folders if (found := re.fullmatch(r"(?:new)?(\d+)", name))}
    if len(numbers) < len(folders) or sorted(numbers.values()) != list(range(facts.num_classes)):
        raise UserError(
            f"images '{root}': the folders must be the classes of {facts.name} by name, or all of their numbers 0 to "
            f"{facts.num_classes - 1} as in 'new000' or '00000'; found {len(folders)}: {', '.join(folders[:3])} ..."
        )
    return numbers


def _load_torch(file: Path) -> Any:
    return load_torch(file, "file", _SCORES)


def _load_npz(file: Path) -> dict[str, Any]:
    try:
        with ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _LARGEST_ARRAYS:
                raise ValueError(f"it unpacks to more than {_LARGEST_ARRAYS:,} bytes")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, BadZipFile, MemoryError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"'{file}' is not an .npz file of arrays ({first_line(error)}); of a flax checkpoint, {_EXPORT}"
        ) from None


def _entry(container: Any, key: str, file: Path) -> Any:
    if not isinstance(container, dict) or key not in container:
        found = ", ".join(map(str, container)) if isinstance(container, dict) else type(container).__name__
        raise UserError(f"'{file}' has no entry '{key}'; found {found}")
    return container[key]


def _tensor(value: Any, key: str, file: Path, axes: str) -> Tensor:
    """Return a tensor of numbers with these axes: uint8 as it is, everything else as float32."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.is_complex():
        raise UserError(f"'{file}': '{key}' must be a tensor of numbers, found {type(value).__name__}")
    if value.ndim != axes.count(",") + 1 or len(value) == 0:
        raise UserError(f"'{file}': '{key}' must be ({axes}), found {tuple(value.shape)}")
    return value.detach() if value.dtype == torch.uint8 else value.detach().float()


def _classes(value: Any, file: Path) -> Tensor:
    labels = _tensor(value, "labels", file, "images")
    if not bool((labels == labels.long()).all()):
        raise UserError(f"'{file}': the labels must be one whole number per image")
    return labels.long()


class Layout(NamedTuple):
    """How a project stores its sets."""

    method: str
    read: Callable[[Path, Path | None, int, DataFacts], ForeignSet]
    """From the file or folder, the second file, which of several sets to take, and the facts of the data.

    Raises:
        UserError: the file is of another form, or holds more than numbers.
    """
    in_folders: bool = False
    """Whether it is a folder of image files, and no file of tensors."""
    statistics: dict[str, Statistics] | None = None
    """Where it standardises with published numbers only: those that are not the data set's own here."""


_CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_SVHN: Statistics = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))

LAYOUTS = {
    "frepo": Layout("FRePo", _read_frepo),
    "dc": Layout("DC", _read_dc, statistics={"CIFAR10": _CIFAR10, "SVHN": _SVHN}),
    "mtt": Layout("MTT", _read_mtt, statistics={"CIFAR10": _CIFAR10, "CIFAR100": _CIFAR10}),  # one pair for both
    "sre2l": Layout("SRe2L", _read_folders, in_folders=True),
    "rded": Layout("RDED", _read_folders, in_folders=True),
}
"""Layouts by name."""
