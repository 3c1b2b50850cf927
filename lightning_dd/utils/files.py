"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning_dd.utils.errors import UserError


def write_atomically(path: Path | str, write: Callable[[Path], None]) -> Path:
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write to folder '{path.parent}': {error.strerror or error}") from None
    temporary = Path(name)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files private; the result should be as any other
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

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def require_writable(folder: Path | str) -> Path:
    """Make a folder and prove that files can be written in it, before hours of work depend on it.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = Path(folder)
    probe = write_text(folder / ".writable", "")
    probe.unlink()
    return folder
