"""Running a distilled set's own run again, and comparing what comes out."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from lightning_dd.data.cache import recall
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.lightning_cli import run_lightning
from lightning_dd.utils.arguments import nothing_imported
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_text

_FOLDER = "runs/reproduced/version_"


def run_of(distilled: DistilledSet) -> dict[str, Any]:
    """Return the configuration of a set's run, as ``lightning-dd fit --config`` takes it.

    Raises:
        UserError: the file does not say it.
    """
    if not {"model", "data", "trainer"} <= set(distilled.run) or not isinstance(distilled.run["data"], dict):
        raise UserError("the set does not say how it was made: it is older, converted, or was not made by a run")
    return distilled.run


def reproduce(
    file: str, output: str | None = None, root: str | None = None, accelerator: str = "auto", trust: bool = False
) -> str:
    """Run a set's run again and say, in lines, how the new set differs.

    Args:
        file: a distilled-set file, or a run's folder.
        output: a new folder for the new run; ``None`` takes the next ``version_N`` in ``runs/reproduced``.
        root: folder of the real data on this machine, where it is one's own.
        accelerator: Lightning's Trainer argument; equal bits are to be hoped for on the same kind of device.
        trust: let the file name classes that are not of this project, which are imported and run.

    Raises:
        UserError: the file does not say its run, names foreign classes, or the run cannot be made here.
    """
    distilled = DistilledSet.load(file)
    run = run_of(distilled)
    if not trust and (foreign := next(_foreign(run), None)):
        raise UserError(f"the set's run names '{foreign}', which is none of this project's: --trust true runs it")
    output = output or next(folder for count in itertools.count() if not Path(folder := f"{_FOLDER}{count}").exists())
    if (Path(output) / "last.safetensors").exists():
        raise UserError(f"output '{output}' holds a run already: name another folder")
    config = {**run, "trainer": {**run["trainer"], "accelerator": accelerator, "logger": _logger(output)}}
    data, note = run["data"], recall(str(distilled.data.get("fingerprint"))) or {"init_args": {}}
    place = {"root": root or note["init_args"].get("root")}
    if place["root"] is not None:
        config["data"] = {**data, "init_args": {**data["init_args"], **place}}
    written = write_text(Path(output) / "run.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    with nullcontext() if trust else nothing_imported():
        run_lightning(["fit", f"--config={written}"])
    files = [Path(output) / f"{name}.safetensors" for name in ("last", "best")]
    again = [DistilledSet.load(path) for path in files if path.is_file()]
    step = distilled.training.get("outer_step")
    same = [new for new in again if new.training.get("outer_step") == step]
    if not same:
        raise UserError(f"the new run wrote no set at outer step {step}: compare '{output}' yourself")
    return "\n".join(differences(distilled, same[0]))


def differences(old: DistilledSet, new: DistilledSet) -> Iterator[str]:
    """Yield one line for each thing that is to be compared between a set and the one made anew."""
    for name in ("images", "labels"):
        ours, theirs = getattr(new, name), getattr(old, name)
        if ours.shape != theirs.shape:
            yield f"{name}: of another shape, {tuple(ours.shape)} and not {tuple(theirs.shape)}"
        elif ours.equal(theirs):
            yield f"{name}: equal, bit for bit"
        else:
            gap, spread = float((ours - theirs).abs().max()), float(theirs.std())
            yield f"{name}: differ by up to {gap:.3g}, with a standard deviation of {spread:.3g}"
    if old.data.get("fingerprint") != new.data.get("fingerprint"):
        yield "data: other training images than the set was made from"
    for name, value in old.training.items():
        if isinstance(value, float):
            yield f"{name}: {value:.4g} there, {new.training.get(name, float('nan')):.4g} here"
    here, there = library_versions(), old.training.get("versions", {})
    changed = [name for name in there if here.get(name) != there[name]]
    if changed:
        yield "versions: " + "; ".join(f"{name} {there[name]} there, {here.get(name)} here" for name in changed)
    if "relabelled" in old.training:
        yield "labels were given after the run: see lightning-dd relabel"


def _logger(output: str) -> dict[str, Any]:
    place = {"save_dir": output, "name": "", "version": "", "default_hp_metric": False}
    return {"class_path": "Board", "init_args": place}


def _foreign(settings: Any) -> Iterator[str]:
    """Yield the class paths in settings that are not of this project."""
    if isinstance(settings, dict):
        path = settings.get("class_path")
        if isinstance(path, str) and not path.startswith("lightning_dd."):
            yield path
        for value in settings.values():
            yield from _foreign(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _foreign(value)
