"""Decoded splits on disk: parse or decode once, read back in a moment, and never trust a damaged file."""

import hashlib
import json
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dd.data.base import RawSplit, RealData
from lightning_dd.errors import UserError
from lightning_dd.files import write_atomically

_FORMAT = 1  # raise it when the decoders change what they give for the same bytes: old entries are then left alone


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
    path = cache_folder() / f"{key}.safetensors"
    split = _load(path)
    if split is None:
        split = decode()
        _store(path, split)
    return split


class CachedData(RealData):
    """Real data whose decoding is worth keeping: a subclass gives :meth:`source_key` and :meth:`decode`."""

    @abstractmethod
    def source_key(self, *, train: bool) -> str:
        """Return the :func:`content_key` of all that :meth:`decode` depends on.

        Raises:
            UserError: the files are missing.
        """

    @abstractmethod
    def decode(self, *, train: bool) -> RawSplit:
        """Decode the train or the test split from its source, uint8 ``(N, C, H, W)``.

        Raises:
            UserError: the files are missing or not what this class reads.
        """

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, from the cache where it is there.

        Raises:
            UserError: the files are missing or not what this class reads.
        """
        return cached_split(self.source_key(train=train), lambda: self.decode(train=train))

    def prepare_data(self) -> None:
        """Fill the cache on one process of each node, so that the others need not decode as well."""
        if self.trainer is None or self.trainer.world_size == 1:
            return  # setup() reads it in a moment, and a lone process would do the work twice without a cache
        self.read(train=True)
        if self.trainer.testing or self.trainer.predicting:
            self.read(train=False)


def _load(path: Path) -> RawSplit | None:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["split"])
            split = RawSplit(
                file.get_tensor("images"), file.get_tensor("labels"), tuple(map(str, facts["class_names"]))
            )
        if len(split.images) != len(split.labels) or facts["checksum"] != _checksum(split):
            raise ValueError("the checksum does not match")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None  # nothing there to be damaged; if the folder is at fault, _store says so
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        rank_zero_warn(f"the cached data {path} is damaged ({error}); decoding again")
        return None
    return split


def _store(path: Path, split: RawSplit) -> None:
    images, labels = split.images.contiguous(), split.labels.contiguous()
    checksum = _checksum(RawSplit(images, labels, split.class_names))
    facts = {"split": json.dumps({"class_names": split.class_names, "checksum": checksum})}
    try:
        write_atomically(path, lambda file: save_file({"images": images, "labels": labels}, file, metadata=facts))
    except (UserError, SafetensorError) as error:
        rank_zero_warn(
            f"the decoded data is not cached ({error}); set LIGHTNING_DD_CACHE to a folder that can be written"
        )


def _checksum(split: RawSplit) -> int:
    """Sum over the bytes: a truncated file is found without it, a flipped bit would pass as a pixel."""

    def add(tensor: Tensor, before: int) -> int:
        return zlib.crc32(tensor.numpy().data, before)

    return add(split.labels, add(split.images, 0))
