"""The whole run as ``lightning-dd fit`` takes it, so that a distilled set says how it is made again."""

from typing import Any

from pytorch_lightning import LightningModule, Trainer

from lightning_dd.data.base import RealData
from lightning_dd.losses.metadd import MetaOptions
from lightning_dd.utils.arguments import RemembersArguments, class_path, plain_values, public_settings, without_places

_TRAINER = ("max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
_PROCESSES = {"devices": "num_devices", "num_nodes": "num_nodes"}


def run_settings(module: LightningModule, trainer: Trainer) -> dict[str, Any]:
    """Return seed, trainer with the callbacks that change the result, model and data, in plain values without paths.

    Callbacks of this project that only watch and write are left out, and so are Lightning's. Of a callback that does
    not remember its arguments (:class:`~lightning_dd.utils.arguments.RemembersArguments`) the class alone is kept.
    """
    settings: dict[str, Any] = {name: getattr(trainer, name) for name in _TRAINER}
    settings["val_check_interval"] = trainer.val_check_interval  # it decides which step can be the best one
    settings |= {name: getattr(trainer, own) for name, own in _PROCESSES.items()}
    if trainer.world_size > 1:
        settings["strategy"] = "ddp"
    callbacks = [_said(callback) for callback in trainer.callbacks if _acts(callback)]  # type: ignore[attr-defined]
    hparams = {name: value for name, value in public_settings(module.hparams).items() if name != "seed"}
    data = getattr(trainer, "datamodule", None)
    run: dict[str, Any] = {
        "seed_everything": module.hparams.get("seed", 0),
        "trainer": {name: value for name, value in settings.items() if value is not None},
        "model": {"class_path": class_path(type(module)), "init_args": plain_values(hparams)},
        "data": plain_values(data) if isinstance(data, RealData) else None,
    }
    if callbacks:
        run["trainer"]["callbacks+"] = callbacks
    clean: dict[str, Any] = without_places(run)
    return clean


def _acts(callback: object) -> bool:
    room = type(callback).__module__.partition(".")[0]
    if room == "lightning_dd":
        return isinstance(callback, RemembersArguments) and bool(callback.init_args)  # without any, it comes by itself
    return room not in ("pytorch_lightning", "lightning")


def _said(callback: object) -> dict[str, Any]:
    kept: dict[str, Any] = {"class_path": class_path(type(callback))}
    if isinstance(callback, RemembersArguments):
        kept["init_args"] = {name: _value(value) for name, value in callback.init_args.items()}
    return kept


def _value(value: Any) -> Any:
    if isinstance(value, MetaOptions):  # their class may be one of the user's own
        return {"class_path": class_path(type(value)), "init_args": plain_values(value)}
    return plain_values(value)
