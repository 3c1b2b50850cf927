"""What a checkpoint holds beyond parameters, and who may continue from it."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import torch

from lightning_dd.utils.arguments import RemembersArguments
from lightning_dd.utils.errors import UserError


def gather_ranks(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every rank's state, in rank order; each rank calls this and each gets the whole list."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    states: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def take_rank(states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """Return this rank's part of a checkpoint.

    Raises:
        UserError: the checkpoint was written by another number of processes, or outside a fit.
    """
    if len(states) != world_size:
        raise UserError(
            f"the checkpoint was written by {len(states)} process(es) and this run has {world_size}: every process "
            f"continues its own model pool, so set trainer.devices and num_nodes to give {len(states)}"
        )
    if not states[rank]:
        raise UserError("the checkpoint holds no model pool: it was not written while fitting")
    return states[rank]


def public_settings(hparams: Any) -> dict[str, Any]:
    """Return hyper-parameters without the entries Lightning's command line adds for itself."""
    return {name: value for name, value in dict(hparams).items() if not name.startswith("_")}


def plain_values(value: Any) -> Any:
    """Return settings as plain values that a checkpoint can hold and a file can say.

    Objects that remember their arguments become ``{"class_path": ..., "init_args": ...}``, dataclasses dictionaries,
    tuples lists.

    Example:
        >>> plain_values({"sizes": (1, 2)})
        {'sizes': [1, 2]}
    """
    if isinstance(value, RemembersArguments):
        return plain_values(value.recipe())
    if is_dataclass(value) and not isinstance(value, type):
        return plain_values(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value


def check_settings(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to continue a checkpoint of another configuration, naming the first difference.

    Raises:
        UserError: a setting differs.
    """
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            raise UserError(
                f"the checkpoint is of another configuration: {name} is {saved.get(name)!r} there "
                f"and {here.get(name)!r} here"
            )


def check_data(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to continue a checkpoint of other data, naming the first difference.

    Raises:
        UserError: a fact differs.
    """
    for name in saved:
        if saved[name] != here.get(name):
            raise UserError(
                f"the checkpoint is of other data: {name} is {saved[name]!r} there and {here.get(name)!r} here"
            )
