"""The verbs that are a stock LightningCLI: fit, validate, test, predict."""

import inspect
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lightning_dd import callbacks, data, distilled, distillers, students, synthetic
from lightning_dd.api import CALLBACKS, SAVE_EVERY, SWITCHES, TRAINER, rhythm
from lightning_dd.callbacks.interruption import Interruption
from lightning_dd.cells import closest, counted, follow_ipc
from lightning_dd.losses.metadd import MetaOptions
from lightning_dd.parsing import OneLineErrors, explain, run_name, user_error_in, with_paths
from lightning_dd.utils.arguments import class_path, find_class, subclasses
from lightning_dd.utils.errors import SEED, UserError, check_range, first_line
from lightning_dd.utils.precision import PreciseTrainer, chosen_precision
from lightning_dd.utils.processes import error_of_process
from lightning_dd.utils.silence import quieten
from lightning_dd.utils.trainer import check_checkpoint, check_length, make_trainer, whole_checkpoints

set_parsing_settings(subclasses_enabled=[MetaOptions])  # a dataclass, whose subclasses bring terms of their own
ROOMS = (callbacks, data, distilled, distillers, students, synthetic)
"""A configuration may name a class of these, and of whatever else has been imported, without its path."""
BASES: dict[str, type] = {
    "model": LightningModule,
    "data": LightningDataModule,
    "callbacks": Callback,
    "logger": Logger,
    "parameterisation": synthetic.Parameterisation,
    "labels": synthetic.Labels,
}
"""What a setting of this name must be."""


def known_classes(key: str) -> dict[str, type]:
    """Return the classes a setting accepts by bare name: this project's, and any a user has imported."""
    base: type[Any] = BASES.get(key.removesuffix("+").rpartition(".")[2], type(None))
    hidden = () if base in (Callback, Logger) else ("pytorch_lightning.", "lightning.", "torchmetrics.")
    return {cls.__name__: cls for cls in subclasses(base) if not cls.__module__.startswith(hidden)}


def defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what ``fit`` does unless a configuration says other; ``callbacks+:`` in a YAML file adds to the list."""
    always = [{"class_path": class_path(cls), "init_args": options} for cls, options in CALLBACKS.items()]
    place = {"save_dir": "runs", "name": run_name(arguments), "default_hp_metric": False}
    logger = {"class_path": "lightning_dd.utils.board.Board", "init_args": place}
    settings = {**TRAINER, "callbacks": always, "logger": logger}
    return {f"trainer.{name}": value for name, value in settings.items()}


def own_statistics(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which a mean and a deviation go with the data class they were chosen for.

    The parser keeps what is set of one class where another follows it, by ``--data`` or in another configuration.

    Args:
        arguments: of ``fit``, every configuration as ``--config=PATH``.
    """
    words, owner, chosen = list[str](), "", list[str]()
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else after
        content = yaml.safe_load(Path(value).read_text(encoding="utf-8")) if name == "--config" else {}
        data = value if name in ("--data", "--data.class_path") else (content or {}).get("data") or {}
        data = data if isinstance(data, dict) else {"class_path": data}
        kind = data.get("class_path", owner).rpartition(".")[2]
        if kind != owner and chosen:
            words += [f"--data.init_args.{statistic}=null" for statistic in chosen]
            names = " and ".join(f"data.{statistic}" for statistic in chosen)
            rank_zero_only(print)(f"{names} of {owner} left out: the data is {kind}", file=sys.stderr)
            chosen = []
        given = [*data.get("init_args", {}), name.removeprefix("--data.").removeprefix("init_args.")]
        owner, chosen = kind, [each for each in ("mean", "std") if each in (*chosen, *given)]
        words.append(word)
    return words


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, which answers a mistake with one line."""

    known_classes = staticmethod(known_classes)


class Cli(LightningCLI):
    """LightningCLI in subclass mode for model and data, with one seed for both Lightning and the model."""

    def __init__(self, arguments: Sequence[str], again: str = "") -> None:
        self.asked, self.again = arguments, again
        self.arguments = own_statistics(follow_ipc(with_paths(arguments)))
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=PreciseTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            parser_class=Parser,
            save_config_kwargs={"overwrite": True},
            args=self.arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Say the run's seed once, and what every configuration would repeat."""
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.set_defaults(defaults(self.arguments))

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from the method and the length of the run, and let ``enable_progress_bar=false`` win.

        It holds for the trainings of teachers, experts and architectures within the run too. Lightning refuses it
        beside a bar among the callbacks, and likewise ``enable_checkpointing=false`` and ``logger=false``.
        """
        settings = self.config[self.config.subcommand]
        trainer, model = settings.trainer, find_class(settings.model.class_path, LightningModule, "model")
        check_length(trainer.max_steps, trainer.val_check_interval)
        for name in ("optimizer", "lr_scheduler"):  # Lightning's own, for modules that make none
            if settings.get(name):
                raise UserError(f"{name}: every model here makes its own; set its rate by model.lr")
        if self.config.subcommand == "fit":
            self.say_cell(settings)
        if trainer.max_steps == -1 and not getattr(model, "learns", True):
            trainer.max_steps = 1  # it moves nothing: what such a method selects is selected before it
        listed = trainer.callbacks if isinstance(trainer.callbacks, list) else []
        if trainer.max_steps > 0:
            for name, value in rhythm(trainer.max_steps).items():
                trainer[name] = value if trainer[name] is None else trainer[name]
        for callback in listed:
            options = callback.get("init_args", {})
            if _name(callback) == "ModelCheckpoint" and not options.monitor and options.every_n_train_steps is None:
                options.every_n_train_steps = min(SAVE_EVERY, trainer.val_check_interval or SAVE_EVERY)
        left_out = {kind.__name__ for name, kind in SWITCHES.items() if trainer[name] is False}
        if listed:
            trainer.callbacks = [callback for callback in listed if _name(callback) not in left_out]

    @rank_zero_only
    def say_cell(self, settings: Any) -> None:
        """Print which published cell this run is, or is nearest to, and what differs; nothing where there is none."""
        model, data = (settings[room].class_path.rpartition(".")[2] for room in ("model", "data"))
        text = closest(
            model,
            data,
            settings.model.init_args.get("ipc", 1),
            _counted(settings),
            lambda cell: _counted(self.parser.parse_args(["fit", *cell.arguments()]).fit),
        )
        if text:
            print(text, flush=True)

    def how_to_go_on(self, checkpoint: Path) -> str:
        """Return the words that say how a run which was told to stop continues from its checkpoint."""
        words = list(self.asked)
        for place in reversed([place for place, word in enumerate(words) if word.startswith("--ckpt_path")]):
            del words[place : place + (1 if "=" in words[place] else 2)]
        return self.again or f"continue with: {shlex.join(['lightning-dd', *words, f'--ckpt_path={checkpoint}'])}"

    @rank_zero_only
    def after_fit(self) -> None:
        """Say where the result is, and the command that comes next."""
        exports = [item for item in self.trainer.callbacks if isinstance(item, callbacks.ExportDistilledSet)]  # type: ignore[attr-defined]
        if not isinstance(self.model, distillers.Distiller) or not exports or not hasattr(exports[-1], "folder"):
            return  # a student, or nothing was fitted
        if self.again:
            return  # a stage of an experiment, which goes on by itself
        folder, best = exports[-1].folder, exports[-1].best
        if best is not None and (folder / "best.safetensors").is_file():  # or the run that it continues wrote it
            print(f"best set, {exports[-1].monitor} {best:.3f}: {folder / 'best.safetensors'}")
        last = folder / "last.safetensors"
        size = last.stat().st_size / 2**20
        print(f"last set, outer step {self.trainer.global_step}: {last} ({size:.2f} MB; see lightning-dd info)")
        chosen = f"{shlex.quote(self.model.student_architecture)} unseen-small"
        report = shlex.quote(str(folder / "report"))
        print(f"next: lightning-dd evaluate {shlex.quote(str(folder))} --architectures {chosen} --output {report}")

    def _parse_ckpt_path(self) -> None:
        """Check the path, and leave the command line as it is.

        Lightning would let the checkpoint's hyper-parameters silently override the configuration and the command
        line here; our modules refuse a checkpoint of another configuration instead.
        """
        check_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))

    def _set_seed(self) -> None:
        """Seed Python, numpy and torch, as far as numpy's range goes."""
        seed = self.config[self.config.subcommand].get("seed_everything")
        check_range(SEED, seed_everything=None if isinstance(seed, bool) else seed)
        super()._set_seed()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Say what Lightning refuses in one line; write checkpoints whole, and end in order when told to stop."""
        config["plugins"] = whole_checkpoints(config.get("plugins"))
        kept = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        if self.config.subcommand == "fit" and any(isinstance(callback, ModelCheckpoint) for callback in kept):
            callbacks = [*callbacks, Interruption(self.how_to_go_on)]
        settings = self.config[self.config.subcommand]
        config["precision"] = chosen_precision(
            config, self.model, self.datamodule, [*kept, *callbacks], settings.get("ckpt_path")
        )
        settings.trainer.precision = config["precision"]  # the saved configuration says what was chosen
        return make_trainer(super()._instantiate_trainer, config=config, callbacks=callbacks)


def help_on_classes(arguments: Sequence[str]) -> str | None:
    """Return the classes that a setting accepts, a line each, where ``--model.help`` names none of them."""
    for word, after in zip(arguments, [*arguments[1:], "--"], strict=True):
        setting = word.removeprefix("--").removesuffix(".help")
        if word.startswith("--") and word.endswith(".help") and after.startswith("-") and known_classes(setting):
            found = sorted(known_classes(setting).items())
            lines = [f"  {name:<22} {(inspect.getdoc(cls) or '').partition(chr(10))[0]}" for name, cls in found]
            return "\n".join([f"{word} NAME lists the options of one of:", *lines])
    return None


def run_lightning(arguments: Sequence[str], again: str = "") -> Cli:
    """Run one of Lightning's verbs, with its options.

    Args:
        arguments: as on the command line.
        again: how a fit that was told to stop is continued, in words, where it is not by its own command.

    Raises:
        UserError: something the user can mend.
        SystemExit: the arguments could not be parsed (status 2, one line on stderr) or asked for help (status 0), or a
            fit was told to stop (130 after Ctrl-C, 143 after SIGTERM).
    """
    quieten()
    if text := help_on_classes(arguments):
        print(text)
        sys.exit(0)
    try:
        return Cli(arguments, again)
    except (UserError, SystemExit):
        raise
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from None
    except Exception as error:
        mistake = error_of_process(error) or user_error_in(error)
        if mistake is not None:
            raise mistake from None
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            raise UserError(f"out of memory: {first_line(error)}; lower ipc or the batch size") from error
        if "Union subtypes" in str(error):  # jsonargparse hides what a constructor raised inside its own text
            raise UserError(explain(str(error), known_classes)) from None
        raise


def _name(callback: Any) -> str:
    name: str = callback.class_path.rpartition(".")[2]
    return name


def _counted(settings: Any) -> dict[str, Any]:
    """Return the counted settings of a parsed command, what its callbacks do to the images and the pool among them."""
    own = (callbacks.OuterTerm, callbacks.PoolAlternation)
    listed = settings.trainer.callbacks if isinstance(settings.trainer.callbacks, list) else []
    found = [(callback, find_class(callback.class_path, Callback, "callback")) for callback in listed]
    added = {f"trainer.callbacks {kind.__name__}": "added" for _, kind in found if issubclass(kind, own)}
    return counted(dict(settings.items())) | added
