"""Kill commands by SIGKILL at random places, continue them, and compare with the run never killed, bit for bit.

    python benchmarks/kills.py --kills 20 --record benchmarks/results/kills.json
    python benchmarks/kills.py FRePo evaluate      # methods and verbs by name

Every run is a process forked from one that has imported everything, in a folder and with a cache of its own. The first
kill of each falls before the first checkpoint or result is opened for writing, the second before it is moved to its
place; of the others half fall before a random operation on files, half after a random time on the CPU. A place follows
from the seed and the kill's number. A fit goes on from its last checkpoint, or begins anew where there is none; every
other verb is run again. Whatever a killed run has left under a name of its own must be whole. The exit status is 1 if
anything differs, and the folder is kept.
"""

import argparse
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import write_record
from forked import rows_of
from fuzz import Blobs, content, write_files
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_dd import cli, lightning_cli  # noqa: F401  (imported once for all)
from lightning_dd.data import DATA_SETS, RawSplit
from lightning_dd.distilled.header import HEADER
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.evaluators import evaluate  # noqa: F401
from lightning_dd.utils.files import load_torch
from lightning_dd.utils.silence import quieten


class FourBlobs(Blobs):
    """Four classes of twelve 4 x 4 images."""

    def read(self, *, train: bool) -> RawSplit:
        """Make them."""
        images = super().read(train=train).images
        more = images[:36:3].flip(2)  # the bright row of the first class, at the other end
        labels = torch.cat([torch.arange(36) % 3, torch.full((12,), 3)])
        return RawSplit(torch.cat([images, more]), labels, tuple("abcd"))


