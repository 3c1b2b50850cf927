"""MetaDD against its base with paired seeds: accuracy on architectures that neither ever saw.

    python benchmarks/metadd_paired.py --seeds 5 --output benchmarks/results/metadd_frepo_ipc1.json
    python benchmarks/metadd_paired.py --settings '{"weight": 0.1, "every": 1}'

FRePo on MNIST5k, the same outer steps with and without the MetaDD term; a seed fixes initial images, networks and
students of both. Prints each architecture's mean paired difference with its 95 % interval (Student's t), and that of
the mean over unseen architectures. The unseen ones are of other families than MetaDD's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from scipy.stats import t as student_t

from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.data import MNIST5k
from lightning_dd.distillers import FRePo
from lightning_dd.evaluators import DistilledData, Student
from lightning_dd.quiet import quieten

ARCHITECTURES = [
    "convnet:width=32,norm=batch",
    "resnet10t:stem_width=8,channels=[8,16,32,64]",
    "alexnet:width=16",
    "vit_tiny_patch16_224:patch_size=4,depth=2,embed_dim=48,num_heads=3",
]
SAME = "conv:width=32,norm=none"
UNSEEN = [
    "vgg11:width=16",
    "densenet121:growth_rate=8,block_config=[1,1,1,1],norm_layer=groupnorm1",
    "swin_tiny_patch4_window7_224:embed_dim=24,depths=[1,1]",
]
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
    "accelerator": "cpu",
}


def run(seed: int, metadd: dict[str, Any] | None, options: argparse.Namespace) -> dict[str, Any]:
    """Distil once and train every student on the result."""
    distiller = FRePo(
        ipc=options.ipc, architecture="conv:width=32", flip=False, lr=0.01, real_batch_size=256, seed=seed
    )
    callbacks = [PoolAlternation(), *([MetaDD(ARCHITECTURES, **metadd)] if metadd is not None else [])]
    trainer = Trainer(max_steps=options.steps, callbacks=callbacks, **QUIET)
    data = MNIST5k()
    data.setup("fit")
    start = time.perf_counter()
    trainer.fit(distiller, datamodule=data)
    seconds = time.perf_counter() - start
    distilled = distiller.distilled_set()
    accuracy = {}
    for architecture in [SAME, *UNSEEN]:
        scores = []
        for student_seed in range(options.students):
            student = Student(architecture, lr=1e-3, seed=100 * seed + student_seed)
            module = DistilledData.from_set(distilled, MNIST5k(), seed=100 * seed + student_seed)
            judge = Trainer(max_steps=options.student_steps, **QUIET)
            judge.fit(student, datamodule=module)
            scores.append(float(judge.test(student, datamodule=module, verbose=False)[0]["test/accuracy"]))
        accuracy[architecture] = statistics.fmean(scores)
    return {"seed": seed, "metadd": metadd, "accuracy": accuracy, "fit_s": seconds}


def interval(differences: list[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % interval of paired differences."""
    mean, count = statistics.fmean(differences), len(differences)
    half = student_t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5 if count > 1 else float("inf")
    return mean, float(half)


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500, help="outer steps")
    parser.add_argument("--students", type=int, default=2, help="students per architecture, averaged within a seed")
    parser.add_argument("--student-steps", type=int, default=500)
    parser.add_argument("--settings", default="{}", help="MetaDD's arguments as JSON, such as '{\"weight\": 0.1}'")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quieten()
    settings = {"train_steps": 600, **json.loads(options.settings)}
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for metadd in (None, settings):
            rows.append(run(seed, metadd, options))
            print(json.dumps(rows[-1]), flush=True)
    print("| architecture | base | MetaDD | difference (95 % interval) |\n|---|---|---|---|")
    means: dict[str, Any] = {name: [name] for name in [SAME, *UNSEEN]} | {"mean of unseen": UNSEEN}
    for title, names in means.items():
        sides = [
            [statistics.fmean(row["accuracy"][name] for name in names) for row in side]
            for side in (rows[::2], rows[1::2])
        ]
        mean, half = interval([after - before for before, after in zip(*sides, strict=True)])
        base, ours = (100 * statistics.fmean(side) for side in sides)
        print(f"| {title} | {base:.1f} | {ours:.1f} | {100 * mean:+.2f} ± {100 * half:.2f} |")
    if options.output:
        from lightning_dd.files import write_text

        write_text(options.output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
