"""The cache folder: decoded splits, fitted tensors and notes. A damaged file is made again, never trusted."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap
from pytorch_lightning.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dd.data.images import RawSplit
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable, write_atomically, write_text

_FORMAT = 1  # raise it when the decoders change what they give for the same bytes: old entries are then left alone
_NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)
_DAMAGED = (SafetensorError, OSError, EOFError, ValueError, KeyError, TypeError)

Found = TypeVar("Found")
PixelArray = npt.NDArray[np.uint8]
"""Pixels as a decoder handles them: ``(C, H, W)`` or ``(N, C, H, W)``."""
Allocate = Callable[[tuple[int, ...]], PixelArray]
"""Makes the array for the pixels of a split, given its shape: in memory, or in a memory-mapped file."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors by name."""


def new_pixels(shape: tuple[int, ...]) -> PixelArray:
    """Return an array in memory, not filled."""
    return np.empty(shape, np.uint8)


def cache_folder() -> Path:
    """Return ``$LIGHTNING_DD_CACHE``, else ``lightning_dd`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    The folder may be deleted at any time.
    """
    own, general = (os.environ.get(name) for name in ("LIGHTNING_DD_CACHE", "XDG_CACHE_HOME"))
    return Path(own).expanduser() if own else Path(general or "~/.cache").expanduser() / "lightning_dd"


def content_key(*parts: object) -> str:
    """Return a key, 32 hexadecimal digits, that changes with any part.

    A :class:`~pathlib.Path` stands for the bytes of that file (its name does not count); anything else stands
    for its ``repr``, so pass plain values (strings, numbers, tuples of them).

    Raises:
        OSError: a file cannot be read.

    Example:
        >>> content_key("parquet", 32) == content_key("parquet", 32) != content_key("parquet", "32")
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (_FORMAT, *parts):
        if isinstance(part, Path):
            with part.open("rb") as file:
                text = hashlib.file_digest(file, "blake2b").hexdigest()
        else:
            text = repr(part)
        digest.update(f"{type(part).__name__}:{len(text)}:{text};".encode())
    return digest.hexdigest()


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes of tensors, which those of a cache must have."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def cached_tensors(kind: str, key: str, make: Callable[[], Mapping[str, Tensor]], shapes: Shapes) -> dict[str, Tensor]:
    """Return the tensors stored under ``key``, or make them and store them.

    A folder that cannot be written costs a warning, nothing else. Files appear whole or not at all, so processes may
    share the folder.

    Args:
        kind: what they are, the name of their folder in the cache.
        key: from :func:`content_key`, of everything they depend on.
        make: called when the cache has no good file.
        shapes: what a file must have; another one is damaged.
    """
    path = cache_folder() / kind / f"{key}.safetensors"

    def load() -> dict[str, Tensor]:
        tensors = _load(path)[0]
        if shapes_of(tensors) != shapes:
            raise ValueError("its tensors have other shapes")
        return tensors

    found = _unless_damaged(f"cached {kind} {path}", load)
    if found is None:
        found = {name: value.detach().cpu().contiguous() for name, value in make().items()}
        _save(path, found)
    return found


def cached_split(key: str, decode: Callable[[Allocate], RawSplit], on_disk: bool = False) -> RawSplit:
    """Return the split stored under ``key``, or decode it and store it; see :func:`cached_tensors`.

    Pixels lie in ``<key>.npy``, labels and class names in ``<key>.safetensors``, with the dtypes that ``decode`` gave.
    The pixels stay in the memory-mapped file until they are used.

    Args:
        key: from :func:`content_key`, of everything the pixels depend on.
        decode: called when the cache has no good file, with what makes the array to decode into.
        on_disk: decode straight into the file, for splits that do not fit in memory. The checksum is then not
            compared, because that would read all pixels; a truncated file is still found and replaced.

    Raises:
        UserError: ``on_disk``, and the cache folder cannot be written or has no room.
    """
    path = cache_folder() / f"{key}.npy"
    split = load_split(path, check=not on_disk)
    if split is not None:
        return split
    if not on_disk:
        split = decode(new_pixels)
        store_split(path, split)
        return split
    try:
        require_writable(path.parent)
    except UserError as error:
        raise UserError(f"data.on_disk needs a cache folder (LIGHTNING_DD_CACHE): {error}") from None
    decoded: list[RawSplit] = []
    write_atomically(path, lambda file: decoded.append(_decode_into(file, decode)))
    _store_labels(path, decoded.pop())
    split = load_split(path, check=False)
    if split is None:
        raise UserError(f"data.on_disk: the decoded data '{path}' cannot be read back")
    return split


def load_split(path: Path, check: bool = True) -> RawSplit | None:
    """Read a stored split, ``None`` where there is none or a damaged one; ``check`` reads all pixels for that."""

    def load() -> RawSplit:
        images = torch.from_numpy(open_memmap(path, "c"))
        tensors, facts = _load(path.with_suffix(".safetensors"))
        labels = tensors["labels"]
        if len(images) != len(labels) or (check and facts["pixels"] != _checksum(images)):
            raise ValueError("the checksum of the pixels does not match")
        return RawSplit(images, labels, tuple(json.loads(facts["class_names"])))

    return _unless_damaged(f"cached data {path}", load)


def store_split(path: Path, split: RawSplit) -> None:
    """Write the pixels of a split to ``path``, and its labels and class names beside them."""
    if _write(path, lambda file: np.save(file, split.images.contiguous().numpy())):
        _store_labels(path, split)


def _decode_into(file: Path, decode: Callable[[Allocate], RawSplit]) -> RawSplit:
    """Let a decoder put the pixels into a memory-mapped ``.npy`` file; they are copied where it made others."""
    mapped: PixelArray | None = None

    def allocate(shape: tuple[int, ...]) -> PixelArray:
        nonlocal mapped
        mapped = open_memmap(file, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here and a killed process later
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        return mapped

    split = decode(allocate)
    images = split.images
    whole = mapped is not None and images.shape == mapped.shape and images.is_contiguous()
    if whole and isinstance(mapped, np.memmap) and images.data_ptr() == mapped.ctypes.data:
        mapped.flush()
        return split
    images = images.clone(memory_format=torch.contiguous_format)  # they may still lie in the file
    np.save(file, images.numpy())
    return split._replace(images=images)


def _store_labels(path: Path, split: RawSplit) -> None:
    facts = {"class_names": json.dumps(split.class_names), "pixels": _checksum(split.images)}
    _save(path.with_suffix(".safetensors"), {"labels": split.labels.contiguous()}, facts)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`_save` wrote, and refuse it where a bit has changed."""
    with safe_open(path, framework="pt") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if facts["checksum"] != _checksum(*(tensors[name] for name in sorted(tensors))):
        raise ValueError("the checksum does not match")
    return tensors, facts


