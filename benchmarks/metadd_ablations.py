"""MetaDD against its base with paired seeds: accuracy on architectures that neither ever saw.

    python benchmarks/metadd_ablations.py benchmarks/ablations/frepo_mnist5k_ipc1.yaml
    python benchmarks/metadd_ablations.py benchmarks/ablations/frepo_mnist5k_ipc1.yaml --only default late --seeds 3

A YAML file names data, distiller, students and settings of MetaDD. A seed fixes initial images, networks and students
of every setting, and of the base without MetaDD, so that settings are compared in pairs. The unseen architectures are
of other families than MetaDD's. Rows are appended to ``benchmarks/results/metadd_<file>.jsonl`` as they are made: a run
broken off goes on where it stopped. The table at the end gives the mean paired difference to the base with its 95 %
interval (Student's t).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
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


class Watch(MetaDD):
    """MetaDD that remembers its last terms."""

    last: dict[str, float]

    def measure(self, *args: Any, **kwargs: Any) -> Any:
        """Measure, and keep the terms."""
        result = super().measure(*args, **kwargs)
        self.last = {name: float(value) for name, value in result.terms.items()}
        return result


def real_data(spec: dict[str, Any]) -> RealData:
    """Build the data of an experiment: ``class`` and its arguments."""
    arguments = dict(spec)
    known: dict[str, Any] = {**DATA_SETS, "ParquetImages": ParquetImages}
    data: RealData = known[arguments.pop("class")](**arguments)
    data.setup("fit")
    data.setup("test")
    return data


def distil(experiment: dict[str, Any], settings: dict[str, Any] | None, seed: int, data: RealData) -> dict[str, Any]:
    """Distil once, train every student on the result and return the row."""
    arguments = dict(experiment["distiller"])
    cls = getattr(lightning_dd.distillers, arguments.pop("class"))
    distiller: Distiller = cls(**arguments, seed=seed)
    meta = None if settings is None else Watch(**{**experiment["metadd"], **settings})
    callbacks = [PoolAlternation(**experiment.get("alternation", {})), *([meta] if meta else [])]
    trainer = Trainer(max_steps=experiment["outer_steps"], callbacks=callbacks, **QUIET)
    if meta is not None:
        data.trainer = trainer
        meta.setup(trainer, distiller, "fit")  # now, so that training the architectures is not counted below
    start = time.perf_counter()
    trainer.fit(distiller, datamodule=data)
    seconds = time.perf_counter() - start
    students = experiment["students"]
    names = [students["same"], *students["unseen"]]
    accuracy = {name: score(distiller, name, students, seed, data) for name in names}
    return {"seed": seed, "accuracy": accuracy, "fit_s": round(seconds, 2), "last_terms": meta.last if meta else None}


def score(distiller: Distiller, name: str, students: dict[str, Any], seed: int, data: RealData) -> float:
    """Return the mean test accuracy of ``students.repeat`` students."""
    distilled = distiller.distilled_set()
    recipe = Recipe(steps=students["steps"], lr=students["lr"])
    assert data.test is not None
    accuracies = []
    for repeat in range(students["repeat"]):
        student_seed = derive_seed(seed, "student", repeat)
        device = data.test.images.device
        network = build_network(name, distilled.num_classes, distilled.image_shape, student_seed).to(device)
        train_student(network, distilled, recipe, default_strategy(data.name), student_seed)
        with torch.no_grad():
            batches = zip(torch.split(data.test.images, 500), torch.split(data.test.labels, 500), strict=True)
            hits = sum(float((network(x).argmax(1) == y).sum()) for x, y in batches)
        accuracies.append(hits / len(data.test.labels))
    return statistics.fmean(accuracies)


def interval(differences: list[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % interval of paired differences."""
    mean, count = statistics.fmean(differences), len(differences)
    half = student_t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5 if count > 1 else float("inf")
    return mean, float(half)


def table(experiment: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table: a line per setting, differences to the base in points."""
    students = experiment["students"]
    groups = {"same": [students["same"]], **{name: [name] for name in students["unseen"]}, "unseen": students["unseen"]}
    heads = ["same", *[name.partition(":")[0] for name in students["unseen"]], "mean of unseen"]
    base = {row["seed"]: row for row in rows if row["setting"] == "base"}
    lines = [
        f"| setting | seeds | {' | '.join(heads)} | meta ratio | time of the fit |",
        "|---" * (len(heads) + 4) + "|",
    ]

    def mean_of(row: dict[str, Any], names: list[str]) -> float:
        return 100 * statistics.fmean(row["accuracy"][name] for name in names)

    levels = [f"{statistics.fmean(mean_of(row, group) for row in base.values()):.1f}" for group in groups.values()]
    base_time = statistics.median(row["fit_s"] for row in base.values())
    lines.append(f"| base | {len(base)} | {' | '.join(levels)} | - | {base_time:.1f} s |")
    for setting in experiment["settings"]:
        own = [row for row in rows if row["setting"] == setting and row["seed"] in base]
        if not own:
            continue
        cells = []
        for group in groups.values():
            mean, half = interval([mean_of(row, group) - mean_of(base[row["seed"]], group) for row in own])
            cells.append(f"{mean:+.2f} ± {half:.2f}" if len(own) > 1 else f"{mean:+.2f}")
        ratio = statistics.fmean(row["last_terms"]["meta_ratio"] for row in own)
        slower = statistics.median(row["fit_s"] / base[row["seed"]]["fit_s"] - 1 for row in own)
        lines.append(f"| {setting} | {len(own)} | {' | '.join(cells)} | {ratio:.3f} | {100 * slower:+.0f} % |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--only", nargs="+", help="settings to run; all if not given")
    parser.add_argument("--seeds", type=int, help="instead of the file's")
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
        settings = {"base": None, **experiment["settings"]}
        for seed in range(options.seeds or experiment["seeds"]):
            for name in ["base", *(options.only or experiment["settings"])]:
                if any(row["setting"] == name and row["seed"] == seed for row in rows):
                    continue
                rows.append({"setting": name, **distil(experiment, settings[name], seed, data)})
                with output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    print(table(experiment, rows))


if __name__ == "__main__":
    main()
