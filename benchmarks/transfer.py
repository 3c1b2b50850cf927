"""What makes a distilled set hold up on architectures it never saw: trials of a plan, with paired seeds.

    python benchmarks/transfer.py benchmarks/transfer/metadd.yaml --output runs/transfer --workers 4
    python benchmarks/transfer.py benchmarks/transfer/metadd.yaml --output runs/transfer --record

A plan names bases (a distiller with its data), settings (what is changed of a base: the distiller, MetaDD, the labels
of the finished set; a base may say more of one) and stages: which bases with which settings, seeds, students and split.
A seed fixes initial images, networks and students of every setting, so that settings are compared with their base in
pairs. Stages that choose look at the validation split and at architectures that nothing else uses; the test split is
for what was chosen.

A trial is distilled once, and every student on it is a job of its own. What is finished is kept in the output folder: a
run that is broken off goes on there, and a trial that fails is kept with its error. ``--record`` writes the rows there
are to ``benchmarks/results/transfer_<plan>.json`` and trains nothing.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from environment import environment
from filelock import FileLock
from plans import merged, read_plan
from pytorch_lightning import Callback, Trainer

import lightning_dd.distillers
from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.data import DATA_SETS, ParquetImages, RealData
from lightning_dd.data.sampling import answers
from lightning_dd.distilled import DistilledSet
from lightning_dd.distilled.card import label_bytes
from lightning_dd.distillers import Distiller
from lightning_dd.jobs import Job, Ledger, device_of, run_jobs
from lightning_dd.losses.metadd import MetaOptions
from lightning_dd.models import build_network
from lightning_dd.pretrained import ClassifierRecipe
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.synthetic import Labels
from lightning_dd.synthetic.labels import relabel
from lightning_dd.utils.arguments import revive
from lightning_dd.utils.files import write_text
from lightning_dd.utils.seeding import derive_seed
from lightning_dd.utils.silence import quieten

RESULTS = Path(__file__).parent / "results"
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
}


@dataclass(frozen=True)
class Trial:
    """One distilled set, in plain values: all that it depends on."""

    base: str
    setting: str
    seed: int
    data: dict[str, Any]
    distiller: dict[str, Any]
    outer_steps: int
    alternation: dict[str, Any] = field(default_factory=dict)
    metadd: dict[str, Any] | None = None
    silent: bool = False
    """Leave the method's own loss out: the control that shows what MetaDD's terms do alone."""
    labels: dict[str, Any] | None = None
    """Relabel the finished set."""


@dataclass(frozen=True)
class Task:
    """A trial to distil, or a student to train on it."""

    trial: Trial
    output: str
    architecture: str | None = None
    steps: int = 0
    split: str = "val"
    batch_size: int = 500


def work(task: Task, tick: Callable[[], object]) -> dict[str, Any]:
    """Distil a trial, or train and test a student on it, on a GPU in TF32; what fails is recorded with its error."""
    quieten()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    start = time.perf_counter()
    try:
        path, facts = distilled(task.trial, Path(task.output))
        if task.architecture is not None:
            facts = {"accuracy": score(task, DistilledSet.load(path))}
    except Exception as error:  # of any kind: the other trials go on
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    return {**facts, "seconds": round(time.perf_counter() - start, 1)}


def distilled(trial: Trial, output: Path) -> tuple[Path, dict[str, Any]]:
    """Return a trial's file and what distilling took; whoever comes first distils it."""
    path = Ledger(output / "sets").path(identity(trial)).with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        facts = path.with_suffix(".txt")
        if not facts.is_file():
            made, took = distil(trial) if trial.labels is None else relabelled(trial, output)
            made.save(path)
            took |= {"image_bytes": made.image_bytes, "label_bytes": label_bytes(made)}
            facts.write_text(json.dumps(took), encoding="utf-8")
        return path, json.loads(facts.read_text(encoding="utf-8"))


def relabelled(trial: Trial, output: Path) -> tuple[DistilledSet, dict[str, Any]]:
    """Give a trial's set, which is distilled but once, other labels."""
    path, took = distilled(replace(trial, labels=None), output)
    strategy, data = revive(trial.labels), real_data(json.dumps(trial.data))
    assert isinstance(strategy, Labels)
    return relabel(DistilledSet.load(path), strategy, data, trial.distiller["architecture"], trial.seed), took


def distil(trial: Trial) -> tuple[DistilledSet, dict[str, Any]]:
    """Distil once, and return the set and what it took."""
    data = real_data(json.dumps(trial.data))
    arguments = dict(trial.distiller)
    cls = getattr(lightning_dd.distillers, arguments.pop("class"))
    distiller: Distiller = (silenced(cls) if trial.silent else cls)(**arguments, seed=trial.seed)
    callbacks = [PoolAlternation(**trial.alternation), *([] if trial.metadd is None else [metadd(trial.metadd)])]
    start = time.perf_counter()
    trainer(trial.outer_steps, callbacks).fit(distiller, datamodule=data)
    return distiller.distilled_set(), {"fit_seconds": round(time.perf_counter() - start, 1)}


