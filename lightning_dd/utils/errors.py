"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend: a setting, a file, a folder.

    The message is one line that names the setting and what is accepted. The command line prints it
    without a traceback and exits with status 2; from Python it is an ordinary ``ValueError``.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a list of known names.

    Example:
        >>> str(unknown_name("architecture", "covn", ["conv", "convnet"]))
        "unknown architecture 'covn'; did you mean 'conv'? known: conv, convnet"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f" did you mean '{close[0]}'?" if close else ""
    shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    return UserError(f"unknown {kind} '{name}';{hint} known: {shown}")


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
