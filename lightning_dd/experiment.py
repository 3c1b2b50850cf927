"""Experiments that distil many sets, with any method: it is the files and options that ``lightning-dd fit`` takes."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lightning_dd.parsing import Verb, find_configuration, option
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """How an experiment gets its distilled sets: by configurations of a distiller, or from finished files."""

    name: str
    configs: tuple[str, ...] = ()
    """Files that ``lightning-dd fit --config`` takes, the later layered over the earlier."""
    options: tuple[str, ...] = ()
    """Further options of ``fit``, as ``--trainer.max_steps=400``."""
    files: tuple[str, ...] = ()
    """Finished distilled-set files, in place of the above."""

    @classmethod
    def parse(cls, name: str, words: str | Sequence[str], finished: bool = False) -> "Method":
        """Sort words into configuration files, options of ``fit`` (``--...``) and distilled-set files.

        Args:
            name: letters, digits, ``_`` and ``-``; folders are called so.
            words: what the user wrote.
            finished: whether distilled-set files may stand in place of configurations.

        Raises:
            UserError: the name is unusable, or the words are not files of one kind, or name no configuration.
        """
        listed = [words] if isinstance(words, str) else list(words)
        options = tuple(word for word in listed if word.startswith("--"))
        files = tuple(word for word in listed if word.endswith(".safetensors"))
        configs = tuple(word for word in listed if word not in (*options, *files))
        if bool(configs) == bool(files) or (files and (options or not finished)):
            kinds = f"configuration files with options of fit{', or distilled-set files' if finished else ''}"
            raise UserError(f"methods.{name} must be {kinds}, got {listed}")
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"methods: a name is letters, digits, _ and -, got '{name}'")
        try:
            return cls(name, tuple(str(find_configuration(path)) for path in configs), options, files)
        except UserError as error:
            raise UserError(f"methods.{name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Experiment(Verb):
    """What every experiment is told, in plain values, so that it travels to other processes."""

    methods: dict[str, list[str] | str] = option(
        "by name, configurations of a distiller (the later layered over the earlier) with options of fit; or "
        "distilled-set files, one a seed, where an experiment takes them"
    )
    output: str = option("folder of the report and of everything that is made; an interrupted experiment goes on there")
    data: str = option("class name, or class path, of the real data")
    data_args: dict[str, Any] = option("arguments of the data", dict)
    root: str | None = option("folder of the real data on this machine", None)
    accelerator: str = option(
        "Lightning's Trainer argument for distillers; students take a GPU where there is one, unless it is cpu", "auto"
    )
    workers: int | str = option("processes that train side by side; auto is one per core, or per GPU", "auto")

    takes_files: ClassVar[bool] = False
    """Whether a method may be finished distilled-set files."""

    @cached_property
    def distillers(self) -> dict[str, Method]:
        """The methods by name."""
        return {name: Method.parse(name, words, self.takes_files) for name, words in self.methods.items()}

    @property
    def source(self) -> dict[str, Any]:
        """Arguments that tell a part of the data (some rows, some classes) what it is a part of."""
        place = {} if self.root is None else {"root": self.root}
        return {"source": self.data, "source_args": dict(self.data_args), **place}


def distil_stage(
    configs: Sequence[Path | str],
    data: Mapping[str, Any],
    output: Path | str,
    overrides: Sequence[str] = (),
) -> Path:
    """Distil as ``lightning-dd fit --config ... --data ... [overrides]`` would, on the given data, into a folder.

    A finished stage is not run again, and an interrupted one continues from its last whole checkpoint, so an
    experiment of many stages can be restarted.

    Args:
        configs: configuration files of a distiller, the later layered over the earlier; their ``data`` is replaced.
        data: ``{"class_path": ..., "init_args": {...}}`` of a RealData, in plain values.
        output: folder of this stage alone, for everything that the run writes.
        overrides: further options of ``fit``, as ``--model.init_args.ipc=10``; ``--seed_everything=1`` is the seed.

    Returns:
        The distilled-set file of the last outer step.

    Raises:
        UserError: a file is missing, the folder holds a stage with other settings, or the run is impossible.
        SystemExit: the configuration could not be parsed (status 2, one line on stderr).
    """
    from lightning_dd.lightning_cli import run_lightning  # heavy, and settings are needed before
    from lightning_dd.utils.trainer import newest_checkpoint

    output, paths = Path(output), [find_configuration(str(path)) for path in configs]
    if not paths:
        raise UserError("a stage needs at least one configuration file of a distiller")
    options = [f"--data={json.dumps(dict(data))}", *overrides]
    record = json.dumps({"configs": digests(paths), "options": options}, indent=1) + "\n"
    kept = output / "stage.json"
    if not kept.is_file():
        write_text(kept, record)
    elif kept.read_text(encoding="utf-8") != record:
        raise UserError(f"'{output}' holds a distillation of other settings: name another output, or remove it")
    result = output / "last.safetensors"
    if result.is_file():
        _log.info("'%s' is there already: not distilled again", result)
        return result
    checkpoint = newest_checkpoint(output / "checkpoints")
    logger = {"class_path": "Board", "init_args": {"save_dir": str(output), "name": "", "version": ""}}
    # One process: a launcher would start the whole experiment again for every other one.
    trainer = [f"--trainer.logger={json.dumps(logger)}", "--trainer.devices=1"]
    resume = [f"--ckpt_path={checkpoint}"] if checkpoint else []
    words = ["fit", *(f"--config={path}" for path in paths), *trainer, *options, *resume]
    run_lightning(words, again="run the same command again to go on")
    if not result.is_file():
        names = ", ".join(map(str, configs))
        raise UserError(f"{names}: the run wrote no '{result}'; trainer.callbacks must hold ExportDistilledSet")
    return result


def digests(configs: Sequence[Path | str]) -> list[str]:
    """Return a hash of each configuration's text."""
    return [hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest() for path in configs]
