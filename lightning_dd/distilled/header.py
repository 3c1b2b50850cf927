"""The header of the distilled-set file, and the checksum of all it holds."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_dd.jobs import tensor_digest
from lightning_dd.utils.errors import UserError

FORMAT_VERSION = 3
"""The newest; a file is written in the oldest that can hold it."""
HEADER, CHECKSUM = "lightning_dd", "checksum"
"""The two entries of a file's metadata."""
PLAIN = {"data": dict, "method": str, "config": dict, "training": dict, "run": dict}
"""Fields of a set that the header holds as they are."""
_LARGEST_HEADER = 2**24  # characters
_TYPES: dict[str, Any] = {"format_version": int, "label_kind": str, "class_names": list, **PLAIN}
_TYPES["temperature"] = int | float
_DATA_TYPES = {"name": str, "spec": dict, "fingerprint": str, "mirror": bool}


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of a header, and of tensors with their names, types and shapes."""
    shapes = {name: [str(tensors[name].dtype), *tensors[name].shape] for name in sorted(tensors)}
    text = json.dumps([header, shapes, tensor_digest(tensors)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the header of a file, once its fields are of the right types.

    Raises:
        UserError: there is none, it is damaged, or of a newer format.
    """
    if HEADER not in metadata:
        raise UserError("distilled set: a safetensors file, but not one written by lightning_dd")
    if unknown := set(metadata) - {HEADER, CHECKSUM, "format"}:
        raise UserError(f"distilled set: unknown entry '{min(unknown)}' beside the header")
    try:
        header: Any = json.loads(metadata[HEADER]) if len(metadata[HEADER]) <= _LARGEST_HEADER else None
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError("distilled set: the header is damaged") from None
    for part, types in ((header, _TYPES), (header.get("data", {}), _DATA_TYPES)):
        for name, kind in types.items():
            if name in part and not isinstance(part[name], kind):
                raise UserError(f"distilled set: header field '{name}' must not be a {type(part[name]).__name__}")
    if not all(isinstance(name, str) for name in header.get("class_names", ())):
        raise UserError("distilled set: header field 'class_names' must hold names only")
    if version > FORMAT_VERSION:
        raise UserError(
            f"distilled set: format version {version}, this lightning_dd reads up to {FORMAT_VERSION}; "
            "upgrade lightning_dd"
        )
    return dict(header)
