"""The two stages as functions: distil real images into a set, and train architectures on sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from lightning_dd.callbacks import (
    DistillationProgress,
    ExportDistilledSet,
    OuterTerm,
    PoolAlternation,
    SyntheticImages,
)
from lightning_dd.callbacks.interruption import Interruption
from lightning_dd.cells import Cell, closest, counted, find_cell
from lightning_dd.data import RealData
from lightning_dd.data.parts import DataChoice, build_data
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.base import Distiller
from lightning_dd.evaluators.evaluate import evaluate_files
from lightning_dd.evaluators.label_rows import LabelRows
from lightning_dd.evaluators.matrix import Hardware, Row
from lightning_dd.pretrained.classifier import Teacher
from lightning_dd.students.recipe import protocol as published
from lightning_dd.utils.arguments import class_path, dotted, known_class, plain_values, public_settings
from lightning_dd.utils.board import Board
from lightning_dd.utils.errors import printable
from lightning_dd.utils.machine import settle
from lightning_dd.utils.precision import chosen_precision
from lightning_dd.utils.silence import quieten
from lightning_dd.utils.trainer import check_checkpoint, check_length, make_trainer, whole_checkpoints

TRAINER: dict[str, Any] = {
    "devices": 1,
    "check_val_every_n_epoch": None,  # the whole run is one epoch: validate by outer steps
    "num_sanity_val_steps": 0,
}
"""Arguments of the Trainer that every distillation has unless it is told otherwise."""
CALLBACKS: dict[type[Callback], dict[str, Any]] = {
    SyntheticImages: {},
    ExportDistilledSet: {},  # after the pictures: who finds last.safetensors takes the run for whole
    DistillationProgress: {},
    LearningRateMonitor: {},
    ModelCheckpoint: {"save_last": True},
}
"""Callbacks that every distillation has unless it is told otherwise, and their arguments."""
SWITCHES: dict[str, type[Callback]] = {
    "enable_progress_bar": DistillationProgress,
    "enable_checkpointing": ModelCheckpoint,
    "logger": LearningRateMonitor,
}
"""Arguments of the Trainer which, if false, leave one of these callbacks out: Lightning refuses both together."""
_UNCHANGED = {"trainer.precision": "32-true", "trainer.accumulate_grad_batches": 1, "trainer.num_nodes": 1}
SAVE_EVERY = 1000
"""Outer steps that a run which is killed may lose."""


def rhythm(steps: int) -> dict[str, int]:
    """Return how often a run of so many outer steps is validated, which trains a student, and logged.

    Example:
        >>> rhythm(1000)
        {'val_check_interval': 250, 'log_every_n_steps': 20}
    """
    return {
        "val_check_interval": max(1, min(steps // 4, 10_000)),
        "log_every_n_steps": max(1, min(steps // 50, 500)),
    }


def distil(
    model: Distiller,
    data: RealData,
    steps: int = 1,
    output: Path | str = "runs/distil",
    *,
    callbacks: Sequence[Callback] = (),
    ckpt_path: str | None = None,
    **trainer: Any,
) -> DistilledSet:
    """Distil real images, as ``lightning-dd fit`` does, and say which published cell it is or is nearest to.

    Args:
        model: the method with its settings, as :class:`~lightning_dd.distillers.FRePo`.
        data: the real images, as :class:`~lightning_dd.data.MNIST5k`.
        steps: outer steps; a method that selects real images needs one.
        output: folder of ``last.safetensors``, ``best.safetensors``, checkpoints, pictures and TensorBoard's logs.
        callbacks: what is added to :data:`CALLBACKS`, as :class:`~lightning_dd.callbacks.MetaDD`.
        ckpt_path: a checkpoint of an interrupted run, as ``output/checkpoints/last.ckpt``, that is to be continued.
        trainer: further arguments of Lightning's Trainer, as ``accelerator="cpu"``; ``precision="auto"`` takes bf16
            where some steps show it to be faster.

    Returns:
        The set after the last outer step, as it is in ``output/last.safetensors``.

    Raises:
        UserError: the settings do not fit the data, the folder cannot be written, or the run breaks.
        SystemExit: the run was told to stop, and has written a checkpoint (130 after Ctrl-C, 143 after SIGTERM).
    """
    settings: dict[str, Any] = {
        **TRAINER,
        **rhythm(steps),
        "default_root_dir": output,
        "logger": Board(output, name="", version="", default_hp_metric=False),
        **trainer,
    }
    left_out = {kind for name, kind in SWITCHES.items() if settings.get(name) is False}
    own = {
        ExportDistilledSet: {"dirpath": str(output)},
        ModelCheckpoint: {"every_n_train_steps": min(SAVE_EVERY, settings["val_check_interval"])},
    }
    always = [kind(**options, **own.get(kind, {})) for kind, options in CALLBACKS.items() if kind not in left_out]
    quieten()
    settle()
    _say_cell(model, data, steps, callbacks, **trainer)
    check_length(steps, settings["val_check_interval"])
    check_checkpoint(ckpt_path)
    if ModelCheckpoint not in left_out:
        always.append(Interruption(lambda checkpoint: f"continue with ckpt_path='{checkpoint}'"))
    settings["plugins"] = whole_checkpoints(settings.get("plugins"))
    settings["precision"] = chosen_precision(settings, model, data, callbacks, ckpt_path)
    runner = make_trainer(max_steps=steps, callbacks=[*always, *callbacks], **settings)
    runner.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return DistilledSet.load(Path(output) / "last.safetensors")


def published_cell(config: str, ipc: int = 1, **given: Any) -> tuple[Distiller, RealData, int]:
    """Return method, data and outer steps of one cell of a paper's table, as ``lightning-dd list cells`` names it.

    What a paper changes with ``ipc`` follows it, which a class cannot know of itself; the whole training split is
    distilled, as in the papers.

    Args:
        config: name of the configuration.
        ipc: images per class, one that is published.
        given: what else chooses the cell, as ``classes="b"`` for ImageNet's subsets.

    Raises:
        UserError: there is no such cell.

    Example:
        >>> model, data, steps = published_cell("cifar10/mtt", ipc=50)  # for distil(model, data, steps)
        >>> type(model).__name__, model.ipc, model.syn_steps, steps
        ('MTT', 50, 30, 5000)
    """
    return _built(find_cell(config, ipc, **given))


def _built(cell: Cell) -> tuple[Distiller, RealData, int]:
    content = cell.content()
    model, data = content["model"], content["data"]
    cls: type[Distiller] = known_class(model["class_path"], Distiller, "model")  # type: ignore[type-abstract]
    steps = content.get("trainer", {}).get("max_steps", 1)
    return cls(**model["init_args"]), build_data(data["class_path"], data["init_args"]), steps


@rank_zero_only
def _say_cell(model: Distiller, data: RealData, steps: int, callbacks: Sequence[Callback], **trainer: Any) -> None:
    """Print which published cell a run is, or is nearest to, and what differs; nothing where there is none."""
    acting = [type(callback).__name__ for callback in callbacks if isinstance(callback, OuterTerm | PoolAlternation)]
    run = _counted(model, data, steps, **trainer) | {f"trainer.callbacks {name}": "added" for name in acting}
    text = closest(type(model).__name__, type(data).__name__, model.ipc, run, lambda cell: _counted(*_built(cell)))
    if text:
        print(text, flush=True)


def nearest_cell(distilled: DistilledSet) -> str:
    """Return which published cell a set's run is, or is nearest to, and what differs, as a run says it itself.

    Nothing is imported that the set names.

    Returns:
        Three lines; nothing where the set does not say its run, or no cell has its method and data.
    """
    rooms = {name: room for name in ("model", "data", "trainer") if isinstance(room := distilled.run.get(name), dict)}
    if len(rooms) < 3:
        return ""
    run = {printable(name): printable(said) if isinstance(said, str) else said for name, said in dotted(rooms)}
    run = {name: said for name, said in run.items() if _UNCHANGED.get(name) != said}
    acting = [str(said.get("class_path")).rpartition(".")[2] for said in rooms["trainer"].get("callbacks+", [])]
    settings = counted(run) | {f"trainer.callbacks {printable(name)}": "added" for name in acting}
    model, data = (str(settings.get(f"{room}.class_path")).rpartition(".")[2] for room in ("model", "data"))
    return closest(model, data, distilled.ipc, settings, lambda cell: _counted(*_built(cell)))


def _counted(model: Distiller, data: RealData, steps: int, **trainer: Any) -> dict[str, Any]:
    """Return the counted settings of a run by dotted name, as :func:`~lightning_dd.cells.counted` does for ``fit``."""
    method = {"class_path": class_path(type(model)), **plain_values(public_settings(model.hparams))}
    run = {"model": method, "data": plain_values(data), "trainer": {**TRAINER, **trainer, "max_steps": steps}}
    return counted(dict(dotted(run)))


def evaluate(
    sets: str | Path | DistilledSet | Sequence[str | Path | DistilledSet],
    architectures: Sequence[str],
    output: Path | str = "runs/evaluate",
    *,
    seeds: int = 3,
    protocol: str | Sequence[str] = "frepo",
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    augment: str | None = None,
    ema: float | None = None,
    data: str | None = None,
    data_args: Mapping[str, Any] | None = None,
    root: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    workers: int | str = "auto",
    names: Sequence[str] = (),
    labels: Sequence[str] = (),
    teacher: Teacher | None = None,
    probe: str | None = None,
) -> list[Row]:
    """Train architectures x seeds on distilled sets and on random real images, as ``lightning-dd evaluate`` does.

    Args:
        sets: distilled-set files, folders of runs, or sets, which are written to ``output/sets``; one or several.
        architectures: names of the factory, or of groups (:mod:`lightning_dd.models.zoo`).
        output: folder of the report and the TensorBoard logs; a finished student found there is not trained again.
        seeds: students per architecture and source.
        protocol: published recipe of :mod:`lightning_dd.students.recipe`; several make a matrix.
        steps: training steps of a student, in place of the protocol's.
        lr: peak learning rate of a student, likewise.
        batch_size: synthetic images per step, likewise; at most all.
        augment: operations joined by ``_``, ``auto``, ``siamese`` or ``none``, likewise.
        ema: decay of a moving average of the weights, likewise; 0 for none.
        data: the real data, a class name or the class path of your own; ``None`` takes what the set says of itself.
        data_args: arguments of the data.
        root: folder of the real data on this machine.
        accelerator: Lightning's Trainer argument.
        devices: processes per student.
        strategy: Lightning's Trainer argument, ``ddp`` for several processes.
        workers: processes of this machine that train students side by side; ``auto`` is one per core, or per GPU.
        names: what the sets are called in the report, in place of their files' names.
        labels: further rows of each set, by kind (:class:`~lightning_dd.evaluators.label_rows.LabelRows`).
        teacher: whose labels those are.
        probe: weights under a linear layer, which is all that is trained then.

    Returns:
        One row per student, with accuracies in [0, 1].

    Raises:
        UserError: a file, an architecture, the data or the folder is unusable.
    """
    listed = [sets] if isinstance(sets, str | Path | DistilledSet) else list(sets)
    files = [_file_of(item, f"{output}/sets", place) for place, item in enumerate(listed)]
    changes = {"steps": steps, "lr": lr, "batch_size": batch_size, "augment": augment, "ema": ema}
    recipes = {name: published(name, **changes) for name in ([protocol] if isinstance(protocol, str) else protocol)}
    where = DataChoice(data, data_args or {}, root), Hardware(accelerator, devices, strategy), workers
    shown = names, LabelRows(tuple(labels), teacher), probe
    return evaluate_files(files, architectures, str(output), seeds, recipes, *where, *shown)


def _file_of(item: str | Path | DistilledSet, folder: str, place: int) -> str:
    """Return the file of a set, which one that is in memory alone gets now."""
    if not isinstance(item, DistilledSet):
        return str(item)
    return str(item.save(f"{folder}/{item.method.lower()}-{place}.safetensors"))
