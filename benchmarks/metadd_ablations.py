"""MetaDD against its base with paired seeds: accuracy on architectures that neither ever saw.

    python benchmarks/metadd_ablations.py benchmarks/ablations/frepo_mnist5k_ipc1.yaml
    python benchmarks/metadd_ablations.py benchmarks/ablations/frepo_mnist5k_ipc1.yaml --only default late --seeds 0-2

A YAML file names data, distiller, students, MetaDD's default and the settings that change it. A seed fixes initial
images, networks and students of every setting, and of the base without MetaDD, so that settings are compared in pairs.
The unseen architectures are of other families than MetaDD's. Settings are compared on the validation split with the
``seeds`` of the file; the few under ``confirm`` are tested with its ``confirm_seeds``. Rows
are appended to ``benchmarks/results/metadd_<file>.jsonl`` as they are made: a run broken off goes on where it stopped.
The tables at the end give the mean paired difference to the base with its 95 % interval (Student's t), and the meta
ratio of the final images under the architectures of the default.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from environment import environment
from pytorch_lightning import Trainer
from scipy.stats import t as student_t

import lightning_dd.distillers
from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.data import DATA_SETS, ParquetImages, RealData
from lightning_dd.data.augment import default_strategy
from lightning_dd.distillers import Distiller
from lightning_dd.models import build_network
from lightning_dd.quiet import quieten
from lightning_dd.recipe import Recipe, train_student
from lightning_dd.seeding import derive_seed

RESULTS = Path(__file__).parent / "results"
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
    "accelerator": "auto",
    "devices": 1,
}


def real_data(spec: dict[str, Any]) -> RealData:
    """Build the data of an experiment: ``class`` and its arguments."""
    arguments = dict(spec)
    known: dict[str, Any] = {**DATA_SETS, "ParquetImages": ParquetImages}
    data: RealData = known[arguments.pop("class")](**arguments)
    data.setup("fit")
    data.setup("test")
    return data


def distil(experiment: dict[str, Any], settings: dict[str, Any] | None, seed: int, data: RealData) -> dict[str, Any]:
    """Distil once, look at the result, train every student on it and return the row."""
    arguments = dict(experiment["distiller"])
    cls = getattr(lightning_dd.distillers, arguments.pop("class"))
    distiller: Distiller = cls(**arguments, seed=seed)
    meta = [] if settings is None else [MetaDD(**settings)]
    callbacks = [PoolAlternation(**experiment.get("alternation", {})), *meta]
    trainer = Trainer(max_steps=experiment["outer_steps"], callbacks=callbacks, **QUIET)
    trainer.fit(distiller, datamodule=data)
    students = experiment["students"]
    names = [students["same"], *students["unseen"]]
    scores = {name: score(distiller, name, students, seed, data) for name in names}
    accuracy = {split: {name: scores[name][split] for name in names} for split in ("val", "test")}
    return {"seed": seed, **accuracy, "terms": looked_at(experiment, distiller, trainer)}


def looked_at(experiment: dict[str, Any], distiller: Distiller, trainer: Trainer) -> dict[str, float]:
    """Return MetaDD's terms of the final set as the experiment's architectures see it, whichever it was made with."""
    meta = MetaDD(**experiment["metadd"])
    meta.setup(trainer, distiller, "fit")
    assert distiller.synthetic is not None
    with torch.no_grad():
        images, labels = distiller.synthetic()
        result = meta.measure(images, labels, distiller.label_kind)
    return {name: float(value) for name, value in result.terms.items()}


def score(distiller: Distiller, name: str, students: dict[str, Any], seed: int, data: RealData) -> dict[str, float]:
    """Return the mean accuracy of ``students.repeat`` students by split."""
    distilled = distiller.distilled_set()
    recipe = Recipe(steps=students["steps"], lr=students["lr"])
    assert data.val is not None
    assert data.test is not None
    splits = {"val": data.val, "test": data.test}
    accuracies: dict[str, list[float]] = {split: [] for split in splits}
    for repeat in range(students["repeat"]):
        student_seed = derive_seed(seed, "student", repeat)
        network = build_network(name, distilled.num_classes, distilled.image_shape, student_seed)
        network = network.to(data.test.images.device).to(memory_format=torch.channels_last)
        train_student(network, distilled, recipe, default_strategy(data.name), student_seed)
        for split, real in splits.items():
            with torch.no_grad():
                batches = zip(torch.split(real.images, 500), torch.split(real.labels, 500), strict=True)
                hits = sum(float((network(x).argmax(1) == y).sum()) for x, y in batches)
            accuracies[split].append(hits / len(real.labels))
    return {split: statistics.fmean(values) for split, values in accuracies.items()}


def interval(differences: list[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % interval of paired differences."""
    mean, count = statistics.fmean(differences), len(differences)
    half = student_t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5 if count > 1 else float("inf")
    return mean, float(half)


