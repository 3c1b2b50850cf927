"""This machine's memory of where its data was found, so that a distilled set finds it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dd.data.cache import cache_folder
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_text


def remember(fingerprint: str, recipe: Mapping[str, Any]) -> None:
    """Keep how data was made, by its fingerprint.

    The note lies in the cache folder and not in the distilled set, so that no path in a file from somebody else is ever
    opened. Arguments that are no plain values, and a folder that cannot be written, leave nothing behind.

    Args:
        fingerprint: of the training images.
        recipe: ``class_path`` and ``init_args`` of the data; a relative ``root`` is kept as an absolute one.
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
    """Return what :func:`remember` kept of this data, as ``class_path`` and ``init_args``; ``None`` for nothing."""
    try:
        note = json.loads(_note(fingerprint).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"class_path", "init_args"} <= set(note) else None


def _note(fingerprint: str) -> Path:
    name = "".join(letter for letter in fingerprint if letter.isalnum())[:64]  # it may come from a file
    return cache_folder() / "found" / f"{name}.json"
