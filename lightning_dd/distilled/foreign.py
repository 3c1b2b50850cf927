"""Distilled sets as other projects store them, read without running anything that the files hold."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from lightning_dd.data.decode import decode_images
from lightning_dd.data.facts import DataFacts
from lightning_dd.data.folder import EXTENSIONS
from lightning_dd.utils.errors import UserError, unknown_name

_EXPORT = "export it with numpy.savez(file, image=state['params']['x_proto'], label=state['params']['y_proto'])"

# What scores look like in the files of DC and its kin: numpy numbers, whose loading runs nothing. Old files say
# numpy.core, new ones numpy._core.
_make_number = np.float64(0).__reduce__()[0]
_SCORES: list[Any] = [
    np.dtype,
    *(getattr(np.dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType")),
    *((_make_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


class ForeignSet(NamedTuple):
    """Images and labels as they were found."""

    images: Tensor
    """``(n, C, H, W)``: uint8 pixels where the layout holds image files, float32 else."""
    labels: Tensor
    """``(n,)`` int64, or ``(n, num_classes)`` float32."""
    label_kind: str
    """``hard``, ``learned`` or ``soft``, as in :class:`~lightning_dd.distilled.set.DistilledSet`."""


def check_foreign(layout: str, images: Path, labels: Path | None) -> None:
    """Refuse what can be seen to be wrong before the real data is read.

    Raises:
        UserError: the layout is unknown, or does not take these files, or one is missing.
    """
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    if (labels is None) == (layout == "mtt"):
        needs = "needs its labels as a second file" if layout == "mtt" else "holds its labels: leave 'labels' out"
        raise UserError(f"labels: layout {layout} {needs}")
    folder = LAYOUTS[layout] is _read_folders
    if not (images.is_dir() if folder else images.is_file()):
        wanted = "a folder with one folder of image files per class" if folder else "a file"
        raise UserError(f"images '{images}': layout {layout} is {wanted}, and there is none")
    if labels is not None and not labels.is_file():
        raise UserError(f"labels '{labels}': no such file")


def read_foreign(layout: str, images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """Read a distilled set of another project; :func:`check_foreign` has passed.

    Args:
        layout: one of :data:`LAYOUTS`.
        images: the file, or the folder of image files.
        labels: the second file of the layout ``mtt``.
        experiment: which of the sets in one file, for ``dc``.
        facts: of the data set it stands for.

    Raises:
        UserError: the file is of another form, or holds more than numbers.
    """
    return LAYOUTS[layout](images, labels, experiment, facts)


def _read_frepo(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """FRePo: 'image' (n, H, W, C) and 'label' of an .npz file, or the checkpoint of its PyTorch branch."""
    if images.suffix in (".pt", ".pth"):
        state = _entry(_load_torch(images), "syndata_state_dict", images)
        return ForeignSet(_images(state, "x_syn", images), _floats(state, "y_syn", images), "learned")
    arrays = _load_npz(images)
    pictures, targets = _images(arrays, "image", images), _floats(arrays, "label", images)
    if tuple(pictures.shape[1:]) != facts.image_shape:
        pictures = pictures.permute(0, 3, 1, 2).contiguous()
    return ForeignSet(pictures, targets, "learned")


def _read_dc(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """DC, DSA and DM: 'data' is a list with one pair of images and labels for each experiment."""
    pairs = _entry(_load_torch(images), "data", images)
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UserError(f"'{images}': 'data' must be a list of pairs of images and labels")
    if not 0 <= experiment < len(pairs):
        raise UserError(f"experiment must be in [0, {len(pairs)}) for '{images}', got {experiment}")
    pair = dict(zip(("images", "labels"), pairs[experiment], strict=True))
    return ForeignSet(_images(pair, "images", images), _classes(pair["labels"], images), "hard")


def _read_mtt(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """MTT, and DATM with logits for labels: a tensor in each of two files."""
    assert labels is not None
    pictures, targets = _images({"images": _load_torch(images)}, "images", images), _load_torch(labels)
    if isinstance(targets, Tensor) and targets.ndim == 2:
        return ForeignSet(pictures, _floats({"labels": targets}, "labels", labels), "soft")
    return ForeignSet(pictures, _classes(targets, labels), "hard")


def _read_folders(images: Path, labels: Path | None, experiment: int, facts: DataFacts) -> ForeignSet:
    """SRe2L (``new000/class000_id000.jpg``) and RDED (``00000/class00000_id00000.jpg``): a folder for each class."""
    folders = sorted(item for item in images.iterdir() if item.is_dir() and not item.name.startswith("."))
    by_name = _classes_of_folders([folder.name for folder in folders], images, facts)
    listed = [
        (file, by_name[folder.name])
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
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
    """Load tensors, containers and numbers; refuse a file that holds anything else."""
    try:
        with torch.serialization.safe_globals(_SCORES):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
        what = f"it holds {found[1]}" if found else "it is damaged or of another kind"
        raise UserError(f"'{file}' is not loaded, because only tensors and numbers are safe to load: {what}") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{file}' is not a file of torch.save ({reason})") from None


def _load_npz(file: Path) -> dict[str, Any]:
    try:
        opened = np.load(file, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("one array without a name")
        with opened as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{file}' is not an .npz file of arrays ({reason}); of a flax checkpoint, {_EXPORT}") from None


def _entry(container: Any, key: str, file: Path) -> Any:
    if not isinstance(container, dict) or key not in container:
        found = ", ".join(map(str, container)) if isinstance(container, dict) else type(container).__name__
        raise UserError(f"'{file}' has no entry '{key}'; found {found}")
    return container[key]


def _numbers(container: Any, key: str, file: Path) -> Tensor:
    value = _entry(container, key, file)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.is_complex():
        raise UserError(f"'{file}': '{key}' must be a tensor of numbers, found {type(value).__name__}")
    return value.detach()


def _images(container: Any, key: str, file: Path) -> Tensor:
    value = _numbers(container, key, file)
    if value.ndim != 4 or len(value) == 0:
        raise UserError(f"'{file}': '{key}' must have four axes, image by image, found {tuple(value.shape)}")
    return value if value.dtype == torch.uint8 else value.float()


def _floats(container: Any, key: str, file: Path) -> Tensor:
    value = _numbers(container, key, file)
    if value.ndim != 2:
        raise UserError(f"'{file}': '{key}' must be (images, classes), found {tuple(value.shape)}")
    return value.float()


def _classes(value: Any, file: Path) -> Tensor:
    labels = _numbers({"labels": value}, "labels", file)
    if labels.ndim != 1 or not bool((labels == labels.long()).all()):
        raise UserError(f"'{file}': the labels must be one whole number per image, found {tuple(labels.shape)}")
    return labels.long()


LAYOUTS: dict[str, Callable[[Path, Path | None, int, DataFacts], ForeignSet]] = {
    "frepo": _read_frepo,
    "dc": _read_dc,
    "mtt": _read_mtt,
    "sre2l": _read_folders,
    "rded": _read_folders,
}
"""Readers by layout."""
