"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from lightning_dd.utils.errors import UserError


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    Args:
        path: where the file shall be; missing parent folders are made.
        write: called with the temporary path, which has the same suffix.

    Returns:
        The path written.

    Raises:
        UserError: the folder cannot be made or written; nothing is left behind.
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
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
    finally:
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