DATA_SETS[FourBlobs.__name__] = FourBlobs
_COUNTERS = ("callbacks", "loops")
"""Left out: paths, and Lightning's own counts of validations."""
_NETWORK = "convnet:width=2,depth=1"
_TWO = [_NETWORK, "convnet:width=4,depth=1"]
_FIT = (
    *("fit", "--data=Blobs", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--trainer.max_steps=6", "--trainer.val_check_interval=2"),
)
_SQUEEZED = ("--model.teacher.architecture=convnet:width=2,depth=1,norm=batch", "--model.teacher.steps=60")
_CLASS = "--model.real_per_class=4"
_STUDENTS = (f"--architectures={_NETWORK}", "--accelerator=cpu")
_DM = f"{{model: {{class_path: DM, init_args: {{architecture: '{_NETWORK}', real_per_class: 4}}}}, data: Blobs}}"
_METHODS = json.dumps({"dm": ["INPUTS/dm.yaml", *_FIT[2:], "--model.probe.steps=1"]})
_APPLICATION = (f"--methods={_METHODS}", "--data=FourBlobs", "--output=out", "--accelerator=cpu")


def _fit(method: str, *more: str) -> tuple[str, ...]:
    return (*_FIT, f"--model={method}", f"--model.architecture={_NETWORK}", "--model.probe.steps=1", *more)


CASES: dict[str, tuple[str, ...]] = {
    "FRePo": _fit("FRePo", "--model.real_batch_size=8", "--model.pool_size=2", "--model.lifetime=3"),
    "FRePo, MetaDD": _fit(
        *("FRePo", "--model.real_batch_size=8", "--model.pool_size=2", "--trainer.callbacks+=MetaDD"),
        *(f"--trainer.callbacks.architectures={json.dumps(_TWO)}", "--trainer.callbacks.training.steps=60"),
        *("--trainer.callbacks.loss.grid=4", "--trainer.callbacks.scale=steady"),
    ),
    "DM": _fit("DM", _CLASS),
    "DC": _fit("DC", _CLASS, "--model.ipc=2", "--model.inner_steps=2", "--model.lifetime=3"),
    "DSA": _fit("DSA", _CLASS, "--model.ipc=2", "--model.inner_steps=2", "--model.lifetime=3"),
    "MTT": _fit(
        *("MTT", "--model.experts=2", "--model.trajectory_epochs=2", "--model.expert_epochs=1"),
        *("--model.max_start_epoch=2", "--model.syn_steps=2"),
    ),
    "SRe2L": _fit("SRe2L", *_SQUEEZED, "--model.labels=TeacherLabels", "--model.labels.epochs=2"),
    "GLaD": _fit(
        *("DM", _CLASS, "--model.parameterisation=Latents"),
        *("--model.parameterisation.width=2", "--model.parameterisation.steps=20"),
    ),
    "RDED": _fit("RDED", *_SQUEEZED, "--model.candidates=6", "--model.crops=2", "--model.labels=hard"),
    "evaluate": ("evaluate", "INPUTS/standardised.safetensors", *_STUDENTS, "--output=out", "--steps=3", "--seeds=3"),
    "scores": (
        *("scores", "INPUTS/standardised.safetensors", *_STUDENTS, "--output=out", "--steps=3", "--seeds=1"),
        "--full_steps=3",
    ),
    "continual": (
        *("continual", *_APPLICATION, f"--architectures={_NETWORK}", "--steps=2", "--orders=1", "--ipc=1"),
        *("--student_steps=2", "--joint_steps=2"),
    ),
    "membership": (
        *("membership", *_APPLICATION, "--members=18", "--lengths=[2]", "--victims=1", "--attacks=[threshold]"),
        f"--architecture={_NETWORK}",
    ),
    "export": ("export", "INPUTS/dm.ckpt", "--output=out/set.safetensors", "--picture=out/set.png"),
    "convert": (
        *("convert", "--layout=frepo", "--images=INPUTS/frepo.npz", "--data=Blobs", "--preprocessing=standardise"),
        "--output=out/set.safetensors",
    ),
}
"""Commands by name; INPUTS is a folder of files made beforehand."""


class Place(NamedTuple):
    """Where a run is killed: before an operation on files, or after some time on the CPU; nowhere without either."""

    operation: int | None = None
    seconds: float | None = None


class Straight(NamedTuple):
    """A run never killed."""

    seconds: float
    """On the CPU."""
    operations: list[str]
    """On files, in order: what, and the name."""
    result: Any


def operation(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Return what an event of the interpreter does to a file and the file's name, if it changes one."""
    if event == "open":
        mode = arguments[1] or ""
        writes = any(letter in mode for letter in "wax+") or (not mode and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return f"open {arguments[0]}" if writes else None
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return f"{event.removeprefix('os.')} {arguments[1 if event == 'os.rename' else 0]}"
    return None


def run(command: Sequence[str], folder: Path, place: Place = Place()) -> int:  # noqa: B008  (never changed)
    """Run a command in a forked process, which is killed at a place, and return how it ended, as a shell says it."""
    child = os.fork()
    if child == 0:
        _become(command, folder, place)
    if place.seconds is not None:
        clock = (~child << 3) | 2  # that of the process's time on the CPU, as clock_getcpuclockid returns it
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.clock_gettime(clock) >= place.seconds:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.001)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(command: Sequence[str], folder: Path, place: Place) -> None:
    """Be the process that runs the command."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        told = operation(event, arguments)
        if told is not None:
            if len(seen) == place.operation:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(told)

    status = 70
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        os.environ["LIGHTNING_DD_CACHE"] = str(folder / "cache")
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.addaudithook(hook)
        status = cli.main(list(command))
        sys.stdout.flush()
        kept, place = list(seen), Place()
        Path("operations.pickle").write_bytes(pickle.dumps(kept))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        os._exit(status)


def plain(value: Any) -> Any:
    """Return nested values in which tensors are bytes, so that they can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_set(path: Path) -> Any:
    """Return what a file of safetensors holds: a set, or tensors of another kind."""
    with safe_open(path, framework="pt") as file:
        is_set = HEADER in (file.metadata() or {})
    return content(DistilledSet.load(path)) if is_set else plain(load_file(path))


def result(folder: Path) -> Any:
    """Return what a finished command has made: sets, what a run's checkpoint needs to go on, and a report's rows."""
    made: dict[str, Any] = {}
    # In order, for what a continued run does not write again, its best set, is that of the run before.
    runs = sorted(folder.glob("runs/*/*"), key=lambda path: int(path.name.rpartition("_")[2]))
    found = [(folder, path) for path in folder.glob("out/**/*")]
    found += [(run, path) for run in runs for path in run.rglob("*")]
    for base, path in found:
        name = path.relative_to(base).as_posix()
        if path.name.startswith("."):  # begun and never moved to its place: nobody's result
            continue
        if path.suffix == ".safetensors":
            made[name] = read_set(path)
        elif path.name == "last.ckpt" and base != folder:  # of a stage that is whole, nobody goes on
            made[name] = plain({key: value for key, value in load_torch(path, "").items() if key not in _COUNTERS})
        elif path.name == "results.json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            made[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        elif path.name == "set.png":
            made[name] = path.read_bytes()
    return made


def halves(folder: Path) -> list[str]:
    """Return the files that are there in part, but for hidden ones."""
    found = []
    for path in folder.rglob("*"):
        try:
            if path.name.startswith("."):
                continue
            if path.suffix == ".safetensors":
                read_set(path)
            elif path.suffix == ".ckpt":
                load_torch(path, "checkpoint")
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def again(command: Sequence[str], folder: Path) -> list[str]:
    """Return the command that continues a killed one."""
    last = sorted(folder.glob("runs/**/last.ckpt"), key=lambda path: path.stat().st_mtime)
    return [*command, *([f"--ckpt_path={last[-1]}"] if last and command[0] == "fit" else [])]


def place_of(number: int, straight: Straight, draw: random.Random) -> Place:
    """Return the place of a kill."""
    if number < 2:
        end = (".ckpt", ".safetensors", ".json")
        wanted = ("open", "rename")[number]
        first = [n for n, told in enumerate(straight.operations) if told.startswith(wanted) and told.endswith(end)]
        outside = [n for n in first if "/cache/" not in straight.operations[n]]
        return Place(operation=outside[0])
    if number % 2:
        return Place(operation=draw.randrange(len(straight.operations)))
    return Place(seconds=draw.uniform(0, straight.seconds))


def straight_run(command: Sequence[str], folder: Path) -> Straight:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run(command, folder):
        raise RuntimeError(f"{' '.join(command)}: {(folder / 'said.txt').read_text()}")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = spent.ru_utime + spent.ru_stime - begun.ru_utime - begun.ru_stime
    return Straight(seconds, pickle.loads((folder / "operations.pickle").read_bytes()), result(folder))


def try_case(name: str, kills: int, seed: int, inputs: Path, folder: Path) -> dict[str, Any]:
    """Kill and continue a command many times, and return the row of counts."""
    command = [word.replace("INPUTS", str(inputs)) for word in CASES[name]]
    straight = straight_run(command, folder / "straight")
    row: dict[str, Any] = {
        "command": name,
        "killed": 0,
        "from a checkpoint": 0,
        "equal": 0,
        "half-written": 0,
        "different": 0,
    }
    for number in range(kills):
        own = folder / f"{number}"
        place = place_of(number, straight, random.Random(f"{seed}/{name}/{number}"))
        row["killed"] += run(command, own, place) == -signal.SIGKILL
        broken, continued = halves(own), again(command, own)
        row["from a checkpoint"] += len(continued) > len(command)
        row["half-written"] += bool(broken)
        ended = run(continued, own)
        same = not ended and result(own) == straight.result
        row["equal" if same else "different"] += 1
        if same and not broken:
            shutil.rmtree(own)
        else:
            kept = Path(tempfile.mkdtemp(prefix="killed-"))
            shutil.copytree(own, kept / "run")
            print(f"{name}, kill {number} at {place}: status {ended}, {broken}, see {kept}", file=sys.stderr)
    return row | {"seconds of a CPU unkilled": round(straight.seconds, 1)}


def wrong(row: dict[str, Any]) -> bool:
    """Say whether a kill has cost anything."""
    return bool(row["different"] or row["half-written"])


def main() -> int:
    """Kill, continue, compare, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--kills", type=int, default=4, help="of each")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", help="file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten()
    for module in ("listing", "applications.continual", "applications.membership", "distilled.export"):
        importlib.import_module(f"lightning_dd.{module}")
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        write_files(inputs)
        (inputs / "dm.yaml").write_text(_DM, encoding="utf-8")
        cases = options.names or list(CASES)

        def work(case: str) -> list[dict[str, Any]]:
            return [try_case(case, options.kills, options.seed, inputs, Path(name) / case.replace(", ", "-"))]

        rows = rows_of(cases, options.jobs, work, lambda row: "WRONG" if wrong(row) else "whole")
    write_record(options.record, kills=rows)
    return int(any(map(wrong, rows)))


if __name__ == "__main__":
    sys.exit(main())
