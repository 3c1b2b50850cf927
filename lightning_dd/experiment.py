"""A distillation as one stage of a longer experiment: ordinary configuration files, run in this process.

Experiments that distil (membership inference, continual learning) take any method, parameterisation and callback this
way, because they only name the files that ``lightning-dd fit --config`` takes.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dd.lightning_cli import run_lightning
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_text

_log = logging.getLogger(__name__)
_RECORD = "stage.json"


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


def parse_methods(methods: Mapping[str, str | Sequence[str]], finished: bool = False) -> dict[str, Method]:
    """Sort every method's words into configuration files, options of ``fit`` (``--...``) and distilled-set files.

    Args:
        methods: words by name.
        finished: whether distilled-set files may stand in place of configurations.

    Raises:
        UserError: a name is unusable, or a method's words are not files of one kind that exist.

    Example:
        >>> parse_methods({"ready": "set.safetensors"}, finished=True)["ready"].files
        ('set.safetensors',)
    """
    found = {}
    for name, words in methods.items():
        listed = [words] if isinstance(words, str) else list(words)
        options = tuple(word for word in listed if word.startswith("--"))
        files = tuple(word for word in listed if word.endswith(".safetensors"))
        configs = tuple(word for word in listed if word not in (*options, *files))
        if bool(configs) == bool(files) or (files and (options or not finished)):
            kinds = f"configuration files with options of fit{', or distilled-set files' if finished else ''}"
            raise UserError(f"methods.{name} must be {kinds}, got {listed}")
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"methods: a name is letters, digits, _ and -, got '{name}'")
        for path in configs:
            if not Path(path).is_file():
                raise UserError(f"methods.{name}: configuration '{path}': no such file")
        found[name] = Method(name, configs, options, files)
    return found


def distil(
    configs: Sequence[Path | str],
    data: Mapping[str, Any],
    output: Path | str,
    overrides: Sequence[str] = (),
) -> Path:
    """Distil as ``lightning-dd fit --config ... --data ... [overrides]`` would, on the given data, into a folder.

    The run's logger, checkpoints, pictures and distilled sets go to ``output``. A finished stage is not run again,
    and an interrupted one continues from its last checkpoint, so an experiment of many stages can be restarted.

    Args:
        configs: configuration files of a distiller, the later layered over the earlier; their ``data`` is replaced.
        data: ``{"class_path": ..., "init_args": {...}}`` of a RealData, in plain values.
        output: folder of this stage alone.
        overrides: further options of ``fit``, as ``--model.init_args.ipc=10``; ``--seed_everything=1`` is the seed.

    Returns:
        The distilled-set file of the last outer step.

    Raises:
        UserError: a file is missing, the folder holds a stage with other settings, or the run is impossible.
        SystemExit: the configuration could not be parsed (status 2, one line on stderr).
    """
    output = Path(output)
    if not configs:
        raise UserError("a stage needs at least one configuration file of a distiller")
    for path in configs:
        if not Path(path).is_file():
            raise UserError(f"configuration '{path}': no such file")
    options = [f"--data={json.dumps(dict(data))}", *overrides]
    _check_record(output, configs, options)
    result = output / "last.safetensors"
    if result.is_file():
        _log.info("'%s' is there already: not distilled again", result)
        return result
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(output), "name": "", "version": ""}}
    arguments = ["fit"]
    for path in configs:
        arguments.append(f"--config={path}")
    # One process: a launcher would start the whole experiment again for every other one.
    arguments += [f"--trainer.logger={json.dumps(logger)}", "--trainer.devices=1", *options]
    checkpoint = output / "checkpoints" / "last.ckpt"
    if checkpoint.is_file():
        arguments.append(f"--ckpt_path={checkpoint}")
    run_lightning(arguments)
    if not result.is_file():
        names = ", ".join(map(str, configs))
        raise UserError(f"{names}: the run wrote no '{result}'; trainer.callbacks must hold ExportDistilledSet")
    return result


def digests(configs: Sequence[Path | str]) -> list[str]:
    """Return a hash of each configuration's text."""
    return [hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest() for path in configs]


def _check_record(output: Path, configs: Sequence[Path | str], options: Sequence[str]) -> None:
    """Write what the stage is made of, or compare with what is written."""
    record = {"configs": digests(configs), "options": list(options)}
    path = output / _RECORD
    if not path.is_file():
        write_text(path, json.dumps(record, indent=1) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found != record:
        raise UserError(f"'{output}' holds a distillation of other settings: name another output, or remove it")
