"""Pictures of the synthetic set: in TensorBoard while it is distilled, and as PNG files beside the result."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from lightning_dd.callbacks.folder import run_folder
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.base import Distiller
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically

_LARGEST_GRID = 20
"""Images per class shown at most; more could not be told apart."""


class SyntheticImages(Callback):
    """Draw the synthetic images by class in pixel space, and their labels as a heat map.

    Both go to TensorBoard every ``every`` outer steps, at the start and at the end; ``initial.png``, ``final.png`` and
    ``labels.png`` are written to the run's folder.

    Args:
        every: outer steps between TensorBoard images, at least 1; ``None`` is a tenth of the run.
        dirpath: where the PNG files go; ``None`` is the logger's folder.

    Raises:
        UserError: ``every`` is below 1.
    """

    def __init__(self, every: int | None = None, dirpath: str | None = None) -> None:
        if every is not None and every < 1:
            raise UserError(f"SyntheticImages.every must be at least 1, got {every}")
        self.every = every
        self.dirpath = dirpath
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where the pictures go, on every rank."""
        self._folder = run_folder(trainer, self.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the run starts from; a resumed run keeps the first run's picture."""
        if trainer.global_step == 0:
            self._show(trainer, pl_module, "initial")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show progress."""
        every = max(1, trainer.max_steps // 10) if self.every is None else self.every
        if trainer.global_step % every == 0:
            self._show(trainer, pl_module, None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result and write the pictures."""
        self._show(trainer, pl_module, "final")

    def _show(self, trainer: Trainer, pl_module: LightningModule, file: str | None) -> None:
        if not isinstance(pl_module, Distiller) or not trainer.is_global_zero:
            return
        distilled = pl_module.distilled_set(views=False)
        grid = image_grid(distilled.pixels(), distilled.ipc)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                board = logger.experiment
                board.add_image("synthetic/images", grid, trainer.global_step)
                figure = label_heat_map(distilled.labels, distilled.class_names)
                board.add_figure("synthetic/labels", figure, trainer.global_step)
        if file is not None:
            write_picture(distilled, self._folder / f"{file}.png")
        if file == "final":
            figure = label_heat_map(distilled.labels, distilled.class_names)
            write_atomically(self._folder / "labels.png", lambda path: figure.savefig(path, dpi=100))


def write_picture(distilled: DistilledSet, path: Path | str) -> Path:
    """Write a distilled set's images as one PNG, a column per class.

    Raises:
        UserError: the folder cannot be written.
    """
    grid = image_grid(distilled.pixels(), distilled.ipc)
    return write_atomically(path, lambda temporary: save_image(grid, temporary))


def image_grid(pixels: Tensor, ipc: int, scale: int | None = None) -> Tensor:
    """Arrange images in a grid with one column per class (one row when there is one image per class).

    Args:
        pixels: ``(num_classes * ipc, C, H, W)`` in [0, 1], in blocks of ``ipc`` per class.
        ipc: images per class; at most 20 are shown.
        scale: whole-number enlargement; ``None`` brings small images to about 64 pixels.

    Returns:
        ``(3, height, width)`` in [0, 1].
    """
    classes = len(pixels) // ipc
    scale = scale or max(1, round(64 / pixels.shape[-1]))
    blocks = pixels.view(classes, ipc, *pixels.shape[1:])[:, :_LARGEST_GRID]
    columns = min(classes, _LARGEST_GRID)
    rows = blocks.transpose(0, 1) if classes <= _LARGEST_GRID else blocks[:, :1].transpose(0, 1)
    enlarged = rows.flatten(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid: Tensor = make_grid(enlarged, nrow=columns, padding=2 * scale, pad_value=1.0)
    return grid


def label_heat_map(labels: Tensor, class_names: tuple[str, ...]) -> Figure:
    """Draw labels ``(n, num_classes)`` as a heat map, one row per synthetic image."""
    rows, columns = labels.shape
    figure = Figure(figsize=(1.5 + min(12, 0.45 * columns), 1.2 + min(12, 0.3 * rows)), layout="constrained")
    axes = figure.subplots()
    limit = float(labels.abs().max()) or 1.0
    picture = axes.imshow(
        labels.float().numpy(), cmap=matplotlib.colormaps["RdBu_r"], vmin=-limit, vmax=limit, aspect="auto"
    )
    if columns <= 30:
        axes.set_xticks(range(columns), class_names, rotation=45 if max(map(len, class_names)) > 2 else 0)
    axes.set_xlabel("label entry")
    axes.set_ylabel("synthetic image")
    figure.colorbar(picture, ax=axes, label="value")
    return figure