def _save(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    metadata = {"checksum": _checksum(*(tensors[name] for name in sorted(tensors))), **(facts or {})}
    _write(path, lambda file: save_file(tensors, file, metadata=metadata))


def _unless_damaged(what: str, load: Callable[[], Found]) -> Found | None:
    try:
        return load()
    except _NOT_THERE:
        return None  # nothing there to be damaged; if the folder is at fault, storing says so
    except _DAMAGED as error:
        rank_zero_warn(f"the {what} is damaged ({error}); making it again")
        return None


def _write(path: Path, write: Callable[[Path], Any]) -> bool:
    """Write a file of the cache and say whether it is there; a folder that cannot be written costs a warning."""
    try:
        write_atomically(path, write)
    except (UserError, SafetensorError) as error:
        rank_zero_warn(f"{path.name} is not cached ({error}); set LIGHTNING_DD_CACHE to a folder that can be written")
        return False
    return True


def _checksum(*tensors: Tensor) -> str:
    """Sum over the bytes: a truncated file is found without it, a flipped bit would pass as a pixel."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy().data, value)
    return str(value)


def remember(fingerprint: str, recipe: Mapping[str, Any]) -> None:
    """Note on this machine how data was made, by its fingerprint, so that a distilled set finds it again.

    The note (``class_path`` and ``init_args``, with an absolute ``root``) lies in the cache folder and not in the
    distilled set, so that no path in a file from somebody else is ever opened. Arguments that are no plain values, and
    a folder that cannot be written, leave nothing behind.
    """
    arguments = dict(recipe["init_args"])
    if isinstance(arguments.get("root"), str):
        arguments["root"] = str(Path(arguments["root"]).expanduser().absolute())
    try:
        text = json.dumps({"class_path": recipe["class_path"], "init_args": arguments}, indent=1) + "\n"
        path = _note(fingerprint)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    except (TypeError, OSError, UserError):
        return


def recall(fingerprint: str) -> dict[str, Any] | None:
    """Return what :func:`remember` kept of this data, if anything."""
    try:
        note = json.loads(_note(fingerprint).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"class_path", "init_args"} <= set(note) else None


def _note(fingerprint: str) -> Path:
    name = "".join(letter for letter in fingerprint if letter.isalnum())[:64]  # it may come from a file
    return cache_folder() / "found" / f"{name}.json"