def trainer(outer_steps: int, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Return a quiet Trainer on the device of this process."""
    where = device_of("auto")
    place: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if where.type == "cuda":
        place = {"accelerator": "gpu", "devices": [where.index]}
    return Trainer(max_steps=outer_steps, callbacks=list(callbacks), **place, **QUIET)


def silenced(cls: type[Distiller]) -> type[Distiller]:
    """Return a distiller without a loss of its own."""

    class Silent(cls):  # type: ignore[misc, valid-type]
        def outer_terms(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"none": 0 * images.sum()}

    return Silent


def metadd(settings: Mapping[str, Any], cls: type[MetaDD] = MetaDD) -> MetaDD:
    """Build the callback of a plan."""
    loss, training = MetaOptions(**settings.get("loss", {})), ClassifierRecipe(**settings.get("training", {}))
    return cls(**{**settings, "loss": loss, "training": training})


def score(task: Task, distilled_set: DistilledSet) -> float:
    """Train a student of a trial and return its accuracy on the split."""
    data, trial = real_data(json.dumps(task.trial.data)), task.trial
    assert task.architecture is not None
    device = device_of("auto")
    seed = derive_seed(trial.seed, "student")
    network = build_network(task.architecture, distilled_set.num_classes, distilled_set.image_shape, seed).to(device)
    train_student(network, distilled_set, Recipe(steps=task.steps, lr=1e-3, batch_size=task.batch_size), seed)
    real = data.test if task.split == "test" else data.val
    assert real is not None
    hits = answers(network, real, device).argmax(1) == real.labels.cpu()
    return float(hits.float().mean())


@cache
def real_data(spec: str) -> RealData:
    """Build the data of a trial once in a process: ``class`` and its arguments."""
    arguments = {name: value for name, value in json.loads(spec).items() if value is not None}
    known: dict[str, Any] = {**DATA_SETS, "ParquetImages": ParquetImages}
    data: RealData = known[arguments.pop("class")](**arguments)
    data.trainer = trainer(1)  # the pixels go to its device
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def identity(trial: Trial) -> dict[str, Any]:
    """Return what a distilled set depends on: all but its name."""
    return {name: value for name, value in asdict(trial).items() if name not in ("base", "setting")}


def trials(plan: dict[str, Any], stage: dict[str, Any]) -> Iterator[tuple[Trial, list[str]]]:
    """List the trials of a stage, each with the architectures of its students."""
    first, _, last = str(stage["seeds"]).partition("-")
    for seed in range(int(first), int(last or first) + 1):
        for setting in stage["settings"]:
            for base in stage["bases"]:
                spec = dict(plan["bases"][base])
                own_form = spec.pop("settings", {}).get(setting, {})
                for change in (plan["settings"][setting], own_form, stage.get("changes", {})):
                    spec = merged(spec, change)
                own = spec.pop("own")
                if "metadd" in spec:
                    spec["metadd"] = merged(plan["metadd"], spec["metadd"])
                names = [own if name == "own" else name for name in stage["students"]]
                yield Trial(base, setting, seed, data={**plan["data"], **spec.pop("data", {})}, **spec), names


def jobs(plan: dict[str, Any], output: Path) -> list[Job]:
    """List all jobs; the cost is the place, so that they are taken in the plan's order."""
    found: list[tuple[str, Task]] = []
    for stage in plan["stages"]:
        listed = list(trials(plan, stage))
        found += [(f"{trial.base} {trial.setting} {trial.seed}", Task(trial, str(output))) for trial, _ in listed]
        for steps in stage["steps"]:
            for trial, names in listed:
                name = f"{trial.base} {trial.setting} {trial.seed} {steps}"
                how = (steps, stage["split"], stage.get("batch_size", 500))
                found += [(f"{name} {own}", Task(trial, str(output), own, *how)) for own in names]
    made = []
    for place, (name, task) in enumerate(found):
        rest: dict[str, Any] = {"architecture": task.architecture, "steps": task.steps, "split": task.split}
        if task.batch_size != 500:  # what is not said in older ledgers
            rest["batch_size"] = task.batch_size
        made.append(Job(name, {"trial": identity(task.trial), **rest}, task, len(found) - place))
    return made


def rows(plan: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Return what is in the ledger, in the plan's order."""
    ledger, found = Ledger(output / "rows"), []
    for job in jobs(plan, output):
        record, task = ledger.read(job.identity), job.task
        if record is None:
            continue
        name = {"base": task.trial.base, "setting": task.trial.setting, "seed": task.trial.seed}
        student = {"architecture": task.architecture, "steps": task.steps, "split": task.split}
        found.append(name | (student if task.architecture else {}) | record)
    return found


def main() -> None:
    """Run what is missing, or record what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write the rows there are, and train nothing")
    options = parser.parse_args()
    plan = read_plan(options.plan)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.record:
        made_with = options.output / f"{options.plan.stem}.json"
        write_text(made_with, json.dumps(environment()) + "\n")
        run_jobs(jobs(plan, options.output), work, Ledger(options.output / "rows"), options.workers)
    made = json.loads((options.output / f"{options.plan.stem}.json").read_text(encoding="utf-8"))
    record = {"made_with": made, "transfer": rows(plan, options.output)}
    lines = ",\n".join(json.dumps(row) for row in record["transfer"])
    text = f'{{"made_with": {json.dumps(made)},\n"transfer": [\n{lines}\n]}}\n'
    write_text(RESULTS / f"transfer_{options.plan.stem}.json", text)


if __name__ == "__main__":
    main()
