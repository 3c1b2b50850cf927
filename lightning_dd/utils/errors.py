"""The one exception that is meant for the person at the keyboard."""

import math
from collections.abc import Iterable
from difflib import get_close_matches

_TOO_LARGE = 1e9  # no rate, weight or temperature of any use
SEED = f"in [0, {2**32 - 1}]"
"""The range of numpy's seeds."""
_RANGES = {
    SEED: lambda number: 0 <= number < 2**32,
    "at least 0": lambda number: 0 <= number < math.inf,
    "at least 1": lambda number: 1 <= number < math.inf,
    "positive": lambda number: 0 < number < _TOO_LARGE,
    "in (0, 1]": lambda number: 0 < number <= 1,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "in [0, 1]": lambda number: 0 <= number <= 1,
}


class UserError(ValueError):
    """Something the user can mend: a setting, a file, a folder.

    The message is one line that names the setting and what is accepted. The command line prints it
    without a traceback and exits with status 2; from Python it is an ordinary ``ValueError``. What a message quotes may
    come from a file of somebody else: line breaks and control characters are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""Return a text with its line breaks, control and invisible characters as escapes.

    Example:
        >>> printable("ä\x1b[2J")
        'ä\\x1b[2J'
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a list of known names.

    Example:
        >>> str(unknown_name("architecture", "covn", ["conv", "convnet"]))
        "unknown architecture 'covn'; did you mean 'conv'? known: conv, convnet"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1) or [
        known for known in names if len(name) > 2 and known.startswith(name)
    ]
    hint = f" did you mean '{close[0]}'?" if close else ""
    shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    return UserError(f"unknown {kind} '{name}'" + (f";{hint} known: {shown}" if names else ""))


def check_count(setting: str, value: object) -> int:
    """Return ``value`` if it is a whole number of at least 1.

    Raises:
        UserError: it is anything else.

    Example:
        >>> check_count("width", 32)
        32
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{setting} must be a whole number of at least 1, got {value!r}")
    return value


def check_range(accepted: str, prefix: str = "", /, **settings: float | None) -> None:
    """Refuse numbers outside a range; ``None`` stands for a default that is found elsewhere, and passes.

    Args:
        accepted: ``at least 0``, ``at least 1``, ``positive`` (and below 1e9), ``in (0, 1]``, ``in [0, 1)``,
            ``in [0, 1]`` or :data:`SEED`.
        prefix: put before a setting's name in the message.
        settings: the numbers by the setting's name.

    Raises:
        UserError: a number is out of range, infinite or not a number; the first one is named.

    Example:
        >>> check_range("at least 1", steps=3, batch_size=None)
    """
    for name, number in settings.items():
        if number is not None and not _RANGES[accepted](number):
            below = f" and below {_TOO_LARGE:g}" if number >= _TOO_LARGE and accepted == "positive" else ""
            raise UserError(f"{prefix}{name} must be {accepted}{below}, got {number}")


def of_system(error: OSError) -> str:
    """Return what the system refused, in one line: the file, if it is known, and why.

    Example:
        >>> of_system(OSError(28, "No space left on device", "a.ckpt"))
        "'a.ckpt': No space left on device"
    """
    name = error.filename.decode() if isinstance(error.filename, bytes) else error.filename
    return f"'{name}': {error.strerror}" if name else f"{error.strerror or error}"


def first_line(error: BaseException) -> str:
    r"""Return the first line of another library's message, or its kind where it says nothing.

    Example:
        >>> first_line(OSError("no route\nand more")), first_line(EOFError())
        ('no route', 'EOFError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
