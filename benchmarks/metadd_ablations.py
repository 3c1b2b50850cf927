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
from metadd_settings import metadd
from pytorch_lightning import Trainer
from scipy.stats import t as student_t

import lightning_dd.distillers
from lightning_dd.callbacks import PoolAlternation
from lightning_dd.data import DATA_SETS, ParquetImages, RealData
from lightning_dd.data.sampling import EvalBatches
from lightning_dd.distillers import Distiller
from lightning_dd.models import build_network
from lightning_dd.report import markdown_table
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.seeding import derive_seed
from lightning_dd.utils.silence import quieten

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
    meta = [] if settings is None else [metadd(settings)]
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
    meta = metadd(experiment["metadd"])
    meta.setup(trainer, distiller, "fit")
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
        network = network.to(data.test.device)
        train_student(network, distilled, recipe, student_seed)
        for split, real in splits.items():
            with torch.no_grad():
                batches = EvalBatches(real, 500)
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
    rows = of_split(experiment, rows, split)
    groups = {"same": [students["same"]], **{name: [name] for name in students["unseen"]}, "unseen": students["unseen"]}
    heads = ["same", *[name.partition(":")[0] for name in students["unseen"]], "mean of unseen"]

    def ratio(setting: str) -> str:
        terms = [row.get("terms") or {} for row in rows if row["setting"] == setting]
        return f"{statistics.fmean(found['meta_ratio'] for found in terms):.3f}" if all(terms) else "-"

    base = [row for row in rows if row["setting"] == "base"]
    lines = [["setting", "seeds", *heads, "meta ratio"]]
    levels = [f"{level(base, names, split):.1f}" for names in groups.values()]
    lines.append(["base", str(len(base)), *levels, ratio("base")])
    for setting in experiment["settings"]:
        differences = [paired(rows, setting, names, split) for names in groups.values()]
        if differences[0]:
            lines.append([setting, str(len(differences[0])), *map(points, differences), ratio(setting)])
    return markdown_table(lines)


def overview(experiments: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], settings: list[str]) -> str:
    """Return the Markdown table of what was tested in every experiment: mean of the unseen architectures, in points."""
    lines = [["experiment", "pairs", "base", *settings, "default on the same architecture"]]
    for name, (experiment, every_row) in experiments.items():
        students, rows = experiment["students"], of_split(experiment, every_row, "test")
        base = level([row for row in rows if row["setting"] == "base"], students["unseen"], "test")
        cells = [points(paired(rows, setting, students["unseen"], "test")) for setting in settings]
        same = paired(rows, "default", [students["same"]], "test")
        lines.append([name, str(len(same)), f"{base:.1f}", *cells, points(same)])
    return markdown_table(lines)


def of_split(experiment: dict[str, Any], rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Return the rows of the seeds whose accuracy on a split is shown."""
    seeds = seeds_of(experiment["confirm_seeds" if split == "test" else "seeds"])
    return [row for row in rows if row["seed"] in seeds]


def level(rows: list[dict[str, Any]], names: list[str], split: str) -> float:
    """Return the mean accuracy of some architectures over rows, in %."""
    return 100 * statistics.fmean(row[split][name] for row in rows for name in names)


def paired(rows: list[dict[str, Any]], setting: str, names: list[str], split: str) -> list[float]:
    """Return the difference of a setting to the base for every seed that both have, in points."""
    base = {row["seed"]: row for row in rows if row["setting"] == "base"}
    own = [row for row in rows if row["setting"] == setting and row["seed"] in base]
    return [level([row], names, split) - level([base[row["seed"]]], names, split) for row in own]


def points(differences: list[float]) -> str:
    """Return mean and interval of paired differences; of two pairs, of which an interval says nothing, the mean."""
    if not differences:
        return "-"
    mean, half = interval(differences)
    return f"{mean:+.2f} ± {half:.2f}" if len(differences) > 2 else f"{mean:+.2f}"


def rows_file(path: Path) -> Path:
    """Return the file of the rows of an experiment's YAML file."""
    return RESULTS / f"metadd_{path.stem}.jsonl"


def recorded(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the experiment of a YAML file and its rows so far."""
    file = rows_file(path)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return yaml.safe_load(path.read_text(encoding="utf-8")), rows


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
    experiment, rows = recorded(options.experiment)
    if not options.table:
        data = real_data(experiment["data"])
        changed = {name: {**experiment["metadd"], **changes} for name, changes in experiment["settings"].items()}
        settings = {"base": None, **changed}
        for seed, name in wanted(experiment, options.only, options.seeds):
            if any(row["setting"] == name and row["seed"] == seed for row in rows):
                continue
            row = distil(experiment, settings[name], seed, data)
            rows.append({"setting": name, **row, "settings": settings[name], "made_with": environment()})
            with rows_file(options.experiment).open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print(tables(experiment, rows))


if __name__ == "__main__":
    main()
