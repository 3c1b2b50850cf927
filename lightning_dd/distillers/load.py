"""From a checkpoint to a distilled set, without a run."""

from pathlib import Path
from typing import Any

import torch

from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.base import STATE_KEY, Distiller
from lightning_dd.utils.errors import UserError


def distilled_from_checkpoint(path: Path | str) -> DistilledSet:
    """Load a distiller's checkpoint and return its synthetic set.

    Raises:
        UserError: the file is missing, is no distiller's checkpoint, or its method is not known here.
    """
    checkpoint = read_checkpoint(path)
    if STATE_KEY not in checkpoint:
        raise UserError(f"checkpoint '{path}': not written by a lightning_dd distiller")
    method = checkpoint[STATE_KEY]["method"]
    known = {found.__name__: found for found in _subclasses(Distiller)}  # type: ignore[type-abstract]
    if method not in known:
        raise UserError(
            f"checkpoint '{path}' was written by '{method}', which is none of {', '.join(sorted(known))}: in Python, "
            f"use {method}.load_from_checkpoint(path).distilled_set().save(output)"
        )
    distiller = known[method].load_from_checkpoint(path, map_location="cpu", weights_only=True)
    return distiller.distilled_set(outer_step=int(checkpoint["global_step"]))


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint's plain content; nothing is unpickled.

    Raises:
        UserError: the file is missing or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint '{path}': no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, by how the file is broken
        raise UserError(f"checkpoint '{path}': not a checkpoint, or truncated ({type(error).__name__})") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"checkpoint '{path}': not a Lightning checkpoint")
    return content


def _subclasses(cls: type[Distiller]) -> list[type[Distiller]]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]
