"""Decoded splits and fitted tensors on disk: made once, read back in a moment, a damaged file never trusted."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dd.data.images import RawSplit
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically

_FORMAT = 1  # raise it when the decoders change what they give for the same bytes: old entries are then left alone
_NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)
_DAMAGED = (SafetensorError, OSError, ValueError, KeyError, TypeError)


def cache_folder() -> Path:
    """Return the cache folder: ``$LIGHTNING_DD_CACHE``, else ``lightning_dd`` in the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME`` or ``~/.cache``. The folder need not exist yet, and may be
    deleted at any time.
    """
    own = os.environ.get("LIGHTNING_DD_CACHE")
    if own:
        return Path(own).expanduser()
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general) if general else Path.home() / ".cache") / "lightning_dd"


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


def split_path(key: str) -> Path:
    """Return where the split of a key is kept."""
    return cache_folder() / f"{key}.safetensors"


def cached_split(key: str, decode: Callable[[], RawSplit]) -> RawSplit:
    """Return the split stored under ``key``, or decode it and store it.

    A damaged file is decoded again and replaced. A folder that cannot be written costs a warning, nothing
    else. Files appear whole or not at all, so processes may share the folder.

    Args:
        key: from :func:`content_key`, of everything the pixels depend on.
        decode: called when the cache has no good file.

    Returns:
        The split with the dtypes ``decode`` gave (uint8 images ``(N, C, H, W)`` as a rule, int64 labels).
    """
    path = split_path(key)
    split = load_split(path)
    if split is None:
        split = decode()
        store_split(path, split)
    return split


def cached_tensors(kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors stored under ``key``, or make them and store them; see :func:`cached_split`.

    Args:
        kind: what they are, the name of their folder in the cache.
        key: from :func:`content_key`, of everything they depend on.
        make: called when the cache has no good file.
    """
    path = cache_folder() / kind / f"{key}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {})["checksum"]
        if checksum == str(_checksum(*(found[name] for name in sorted(found)))):
            return found
        rank_zero_warn(f"the cached {kind} {path} is damaged (the checksum does not match); making it again")
    except _NOT_THERE:
        pass
    except _DAMAGED as error:
        rank_zero_warn(f"the cached {kind} {path} is damaged ({error}); making it again")
    made = {name: value.detach().cpu().contiguous() for name, value in make().items()}
    _write(path, made, {"checksum": str(_checksum(*(made[name] for name in sorted(made))))})
    return made


def load_split(path: Path, check: bool = True) -> RawSplit | None:
    """Read a stored split; its pixels stay in the memory-mapped file until they are used.

    Args:
        path: from :func:`split_path`.
        check: read it all once and compare the checksum.

    Returns:
        ``None`` where there is no file, or a damaged one (with a warning).
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["split"])
            split = RawSplit(
                file.get_tensor("images"), file.get_tensor("labels"), tuple(map(str, facts["class_names"]))
            )
        if len(split.images) != len(split.labels) or (check and facts["checksum"] != split_checksum(split)):
            raise ValueError("the checksum does not match")
    except _NOT_THERE:
        return None  # nothing there to be damaged; if the folder is at fault, storing says so
    except _DAMAGED as error:
        rank_zero_warn(f"the cached data {path} is damaged ({error}); decoding again")
        return None
    return split


def store_split(path: Path, split: RawSplit) -> None:
    """Write a split; a folder that cannot be written costs a warning."""
    _write(path, *split_content(split))


def split_content(split: RawSplit) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a split's file."""
    images, labels = split.images.contiguous(), split.labels.contiguous()
    checksum = split_checksum(RawSplit(images, labels, split.class_names))
    facts = {"split": json.dumps({"class_names": split.class_names, "checksum": checksum})}
    return {"images": images, "labels": labels}, facts


def split_checksum(split: RawSplit) -> int:
    """Sum over the bytes: a truncated file is found without it, a flipped bit would pass as a pixel."""
    return _checksum(split.images, split.labels)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    def write(file: Path) -> Any:
        save_file(tensors, file, metadata=metadata)

    try:
        write_atomically(path, write)
    except (UserError, SafetensorError) as error:
        rank_zero_warn(f"{path.name} is not cached ({error}); set LIGHTNING_DD_CACHE to a folder that can be written")


def _checksum(*tensors: Tensor) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.numpy().data, value)
    return value
