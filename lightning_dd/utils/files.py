"""Writing files so that a reader sees the old one or the new one, and reading torch's so that nothing in them runs."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from lightning_dd.utils.errors import UserError, first_line


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    Args:
        path: where the file shall be; missing parent folders are made.
        write: called with the temporary path, which has the same suffix.

    Returns:
        The path written.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full; what was there stays, and nothing else is
            left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
    except OSError as error:
        raise UserError(f"cannot write to folder '{path.parent}': {error.strerror or error}") from None
    try:
        write(temporary)
        temporary.chmod(mode)  # some libraries put a private file in its place
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # the latter for what the system says, too
        raise UserError(f"cannot write '{path}': {getattr(error, 'strerror', None) or first_line(error)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file atomically; see :func:`write_atomically`."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def require_writable(folder: Path | str) -> Path:
    """Make a folder and prove that files can be written in it, before hours of work depend on it.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = Path(folder)
    write_text(folder / ".writable", "").unlink()
    return folder


def hold(folder: Path | str) -> BaseFileLock:
    """Return the lock of a folder that one run at a time may write, held until it is released or the process ends.

    Raises:
        UserError: another run holds it.
    """
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another run is writing to '{folder}': wait for it, or name another folder") from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    return lock


def load_torch(path: Path | str, what: str, numbers: Iterable[Any] = ()) -> Any:
    """Return what a file of ``torch.save`` holds: tensors, containers, numbers and text, and nothing else.

    Args:
        path: of an ordinary file of this machine.
        what: how messages call it.
        numbers: types beyond those of torch that may be loaded (:func:`torch.serialization.safe_globals`).

    Raises:
        UserError: there is no such file, it is damaged or holds something else, or a tensor claims more than it holds.
    """
    import torch

    if not Path(path).is_file():
        raise UserError(f"{what} '{path}': no such file")
    try:
        if zipfile.is_zipfile(path):  # torch packs nothing, so whatever is packed would grow
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                    raise ValueError("its entries are packed")
                if broken := archive.testzip():  # torch compares no checksums
                    raise ValueError(f"the checksum of '{broken}' differs")
        with torch.serialization.safe_globals(list(numbers)):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _refuse_swollen(content)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
        why = f"it holds {found[1]}" if found else "it is damaged or of another kind"
        refused = "is not loaded, because only tensors and numbers are safe to load"
        raise UserError(f"{what} '{path}' {refused}: {why}") from None
    except Exception as error:  # torch raises many kinds, by how the file is broken
        raise UserError(f"{what} '{path}': not a file of torch.save, or truncated ({first_line(error)})") from None
    return content


def _refuse_swollen(content: Any) -> None:
    """Refuse tensors with more entries than stored numbers, which would take their memory at the first copy."""
    import torch

    from lightning_dd.utils.finite import tensors_in

    for item in tensors_in(content):
        if item.layout != torch.strided or item.nbytes > item.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tuple(item.shape)} holds fewer numbers")
