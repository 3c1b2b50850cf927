"""What a distiller's checkpoint holds beyond parameters, and who may continue from it."""

from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn

from lightning_dd.data.facts import DataFacts
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.pretrained.task import Task
from lightning_dd.utils.checkpoint import check_data, check_settings, gather_ranks, public_settings, take_rank
from lightning_dd.utils.errors import UserError

STATE_KEY = "lightning_dd"
"""Where a checkpoint keeps what lies outside the module tree."""
FORMAT = 2
"""Raised when checkpoints of before cannot be continued."""


class Resumable(LightningModule):
    """A module whose checkpoint holds the data's facts and the state of every rank, so that a resumed run is exact.

    A subclass extends :meth:`rank_state` and :meth:`load_rank_state` by what a rank keeps outside the module tree.
    """

    task: Task

    def make_synthetic(self) -> None:
        """Make what a checkpoint's tensors are loaded into; called once the task is known."""
        raise NotImplementedError

    def rank_state(self) -> dict[str, Any]:
        """Return what this rank needs to go on and the module tree does not hold: plain tensors and numbers."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Continue exactly from :meth:`rank_state`."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what lies outside the module tree: the data's facts, and the state of every rank."""
        checkpoint[STATE_KEY] = {
            "format": FORMAT,
            "method": type(self).__name__,
            "facts": self.task.facts.to_dict(),
            "preprocessing": self.task.preprocessing.state_dict(),
            "origin": self.task.origin,
            "ranks": gather_ranks({"state": self.rank_state()} if self._is_fitting() else {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another configuration; else restore what lies outside the module tree.

        Raises:
            UserError: the checkpoint is not a distiller's, or method, settings, data or number of processes differ.
        """
        state = read_state(checkpoint)
        facts = DataFacts.from_dict(state["facts"])
        if hasattr(self, "task"):
            if state["method"] != type(self).__name__:
                raise UserError(f"the checkpoint was written by {state['method']}, this run is {type(self).__name__}")
            check_settings(public_settings(checkpoint["hyper_parameters"]), public_settings(self.hparams))
            check_data(facts.to_dict(), self.task.facts.to_dict())
        else:
            self.task = Task(facts, Preprocessing.from_state_dict(state["preprocessing"]), state["origin"])
            self.make_synthetic()
        if self._is_fitting():
            ranks = take_rank(state["ranks"], self.trainer.global_rank, self.trainer.world_size)
            self.load_rank_state(ranks["state"])

    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING


def read_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what :class:`Resumable` put into a checkpoint.

    Raises:
        UserError: the checkpoint is not a distiller's, or one of an older version.
    """
    state = checkpoint.get(STATE_KEY)
    if not isinstance(state, dict):
        raise UserError("the checkpoint was not written by a lightning_dd distiller")
    if state.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint has format {state.get('format', 1)}, this lightning_dd reads {FORMAT}: "
            "its distilled sets (best.safetensors, last.safetensors) can still be used; start the run anew"
        )
    return state
