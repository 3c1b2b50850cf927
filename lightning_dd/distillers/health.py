"""Whether a run's numbers are finite: noted in every outer step, and looked at before anything of it is written."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_dd.distilled.set import FARTHEST_PIXEL
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic.parameterisation import SyntheticSet
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.finite import all_finite
from lightning_dd.utils.trainer import steps_to_log

_NO_WAY_BACK = 1e6  # a run may pass through what a finished set may not hold, but not come back from there
_MOST_NOTED = 1000
"""Notes kept at most between two looks."""


class Healthy(LightningModule, ABC):
    """A distiller whose run stops, in one line, at the first outer step that gives NaN or infinite numbers.

    Every step's terms and gradient norms are noted where they are computed. On a CPU they are looked at before the
    optimizer takes the step; on a GPU, where looking waits for the device, when the Trainer logs and before a set,
    a picture or a checkpoint is written. What was written before stays as it is.
    """

    lr: float
    synthetic: SyntheticSet
    task: Task

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[int, tuple[str, ...], Tensor]] = []

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Keep scalars of the current outer step, by name, until the next look."""
        if values:
            scalars = torch.stack([value.detach().float() for value in values.values()])
            self._noted.append((self.trainer.global_step + 1, tuple(values), scalars))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the gradients' norms (before any clipping), look if that is cheap, and log them at logging steps."""
        norms = {name: part.grad.norm() for name, part in self.named_parameters() if part.grad is not None}
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # it skips steps that overflow float16
            self.note({f"the gradient of {name}": norm for name, norm in norms.items()})
        logs = steps_to_log(self.trainer) == 0
        if logs or self.device.type == "cpu" or len(self._noted) > _MOST_NOTED:
            self.require_health()
        if logs:
            self.log_dict({f"gradient/{name.rpartition('.')[2]}": norm for name, norm in norms.items()})

    def require_health(self, about_to_write: bool = False, checkpoint: Any = ()) -> None:
        """Stop the run if it has no finite numbers any more.

        Args:
            about_to_write: look at the images as well, which no step has noted since they were moved.
            checkpoint: tensors in containers that are to be written.

        Raises:
            UserError: one line with the outer step, the number and what most likely made it so.
        """
        fault = self._first_noted()
        if fault is None and about_to_write:
            moved = self._fault_of_images() or (None if all_finite(checkpoint) else "not all of its state is finite")
            fault = moved and f"after outer step {self.trainer.global_step}: {moved}"
        if fault is not None:
            raise UserError(f"{fault}; {self._cause()}; what was written before stays as it is")

    def stop_at(self, error: Exception) -> UserError:
        """Return a failure within the current outer step as the line that ends the run."""
        return UserError(f"outer step {self.trainer.global_step + 1}: {error}; {self._cause()}")

    def _first_noted(self) -> str | None:
        """Return the first number noted since the last look that is not finite, in words."""
        noted, self._noted = self._noted, []
        if not noted:
            return None
        values = torch.cat([scalars for *_, scalars in noted]).tolist()
        names = [(step, name) for step, own, _ in noted for name in own]
        for (step, name), value in zip(names, values, strict=True):
            if not math.isfinite(value):
                return f"outer step {step}: {name} is {value}"
        return None

    @torch.no_grad()
    def _fault_of_images(self) -> str | None:
        """Return why the images, in any parameterisation, are of no use, in words."""
        images, labels = (part.detach().cpu() for part in self.synthetic())
        if not all_finite(labels):
            return "labels are not finite"
        farthest = float(self.task.preprocessing.inverse(images).abs().max())
        if farthest > FARTHEST_PIXEL:
            rank_zero_warn(
                f"images have pixels beyond {FARTHEST_PIXEL:g}, where [0, 1] is meant: nothing reads a set of them; "
                f"lower model.lr ({self.lr:g})"
            )
        return None if farthest <= _NO_WAY_BACK else f"images have pixels of {farthest:.3g}, far beyond [0, 1]"

    def _cause(self) -> str:
        """Return what most likely made it so, and what to do, in words."""
        if self._fault_of_images() is None and not all_finite(self.rank_state()):
            return f"a network it looks through has diverged: lower model.inner_lr ({getattr(self, 'inner_lr', 'its')})"
        half = self.trainer.precision not in ("32-true", "64-true")
        return f"lower model.lr ({self.lr:g})" + (f", or leave trainer.precision={self.trainer.precision}" * half)

    @abstractmethod
    def rank_state(self) -> dict[str, Any]:
        """Return what lies outside the module tree: the networks that steps look through and inner steps train."""
