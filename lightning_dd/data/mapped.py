"""Decoding straight into a memory-mapped file of the cache, for splits that do not fit in memory."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lightning_dd.data.cache import load_split, split_content, split_path
from lightning_dd.data.decode import Allocate, PixelArray
from lightning_dd.data.images import RawSplit
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable, write_atomically

_HEADER = 2**20  # bytes before the labels: room for thousands of class names, known only after the decoding


def mapped_split(key: str, decode: Callable[[Allocate], RawSplit]) -> RawSplit:
    """Return the split stored under ``key`` as a memory-mapped file, or decode it straight into one.

    The files are those of :func:`~lightning_dd.data.cache.cached_split`. Pixels come into memory only where they are
    read. The checksum is not compared, because that would read them all; a truncated file is still found and replaced.

    Args:
        key: from :func:`~lightning_dd.data.cache.content_key`, of everything the pixels depend on.
        decode: called when the cache has no good file, with what makes the array to decode into.

    Raises:
        UserError: the cache folder cannot be written, or has no room.
    """
    path = split_path(key)
    split = load_split(path, check=False)
    if split is None:
        try:
            require_writable(path.parent)
        except UserError as error:
            raise UserError(f"data.on_disk needs a cache folder (LIGHTNING_DD_CACHE): {error}") from None
        write_atomically(path, lambda temporary: _decode_into(temporary, decode))
        split = load_split(path, check=False)
    if split is None:
        raise UserError(f"data.on_disk: the decoded data '{path}' cannot be read back")
    return split


def _decode_into(file: Path, decode: Callable[[Allocate], RawSplit]) -> None:
    """Write a safetensors file whose pixels a decoder puts in place itself: header, labels, images."""
    array: PixelArray | None = None

    def allocate(shape: tuple[int, ...]) -> PixelArray:
        """Make room for the pixels in the file and map it."""
        nonlocal array
        start, size = _HEADER + 8 * shape[0], math.prod(shape)
        with file.open("r+b") as opened:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here and a killed process later
                os.posix_fallocate(opened.fileno(), 0, start + size)
            else:
                opened.truncate(start + size)
        array = np.memmap(file, np.uint8, "r+", offset=start, shape=shape)
        return array

    split = decode(allocate)
    content, metadata = split_content(split)
    header = _header(split, metadata)
    if not (_lies_in(array, split) and split.labels.dtype == torch.int64 and len(header) <= _HEADER):
        # The decoder made other pixels of them (one channel of three), or did not ask for an array.
        save_file({name: value.clone() for name, value in content.items()}, file, metadata=metadata)
        return
    assert isinstance(array, np.memmap)
    array.flush()
    with file.open("r+b") as opened:
        opened.write(header.ljust(_HEADER))
        opened.write(content["labels"].numpy().tobytes())


def _lies_in(array: PixelArray | None, split: RawSplit) -> bool:
    same = array is not None and split.images.data_ptr() == array.ctypes.data and split.images.is_contiguous()
    return same and array is not None and split.images.shape == array.shape


def _header(split: RawSplit, metadata: dict[str, str]) -> bytes:
    """Return the length field and the JSON header of the safetensors format, which may end in spaces."""
    after_labels = 8 * len(split.labels)
    entries = {
        "__metadata__": metadata,
        "labels": {"dtype": "I64", "shape": [len(split.labels)], "data_offsets": [0, after_labels]},
        "images": {
            "dtype": "U8",
            "shape": list(split.images.shape),
            "data_offsets": [after_labels, after_labels + split.images.numel()],
        },
    }
    return (_HEADER - 8).to_bytes(8, "little") + json.dumps(entries).encode()
