"""The finished students of an evaluation, one small file each: an interrupted evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_dd.utils.files import write_text


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors' values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Ledger:
    """Records by identity, in a folder; a record is written atomically once, and read by whoever needs it.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: dict[str, Any]) -> Path:
        """Return the file of a record: named by a hash of everything its value depends on."""
        text = json.dumps(identity, sort_keys=True)
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.json"

    def read(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the record, or ``None`` if there is none yet or its file is damaged."""
        try:
            content = json.loads(self.path(identity).read_text(encoding="utf-8"))
            record: dict[str, Any] = content["record"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record

    def write(self, identity: dict[str, Any], record: dict[str, Any]) -> None:
        """Keep a record."""
        write_text(self.path(identity), json.dumps({"identity": identity, "record": record}, indent=1) + "\n")