def tables(experiment: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return what was compared on the validation split and what was then tested, each where there are rows."""
    parts = []
    for split, title in (
        ("val", "Validation accuracy, seeds {}: this is what settings are chosen by."),
        ("test", "Test accuracy, seeds {}: not those that settings were compared with."),
    ):
        span = experiment["confirm_seeds" if split == "test" else "seeds"]
        if any(row["seed"] in seeds_of(span) for row in rows):
            parts.append(f"{title.format(span)}\n\n{table(experiment, rows, split)}\n")
    return "\n".join(parts)


def table(experiment: dict[str, Any], rows: list[dict[str, Any]], split: str) -> str:
    """Return the Markdown table of a split and its seeds: a line per setting, differences to the base in points."""
    students = experiment["students"]
    seeds = seeds_of(experiment["confirm_seeds" if split == "test" else "seeds"])
    rows = [row for row in rows if row["seed"] in seeds]
    groups = {"same": [students["same"]], **{name: [name] for name in students["unseen"]}, "unseen": students["unseen"]}
    heads = ["same", *[name.partition(":")[0] for name in students["unseen"]], "mean of unseen"]
    base = {row["seed"]: row for row in rows if row["setting"] == "base"}

    def ratio(rows: list[dict[str, Any]]) -> str:
        found = [row["terms"]["meta_ratio"] for row in rows if row.get("terms")]
        return f"{statistics.fmean(found):.3f}" if len(found) == len(rows) else "-"

    lines = [
        f"| setting | seeds | {' | '.join(heads)} | meta ratio |",
        "|---" * (len(heads) + 3) + "|",
    ]

    def mean_of(row: dict[str, Any], names: list[str]) -> float:
        return 100 * statistics.fmean(row[split][name] for name in names)

    levels = [f"{statistics.fmean(mean_of(row, group) for row in base.values()):.1f}" for group in groups.values()]
    lines.append(f"| base | {len(base)} | {' | '.join(levels)} | {ratio(list(base.values()))} |")
    for setting in experiment["settings"]:
        own = [row for row in rows if row["setting"] == setting and row["seed"] in base]
        if not own:
            continue
        cells = []
        for group in groups.values():
            mean, half = interval([mean_of(row, group) - mean_of(base[row["seed"]], group) for row in own])
            cells.append(f"{mean:+.2f} ± {half:.2f}" if len(own) > 2 else f"{mean:+.2f}")  # of two it says nothing
        lines.append(f"| {setting} | {len(own)} | {' | '.join(cells)} | {ratio(own)} |")
    return "\n".join(lines)


def wanted(experiment: dict[str, Any], only: list[str] | None, seeds: str | None) -> list[tuple[int, str]]:
    """List the rows to make, as (seed, setting)."""
    parts = [(seeds or experiment["seeds"], only or list(experiment["settings"]))]
    if not (only or seeds):
        parts.append((experiment["confirm_seeds"], experiment["confirm"]))
    return [(seed, name) for span, names in parts for seed in seeds_of(span) for name in ["base", *names]]


def seeds_of(text: str) -> range:
    """Read seeds: ``0-2`` are 0, 1 and 2."""
    first, _, last = str(text).partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--only", nargs="+", help="settings to run; if not given all, and those to confirm")
    parser.add_argument("--seeds", help="instead of the file's, as 0-2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table of the rows there are, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quieten()
    experiment = yaml.safe_load(options.experiment.read_text())
    output = RESULTS / f"metadd_{options.experiment.stem}.jsonl"
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    if not options.table:
        data = real_data(experiment["data"])
        changed = {name: {**experiment["metadd"], **changes} for name, changes in experiment["settings"].items()}
        settings = {"base": None, **changed}
        for seed, name in wanted(experiment, options.only, options.seeds):
            if any(row["setting"] == name and row["seed"] == seed for row in rows):
                continue
            row = distil(experiment, settings[name], seed, data)
            rows.append({"setting": name, **row, "settings": settings[name], "made_with": environment()})
            with output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print(tables(experiment, rows))


if __name__ == "__main__":
    main()
