"""What a distiller's checkpoint holds beyond parameters, who may continue from it, and its distilled set."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from pytorch_lightning.trainer.states import TrainerFn

from lightning_dd.data.images import DataFacts
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.health import Healthy
from lightning_dd.pretrained.task import Task
from lightning_dd.utils.arguments import known_class, nothing_imported, public_settings, refuse_other
from lightning_dd.utils.errors import UserError, first_line
from lightning_dd.utils.files import load_torch

STATE_KEY = "lightning_dd"
"""Where a checkpoint keeps what lies outside the module tree."""
FORMAT = 2
"""Raised when checkpoints of before cannot be continued."""


class Resumable(Healthy, ABC):
    """A module whose checkpoint holds the data's facts and the state of every rank, so that a resumed run is exact.

    A subclass extends :meth:`rank_state` and :meth:`load_rank_state` by what a rank keeps outside the module tree.
    """

    run: dict[str, Any]
    shown_ipc: int

    @abstractmethod
    def make_synthetic(self) -> None:
        """Make what a checkpoint's tensors are loaded into; called once the task is known."""

    @abstractmethod
    def distilled_set(self, *, views: bool = True, **training: Any) -> DistilledSet:
        """Return the current synthetic set as a file-ready object.

        Args:
            views: have a teacher label views as well, where labels are a teacher's; false for a look at the set.
            training: facts on the run to keep beside it (outer step, validation score).
        """

    def rank_state(self) -> dict[str, Any]:
        """Return what this rank needs to go on and the module tree does not hold: plain tensors and numbers."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Continue exactly from :meth:`rank_state`."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what lies outside the module tree: the data's facts, and the state of every rank.

        Raises:
            UserError: something of it is not finite: a broken run's checkpoint would take the place of a good one.
        """
        ranks: list[dict[str, Any]] = [{}]
        if self._is_fitting():
            own, strategy = {"state": self.rank_state()}, self.trainer.strategy
            ranks = [strategy.broadcast(own, rank) for rank in range(self.trainer.world_size)]
            kept = checkpoint.get("state_dict"), checkpoint.get("optimizer_states"), ranks
            self.require_health(about_to_write=True, checkpoint=kept)
        checkpoint[STATE_KEY] = {
            "format": FORMAT,
            "method": type(self).__name__,
            "facts": self.task.facts.to_dict(),
            "preprocessing": self.task.preprocessing.state_dict(),
            "origin": self.task.origin,
            "run": self.run,
            "ranks": ranks,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another configuration; else restore what lies outside the module tree.

        Raises:
            UserError: the checkpoint is not a distiller's, or method, settings, data or number of processes differ.
        """
        super().on_load_checkpoint(checkpoint)
        state = _distiller_state(checkpoint)
        facts = DataFacts.from_dict(state["facts"])
        if hasattr(self, "task"):
            if state["method"] != type(self).__name__:
                raise UserError(f"the checkpoint was written by {state['method']}, this run is {type(self).__name__}")
            settings = public_settings(checkpoint["hyper_parameters"]), public_settings(self.hparams)
            refuse_other("another configuration", *settings)
            refuse_other("other data", facts.to_dict(), self.task.facts.to_dict())
        else:
            self.task = Task(facts, Preprocessing.from_state_dict(state["preprocessing"]), state["origin"])
            self.run = state.get("run", {})  # checkpoints of before lack it
            self.make_synthetic()
        if self._is_fitting():
            ranks, world_size = state["ranks"], self.trainer.world_size
            if not ranks[0]:
                raise UserError("the checkpoint holds no model pool: it was not written while fitting")
            if len(ranks) != world_size:
                raise UserError(
                    f"the checkpoint was written by {len(ranks)} process(es) and this run has {world_size}: every "
                    f"process continues its own model pool, so set trainer.devices and num_nodes to give {len(ranks)}"
                )
            self.load_rank_state(ranks[self.trainer.global_rank]["state"])

    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING


def distilled_from_checkpoint(path: Path | str) -> DistilledSet:
    """Load a distiller's checkpoint and return its synthetic set, without a run.

    Nothing is unpickled. Classes that the checkpoint names are looked up among those that have been imported; nothing
    is imported for it.

    Raises:
        UserError: the file is missing, is no distiller's checkpoint, or names a class that is not known here.
    """
    checkpoint = load_torch(path, "checkpoint")
    try:
        with nothing_imported():
            state, weights = _distiller_state(checkpoint), checkpoint["state_dict"]
            cls: type[Resumable] = known_class(state["method"], Resumable, "method")  # type: ignore[type-abstract]
            settings = public_settings(checkpoint["hyper_parameters"])
            distiller = cls(**settings)
            if distiller.shown_ipc * len(state["facts"]["class_names"]) != len(weights["synthetic.labels"]):
                raise UserError("ipc is not that of its labels")  # before anything of that size is made
            distiller.on_load_checkpoint(checkpoint)
            distiller.load_state_dict(weights)
            return distiller.distilled_set(outer_step=int(checkpoint["global_step"]))
    except UserError as error:
        raise UserError(f"checkpoint '{path}': {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"checkpoint '{path}': damaged, or of another version ({first_line(error)})") from error


def _distiller_state(checkpoint: Any) -> dict[str, Any]:
    """Return what :class:`Resumable` put into a checkpoint."""
    state = checkpoint.get(STATE_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise UserError("the checkpoint was not written by a lightning_dd distiller")
    if state.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint has format {state.get('format', 1)}, this lightning_dd reads {FORMAT}: "
            "its distilled sets (best.safetensors, last.safetensors) can still be used; start the run anew"
        )
    return state
