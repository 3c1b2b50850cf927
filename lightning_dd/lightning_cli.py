"""The verbs that are a stock LightningCLI: fit, validate, test, predict."""

from collections.abc import Sequence
from pathlib import Path

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

# Importing a class lets a configuration name it without its path.
from lightning_dd.configs import found, run_name
from lightning_dd.parsing import OneLineErrors, explain, user_error_in
from lightning_dd.synthetic import Labels, Parameterisation
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.silence import quieten

_CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"
_LOGGER = "pytorch_lightning.loggers.TensorBoardLogger"
_SAVE_EVERY = 1000
"""Outer steps a run that is killed may lose."""
DEFAULTS = {
    "trainer.devices": 1,
    "trainer.check_val_every_n_epoch": None,  # the whole run is one epoch: validate by outer steps
    "trainer.num_sanity_val_steps": 0,
    "trainer.callbacks": [
        {"class_path": "lightning_dd.callbacks.ExportDistilledSet"},
        {"class_path": "lightning_dd.callbacks.SyntheticImages"},
        {"class_path": "lightning_dd.callbacks.DistillationProgress"},
        {"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"},
        {"class_path": _CHECKPOINT, "init_args": {"save_last": True}},
    ],
}
"""What ``fit`` does unless a configuration says other; ``callbacks+:`` in a YAML file adds to the list."""


def known_classes(key: str) -> dict[str, type]:
    """Return the classes a configuration key accepts by bare name: this project's, and any a user has imported."""
    bases: dict[str, type] = {"model": LightningModule, "data": LightningDataModule, "trainer.callbacks": Callback}
    bases |= {"parameterisation": Parameterisation, "labels": Labels}
    if key == "trainer":
        return {"Trainer": Trainer}
    base = bases.get(key.removesuffix("+"), bases.get(key.rpartition(".")[2]))
    found = _subclasses(base) if base is not None else []
    hidden = ("pytorch_lightning.", "lightning.", "torchmetrics.") if base is not Callback else ()
    return {
        cls.__name__: cls
        for cls in found
        if not cls.__module__.startswith(hidden or "-")
        and not cls.__name__.startswith("_")
        and not getattr(cls, "__abstractmethods__", None)
    }


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, which answers a mistake with one line."""

    known_classes = staticmethod(known_classes)


class Cli(LightningCLI):
    """LightningCLI in subclass mode for model and data, with one seed for both Lightning and the model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Say the run's seed once, and what every configuration would repeat."""
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        logger = {"save_dir": "runs", "name": run_name(Parser.arguments), "default_hp_metric": False}
        parser.set_defaults({**DEFAULTS, "trainer.logger": {"class_path": _LOGGER, "init_args": logger}})

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from the length of the run, and let ``--trainer.enable_progress_bar=false`` win.

        It holds for the trainings of teachers, experts and architectures within the run too. Lightning refuses it
        beside a bar among the callbacks, and likewise ``enable_checkpointing=false`` and ``logger=false``.
        """
        trainer = self.config[self.config.subcommand].trainer
        if trainer.val_check_interval is None and trainer.max_steps > 0:
            trainer.val_check_interval = max(1, trainer.max_steps // 4)
        for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else []:
            options = callback.get("init_args", {})
            if callback.class_path == _CHECKPOINT and not options.monitor and options.every_n_train_steps is None:
                options.every_n_train_steps = min(_SAVE_EVERY, trainer.val_check_interval or _SAVE_EVERY)
        off = {
            "Progress": trainer.enable_progress_bar,
            _CHECKPOINT: trainer.enable_checkpointing,
            "RateMonitor": trainer.logger,
        }
        endings = tuple(ending for ending, wanted in off.items() if wanted is False)
        if isinstance(trainer.callbacks, list):
            trainer.callbacks = [part for part in trainer.callbacks if not part.class_path.endswith(endings)]

    def _parse_ckpt_path(self) -> None:
        """Check the path, and leave the command line as it is.

        Lightning would let the checkpoint's hyper-parameters silently override the configuration and the command
        line here; our modules refuse a checkpoint of another configuration instead.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in ("last", "best", "hpc") and "://" not in str(path) and not Path(path).is_file():
            raise UserError(f"ckpt_path '{path}': no such file")


def run_lightning(arguments: Sequence[str]) -> Cli:
    """Run one of Lightning's verbs.

    Args:
        arguments: the verb and its options.

    Raises:
        UserError: something the user can mend.
        SystemExit: the arguments could not be parsed (status 2, one line on stderr).
    """
    quieten()
    arguments = found(arguments)
    Parser.arguments = arguments
    try:
        return Cli(
            LightningModule,
            subclass_mode_model=True,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            args=list(arguments),
            seed_everything_default=0,
            parser_class=Parser,
            save_config_kwargs={"overwrite": True},
        )
    except (UserError, SystemExit):
        raise
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from None
    except Exception as error:
        mistake = user_error_in(error)
        if mistake is not None:
            raise mistake from None
        if "Union subtypes" in str(error):  # jsonargparse hides what a constructor raised inside its own text
            raise UserError(explain(str(error), arguments, known_classes)) from None
        raise


def _subclasses(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [found for child in children for found in (child, *_subclasses(child))]
