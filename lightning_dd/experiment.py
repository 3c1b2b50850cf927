"""A distillation as one stage of a longer experiment: run ordinary configuration files in this process.

Experiments that distil (membership inference, continual learning) take any method, parameterisation and callback this
way, because they only name the files that ``lightning-dd fit --config`` takes.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_dd.lightning_cli import run_lightning
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_text

_log = logging.getLogger(__name__)
_RECORD = "stage.json"


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


def _check_record(output: Path, configs: Sequence[Path | str], options: Sequence[str]) -> None:
    """Write what the stage is made of, or compare with what is written."""
    texts = [hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest() for path in configs]
    record = {"configs": texts, "options": list(options)}
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
