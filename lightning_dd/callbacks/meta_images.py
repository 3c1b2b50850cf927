"""Pictures of what MetaDD compares: every architecture's map over every image, meta and heterogeneous features."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.callbacks.folder import run_folder
from lightning_dd.callbacks.metadd import MetaDD
from lightning_dd.distillers.base import Distiller
from lightning_dd.losses.metadd import meta_partition
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically

_LARGEST = 10
"""Images shown at most."""


class MetaFeatureImages(Callback):
    """Show the maps of MetaDD's architectures before and after, in TensorBoard and as PNG files.

    Writes ``meta_initial.png`` and ``meta_final.png``, and logs the mean meta ratio of all images beside them.

    Args:
        dirpath: where the PNG files go; ``None`` is the logger's folder.

    Raises:
        UserError: (when training starts) there is no MetaDD among the callbacks.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where the pictures go, on every rank."""
        self._folder = run_folder(trainer, self.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the run starts from; a resumed run keeps the first run's picture."""
        if trainer.global_step == 0:
            self._show(trainer, pl_module, "initial")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result."""
        self._show(trainer, pl_module, "final")

    def _show(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        metadd = next((callback for callback in trainer.callbacks if isinstance(callback, MetaDD)), None)  # type: ignore[attr-defined]
        if metadd is None:
            raise UserError("MetaFeatureImages needs MetaDD among the callbacks")
        if not isinstance(pl_module, Distiller) or not trainer.is_global_zero:
            return
        with torch.no_grad():
            images, labels = pl_module.synthetic()
            result = metadd.measure(images, labels, pl_module.label_kind, labels)
        pixels = pl_module.distilled_set().pixels()
        figure = feature_figure(pixels, result.maps.cpu(), list(metadd.mixture.names), metadd.options.threshold)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("metadd/features", figure, trainer.global_step)
                logger.log_metrics({"metadd/meta_ratio_of_all": float(result.terms["meta_ratio"])}, trainer.global_step)
        write_atomically(self._folder / f"meta_{when}.png", lambda path: figure.savefig(path, dpi=100))


def feature_figure(pixels: Tensor, maps: Tensor, names: list[str], threshold: float = 0.5) -> Figure:
    """Draw one row per image: the image, each architecture's map over it, meta and heterogeneous features.

    Args:
        pixels: ``(N, C, H, W)`` in [0, 1]; the first 10 are drawn.
        maps: ``(M, N, I, J)`` normalised, dead ones all zero; they cover the images as the architectures see them.
        names: of the M architectures.
        threshold: from where on a map value is high.

    Returns:
        The figure: N rows of ``M + 3`` pictures; heterogeneous features are coloured by how many maps are high.
    """
    rows, columns = min(len(pixels), _LARGEST), len(maps) + 3
    if pixels.shape[-1] == 28:  # networks see such images padded to 32, and so do their maps
        pixels = F.pad(pixels, (2, 2, 2, 2))
    side = pixels.shape[-1]
    partition = meta_partition(maps, threshold, alive=maps.flatten(2).amax(2) > 0)
    large = F.interpolate(maps[:, :rows].float(), size=(side, side), mode="bilinear", align_corners=False)
    figure = Figure(figsize=(1.15 * columns, 1.15 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    titles = ["image", *(_short(name) for name in names), "meta", "heterogeneous"]
    for row in range(rows):
        picture = pixels[row].expand(3, -1, -1).permute(1, 2, 0).numpy()
        for column in range(columns):
            axis = axes[row, column]
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[column], fontsize=7)
            axis.imshow(picture, extent=(0, 1, 0, 1))
            if 1 <= column <= len(maps):
                axis.imshow(large[column - 1, row].numpy(), cmap="jet", alpha=0.5, vmin=0, vmax=1, extent=(0, 1, 0, 1))
        _mask(axes[row, -2], partition.meta[row], "Greens", 1)
        _mask(axes[row, -1], partition.heterogeneous[:, row].sum(0), "Reds", len(maps))
    return figure


def _mask(axis: Axes, counts: Tensor, colours: str, largest: int) -> None:
    """Colour the cells with a count above 0, and leave the others to the image."""
    values = counts.float().masked_fill(counts == 0, float("nan")).numpy()
    axis.imshow(values, cmap=colours, alpha=0.7, vmin=0, vmax=largest, extent=(0, 1, 0, 1))


def _short(architecture: str) -> str:
    return architecture.partition(":")[0].rpartition("/")[2][:16]
