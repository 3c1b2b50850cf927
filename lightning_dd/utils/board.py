"""TensorBoard as this project writes it."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from lightning_dd.utils.arguments import dotted, plain_values, public_settings

SCORE = "val/accuracy"
"""The scalar that the table of settings shows beside them."""


class Board(TensorBoardLogger):
    """Lightning's logger, with the settings in HPARAMS, and without the curve of the epoch: a run is one epoch."""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Write all settings by dotted name, beside the last :data:`SCORE`, to the tab HPARAMS."""
        super().log_hyperparams(params, metrics, step)
        given = params if isinstance(params, dict) else vars(params)
        settings = dict(dotted(plain_values(public_settings(given))))
        plain = (bool, int, float, str)
        shown = {name: said if isinstance(said, plain) else str(said) for name, said in settings.items()}
        writer = self.experiment._get_file_writer()
        for summary in hparams(shown, {SCORE: 0.0}):  # type: ignore[no-untyped-call]
            writer.add_summary(summary)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write all scalars but the epoch."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
