"""A student: any architecture trained on a distilled set."""

from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_dd.distilled.datamodule import DistilledData
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network, logits_in_slices
from lightning_dd.students.loop import StudentStep
from lightning_dd.students.recipe import Recipe
from lightning_dd.students.recipe import protocol as published
from lightning_dd.utils.arguments import public_settings, refuse_other
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.finite import all_finite
from lightning_dd.utils.scoring import ScoredModule
from lightning_dd.utils.trainer import steps_to_log

_STATE = "lightning_dd_student"


class Student(ScoredModule):
    """Train one architecture on a distilled set, with FRePo's evaluation protocol (Zhou et al. 2022) as default.

    It knows nothing of distillers: everything it needs comes from :class:`~lightning_dd.distilled.DistilledData`. A
    protocol is followed as ``evaluate`` follows it. It says how many steps there are where the Trainer has no
    ``max_steps``, how many images a batch has where the data has no ``batch_size``, and whether a moving average of the
    weights is tested: the student brings Lightning's ``EMAWeightAveraging`` callback by itself.

    Args:
        architecture: any name of the factory, with options as ``name:option=value,...``.
        protocol: a published recipe (:data:`~lightning_dd.students.recipe.PROTOCOLS`); the settings below replace
            its own.
        lr: peak learning rate.
        warmup: steps of linear warm-up, at most half the run.
        final_lr: last learning rate relative to the peak.
        augment: operations joined by ``_``; ``auto`` is FRePo's family for the data, ``siamese`` that of DSA, ``none``
            is none. A set with views is not augmented again.
        ema: decay of the moving average of the weights; 0 for none.
        seed: of weights, dropout and augmentation, and of the batch order where the data has no seed.

    Raises:
        UserError: a number is out of range, or the network cannot take the data's images.
    """

    def __init__(
        self,
        architecture: str = "conv:norm=none",
        protocol: str = "frepo",
        lr: float | None = None,
        warmup: int | None = None,
        final_lr: float | None = None,
        augment: str | None = None,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.architecture = architecture
        self.recipe = published(protocol, lr=lr, warmup=warmup, final_lr=final_lr, augment=augment, ema=ema)
        self.seed = seed
        self._given: Network | None = None

    @classmethod
    def with_recipe(cls, architecture: str, recipe: Recipe, seed: int, network: Network | None = None) -> "Student":
        """Build a student with any recipe, published or not, and perhaps a network; a checkpoint remembers neither."""
        student = cls(architecture, seed=seed)
        student.recipe, student._given = recipe, network
        return student

    def configure_model(self) -> None:
        """Build the network for the data's classes and image shape.

        Here and not in ``setup``: callbacks that copy the module (a moving average) are set up before it.

        Raises:
            UserError: the data is not ``DistilledData``, or the network cannot take its images.
        """
        if self._trainer is not None:
            distilled = self._distilled_data().distilled
            self._build(distilled.num_classes, distilled.image_shape)

    def configure_callbacks(self) -> list[Callback]:
        """Bring the moving average of the weights, if the recipe has one."""
        return [EMAWeightAveraging(decay=self.recipe.ema)] if self.recipe.ema else []

    def setup(self, stage: str) -> None:
        """Take labels, views and a learned learning rate from the data; say what neither it nor the Trainer says."""
        data = self._distilled_data()
        learned: float | None = data.distilled.training.get("step_size")
        self.recipe = self.recipe.suited_to(self.architecture, learned)
        self.one_step = StudentStep.on(data.distilled, self.recipe, self.seed, data.real.mirror)
        size = len(data.distilled), data.distilled.num_classes
        data.suit(self.recipe.batch_for(*size), self.seed)
        if stage == "fit" and self.trainer.max_steps == -1:
            self.trainer.fit_loop.epoch_loop.max_steps = self.recipe.steps_for(*size)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Fit one batch; randomness depends on seed, rank and step alone, so a resumed run is exact.

        Of several processes that cannot share a step's rows equally, each counts by its rows, as in one process.
        """
        loss = self.one_step.loss(self, *batch, self.trainer.fit_loop.total_batch_idx, self.global_rank)
        if steps_to_log(self.trainer) == 0:  # Lightning's bookkeeping of a number takes a fifth of a small step
            self.log("student/loss", loss.detach(), prog_bar=True)
        world = self.trainer.world_size  # DDP takes the mean over processes
        return loss * (world * len(batch[0]) / self._distilled_data().rows_per_step(world))

    def scored_logits(self, images: Tensor) -> Tensor:
        """Return the network's logits."""
        return logits_in_slices(self.network, images)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to rebuild the network without its data.

        Raises:
            UserError: the weights are not finite: such a checkpoint would take the place of a good one.
        """
        if not all_finite(checkpoint.get("state_dict")):
            raise UserError(f"the student has diverged (NaN in its weights): lower model.lr ({self.recipe.lr:g})")
        checkpoint[_STATE] = {"num_classes": self.num_classes, "image_shape": list(self.image_shape)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the network, or refuse a checkpoint of another configuration.

        Raises:
            UserError: the checkpoint is not a student's, or its settings differ.
        """
        super().on_load_checkpoint(checkpoint)
        if _STATE not in checkpoint:
            raise UserError("the checkpoint was not written by a lightning_dd student")
        refuse_other(
            "another configuration", public_settings(checkpoint["hyper_parameters"]), public_settings(self.hparams)
        )
        channels, height, width = checkpoint[_STATE]["image_shape"]
        self._build(checkpoint[_STATE]["num_classes"], (channels, height, width))

    def _distilled_data(self) -> DistilledData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DistilledData):
            raise UserError(f"a Student needs DistilledData as its data, got {type(data).__name__}")
        return data

    def _build(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        if hasattr(self, "network"):
            return
        self.num_classes, self.image_shape = num_classes, image_shape
        network = self._given or build_network(self.architecture, num_classes, image_shape, self.seed)
        self.network = network.to(memory_format=torch.channels_last)  # as in the bare loop
        self.make_accuracy(num_classes)

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimizer and schedule over the Trainer's ``max_steps``."""
        optimizer = self.recipe.build_optimizer(self.network)
        schedule = self.recipe.scheduler(optimizer, max(1, self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
