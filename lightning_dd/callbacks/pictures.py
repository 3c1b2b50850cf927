"""Pictures of a run, in TensorBoard and as PNG files: the synthetic set, and the features that MetaDD compares."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from lightning_dd.callbacks.metadd import MetaDD
from lightning_dd.callbacks.run import RunFiles
from lightning_dd.distilled.card import facts_of
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.base import Distiller
from lightning_dd.losses.meta_features import meta_partition
from lightning_dd.report import markdown_table
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.files import write_atomically

_LARGEST_GRID = 20
"""Images per class shown at most; more could not be told apart."""
_LARGEST_FIGURE = 10
"""Images whose maps are shown at most."""


class Pictures(RunFiles):
    """Show something of a distiller at the start and at the end of a fit. A subclass answers :meth:`show`."""

    @abstractmethod
    def show(self, trainer: Trainer, distiller: Distiller, name: str | None) -> None:
        """Show it, on the first process only; ``name`` is ``initial`` or ``final`` for files, ``None`` in between."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the run starts from; a resumed run keeps the first run's picture."""
        if trainer.global_step == 0:
            self._show(trainer, pl_module, "initial")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result, also of a run that was stopped after its last step: continued, it takes none."""
        self._show(trainer, pl_module, "final")

    def _show(self, trainer: Trainer, pl_module: LightningModule, name: str | None) -> None:
        if isinstance(pl_module, Distiller) and trainer.is_global_zero:
            self.show(trainer, pl_module, name)


class SyntheticImages(Pictures):
    """Draw the synthetic images by class in pixel space, and their labels as a heat map, and say what they are.

    Both go to TensorBoard every ``every`` outer steps, at the start and at the end; ``initial.png``, ``final.png`` and
    ``labels.png`` are written to the run's folder. TensorBoard's texts are the run and, in the end, the set's card.

    Args:
        every: outer steps between TensorBoard images, at least 1; ``None`` is a tenth of the run.
        dirpath: where the PNG files go; ``None`` is the logger's folder.

    Raises:
        UserError: ``every`` is below 1.
    """

    def __init__(self, every: int | None = None, dirpath: str | None = None) -> None:
        super().__init__(dirpath)
        check_range("at least 1", "SyntheticImages.", every=every)
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show progress."""
        if trainer.global_step % (self.every or max(1, trainer.max_steps // 10)) == 0:
            self._show(trainer, pl_module, None)

    def show(self, trainer: Trainer, distiller: Distiller, name: str | None) -> None:
        """Draw images and labels."""
        boards = _boards(trainer)
        if name is None and not boards:
            return
        distilled = distiller.distilled_set(views=False)
        grid = image_grid(distilled.pixels(), distilled.shown_ipc)
        heat_map = label_heat_map(distilled.labels, distilled.class_names)
        names = distilled.class_names if distilled.num_classes <= _LARGEST_GRID else ()
        for board in boards:
            board.add_figure("synthetic/images", named_grid(grid, names), trainer.global_step)
            board.add_figure("synthetic/labels", heat_map, trainer.global_step)
            if name == "initial":
                said = yaml.safe_dump(distiller.run, sort_keys=False, allow_unicode=True)
                board.add_text("run", f"```\n{said}```", trainer.global_step)
            if name == "final":
                facts = [["what", "is"], *(list(fact) for fact in facts_of(distilled).items())]
                board.add_text("set", markdown_table(facts), trainer.global_step)
        if name is not None:
            write_picture(distilled, self.folder / f"{name}.png")
        if name == "final":
            _write_figure(heat_map, self.folder / "labels.png")


class MetaFeatureImages(Pictures):
    """Show the maps of MetaDD's architectures before and after, in TensorBoard and as PNG files.

    Writes ``meta_initial.png`` and ``meta_final.png``, and logs the mean meta ratio of all images beside them.

    Args:
        dirpath: where the PNG files go; ``None`` is the logger's folder.

    Raises:
        UserError: (in ``setup`` for a fit) there is no MetaDD among the callbacks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find whose maps are drawn."""
        super().setup(trainer, pl_module, stage)
        found = [callback for callback in trainer.callbacks if isinstance(callback, MetaDD)]  # type: ignore[attr-defined]
        if stage == "fit" and not found:
            raise UserError("MetaFeatureImages needs MetaDD among the callbacks")
        self._metadd = found

    def show(self, trainer: Trainer, distiller: Distiller, name: str | None) -> None:
        """Draw the maps over the images."""
        metadd = self._metadd[0]
        with torch.no_grad():
            images, labels = distiller.synthetic()
            result = metadd.measure(images, labels, distiller.label_kind, labels)
        pixels = distiller.distilled_set(views=False).pixels()
        accuracies = [metadd.accuracies[name] for name in metadd.mixture.names]
        figure = feature_figure(
            pixels, result.maps.cpu(), list(metadd.mixture.names), metadd.options.threshold, accuracies
        )
        for board in _boards(trainer):
            board.add_figure("metadd/features", figure, trainer.global_step)
            board.add_scalar("metadd/meta_ratio_of_all", float(result.terms["meta_ratio"]), trainer.global_step)
        _write_figure(figure, self.folder / f"meta_{name}.png")


def write_picture(distilled: DistilledSet, path: Path | str) -> Path:
    """Write a distilled set's images as one PNG, a column per class."""
    grid = image_grid(distilled.pixels(), distilled.shown_ipc)
    return write_atomically(path, lambda temporary: save_image(grid, temporary))


def image_grid(pixels: Tensor, ipc: int) -> Tensor:
    """Arrange images, enlarged to about 64 pixels, in a grid: a column per class, or a row of one image per class.

    Args:
        pixels: ``(num_classes * ipc, C, H, W)`` in [0, 1], in blocks of ``ipc`` per class.
        ipc: images per class; at most 20 are shown.

    Returns:
        ``(3, height, width)`` in [0, 1].
    """
    classes = len(pixels) // ipc
    scale = max(1, round(64 / pixels.shape[-1]))
    shown = _LARGEST_GRID if classes <= _LARGEST_GRID else 1
    rows = pixels.view(classes, ipc, *pixels.shape[1:])[:, :shown].transpose(0, 1)
    enlarged = rows.flatten(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid: Tensor = make_grid(enlarged, nrow=min(classes, _LARGEST_GRID), padding=2 * scale, pad_value=1.0)
    return grid


def named_grid(grid: Tensor, names: Sequence[str]) -> Figure:
    """Draw a grid ``(3, height, width)`` with the name of its class above each column; no names, no columns."""
    _, height, width = grid.shape
    turned = max(map(len, names), default=0) > 5
    figure = Figure(figsize=(width / 100 + 0.2, height / 100 + (0.9 if turned else 0.4)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set_xticks([(place + 0.5) * width / len(names) for place in range(len(names))], names)
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False, rotation=30 if turned else 0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


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


def feature_figure(
    pixels: Tensor, maps: Tensor, names: list[str], threshold: float = 0.5, accuracies: list[float] | None = None
) -> Figure:
    """Draw one row per image: the image, each architecture's map over it, meta and heterogeneous features.

    Args:
        pixels: ``(N, C, H, W)`` in [0, 1]; the first 10 are drawn.
        maps: ``(M, N, I, J)`` normalised, dead ones all zero; they cover the images as the architectures see them.
        names: of the M architectures.
        threshold: from where on a map value is high.
        accuracies: of the architectures on real images, in [0, 1], to be shown beside their names.

    Returns:
        The figure: N rows of ``M + 3`` pictures; heterogeneous features are coloured by how many maps are high.
    """
    rows, columns = min(len(pixels), _LARGEST_FIGURE), len(maps) + 3
    if pixels.shape[-1] == 28:  # networks see such images padded to 32, and so do their maps
        pixels = F.pad(pixels, (2, 2, 2, 2))
    side = pixels.shape[-1]
    partition = meta_partition(maps, threshold, alive=maps.flatten(2).amax(2) > 0)
    large = F.interpolate(maps[:, :rows].float(), size=(side, side), mode="bilinear", align_corners=False)
    figure = Figure(figsize=(1.15 * columns, 1.15 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    bare = (name.partition(":")[0].rpartition("/")[2] for name in names)
    short = ["_".join(name.split("_")[:2])[:12] for name in bare]
    if accuracies is not None:
        short = [f"{name}\n{100 * accuracy:.1f} %" for name, accuracy in zip(short, accuracies, strict=True)]
    for axis, title in zip(axes[0], ["image", *short, "meta", "hetero-\ngeneous"], strict=True):
        axis.set_title(title, fontsize=12)  # a card of TensorBoard shows it at half its size
    for row in range(rows):
        for axis in axes[row]:
            axis.set_axis_off()
            axis.imshow(pixels[row].expand(3, -1, -1).permute(1, 2, 0).numpy(), extent=(0, 1, 0, 1))
        for axis, values in zip(axes[row, 1:-2], large[:, row], strict=True):
            axis.imshow(values.numpy(), cmap="jet", alpha=0.5, vmin=0, vmax=1, extent=(0, 1, 0, 1))
        _mask(axes[row, -2], partition.meta[row], "Greens", 1)
        _mask(axes[row, -1], partition.heterogeneous[:, row].sum(0), "Reds", len(maps))
    return figure


def _mask(axis: Axes, counts: Tensor, colours: str, largest: int) -> None:
    """Colour the cells with a count above 0, and leave the others to the image."""
    values = counts.float().masked_fill(counts == 0, float("nan")).numpy()
    axis.imshow(values, cmap=colours, alpha=0.7, vmin=0, vmax=largest, extent=(0, 1, 0, 1))


def _boards(trainer: Trainer) -> list[Any]:
    """Return the TensorBoard writers of the run."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _write_figure(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100))
