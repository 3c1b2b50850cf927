"""Who goes first: one process fills a cache, the others then read it."""

from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning import Trainer


@contextmanager
def first_process_first(trainer: Trainer, name: str) -> Iterator[None]:
    """Run a block on the first process, and then on all others.

    Args:
        trainer: whose processes.
        name: of the barrier, for whoever debugs it.
    """
    if not trainer.is_global_zero:
        trainer.strategy.barrier(name)
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier(name)


def accelerator_of(trainer: Trainer) -> str:
    """Return the name of the Trainer's accelerator, for the Trainer of a stage before it."""
    kind = trainer.strategy.root_device.type
    return "gpu" if kind == "cuda" else kind
