"""The configuration files that come with the package, by a short name."""

from collections.abc import Sequence
from pathlib import Path

from lightning_dd.utils.errors import unknown_name

FOLDER = Path(__file__).parent / "configs"


def configurations() -> dict[str, Path]:
    """Return the files by name: ``mnist5k/frepo``."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def find_configuration(name: str) -> Path:
    """Return a configuration file: a path as it is, else the one of that name that comes with the package.

    Args:
        name: ``my.yaml``, ``mnist5k/frepo``, ``mnist5k/frepo.yaml`` or ``configs/mnist5k/frepo.yaml``.

    Raises:
        UserError: there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    known = configurations()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short not in known:
        raise unknown_name("configuration", name, known)
    return known[short]


def found(arguments: Sequence[str]) -> list[str]:
    """Return a command line with every ``--config`` as a path."""
    words = list(arguments)
    for place, word in enumerate(words):
        if word in ("--config", "-c") and place + 1 < len(words):
            words[place + 1] = str(find_configuration(words[place + 1]))
        elif word.startswith("--config="):
            words[place] = f"--config={find_configuration(word.partition('=')[2])}"
    return words


def run_name(arguments: Sequence[str]) -> str:
    """Return what a run is called: the name of its first configuration, as ``mnist5k-frepo``."""
    for word, value in zip(arguments, [*arguments[1:], ""], strict=True):
        path = value if word in ("--config", "-c") else word.partition("=")[2] if word.startswith("--config=") else ""
        if path:
            file, folder = Path(path).resolve(), FOLDER.resolve()
            parts = file.relative_to(folder).with_suffix("").parts if folder in file.parents else (file.stem,)
            return "-".join(parts).replace("_", "-")
    return "distil"
