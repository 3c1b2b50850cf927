"""From a checkpoint to a distilled set, without a run."""

from pathlib import Path
from typing import Any

import torch

from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.base import Distiller
from lightning_dd.distillers.resume import read_state
from lightning_dd.utils.arguments import known_class, nothing_imported
from lightning_dd.utils.checkpoint import public_settings
from lightning_dd.utils.errors import UserError


def distilled_from_checkpoint(path: Path | str) -> DistilledSet:
    """Load a distiller's checkpoint and return its synthetic set.

    Classes that the checkpoint names are looked up among those that have been imported; nothing is imported for it.

    Raises:
        UserError: the file is missing, is no distiller's checkpoint, or names a class that is not known here.
    """
    checkpoint = read_checkpoint(path)
    with nothing_imported():
        try:
            state = read_state(checkpoint)
            cls: type[Distiller] = known_class(state["method"], Distiller, "method")  # type: ignore[type-abstract]
            distiller = cls(**public_settings(checkpoint["hyper_parameters"]))
        except (UserError, TypeError) as error:
            raise UserError(f"checkpoint '{path}': {error}") from None
        distiller.on_load_checkpoint(checkpoint)
        distiller.load_state_dict(checkpoint["state_dict"])
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
