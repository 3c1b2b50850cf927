"""TensorBoard as this project writes it."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from lightning_dd.utils.arguments import dotted, plain_values, public_settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SCORE = "val/accuracy"
"""The scalar that the table of settings shows beside them."""
_NO_RESULT = ("config.yaml", "hparams.yaml", ".lock")


class Board(TensorBoardLogger):
    """Lightning's logger, with the settings in HPARAMS, and without the curve of the epoch: a run is one epoch.

    A run that is refused before it has made anything leaves no folder behind.
    """

    _made: tuple[Path, ...] = ()

    @property
    @rank_zero_experiment
    def experiment(self) -> "SummaryWriter":
        """The writer; its folder is made with it."""
        if self._experiment is None:
            folder = Path(self.log_dir)
            self._made = tuple(each for each in (folder, *folder.parents) if not each.exists())
        writer: SummaryWriter = super().experiment
        return writer

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the files, and take away what this run made if it failed with nothing but its settings in it."""
        super().finalize(status)
        if status != "failed" or not self._made or not self._made[0].is_dir():
            return
        files = [*self._made[0].iterdir()]
        if all(file.name in _NO_RESULT or file.name.startswith("events.out.") for file in files):
            for file in files:
                file.unlink()
            for folder in self._made:
                if not any(folder.iterdir()):
                    folder.rmdir()

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
        """Write all scalars but the epoch; a folder with curves stays."""
        self._made = ()
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
