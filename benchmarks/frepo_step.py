"""Time one FRePo outer + inner step, as a user's Trainer runs it.

    python benchmarks/frepo_step.py                          # every workload, fp32 and bf16
    python benchmarks/frepo_step.py W1 W3 --precision bf16-mixed --compile

Prints a table and, with ``--output``, writes the rows as JSON (those of docs/results.md went to
``benchmarks/results/frepo_step.json``). A step is everything between two outer steps: the
real batch, its features, the synthetic forward and backward pass, LAMB on images and labels, one online Adam step
of the used network, and Lightning's own work. Random data of the right shape; a pool of 10; compile time and the
first steps are left out. Every configuration runs in a process of its own, so that peak memory is its own.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environment import write_record


@dataclass(frozen=True)
class Workload:
    """One shape of problem; 10 classes, ``conv`` of depth 3 with BatchNorm."""

    name: str
    shape: tuple[int, int, int]
    ipc: int
    width: int
    real_batch: int
    flip: bool


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", (3, 32, 32), 1, 128, 1024, True),
        Workload("W2", (3, 32, 32), 10, 128, 1024, False),
        Workload("W3", (3, 32, 32), 1, 32, 256, True),
        Workload("W4", (1, 28, 28), 1, 32, 256, False),
    )
}


def measure(
    workload: Workload, precision: str, compiled: bool, steps: int, warmup: int, threads: int
) -> dict[str, Any]:
    """Run ``warmup + steps`` outer steps and return the timings of the last ``steps``."""
    import torch
    from pytorch_lightning import Callback, LightningModule, Trainer

    from lightning_dd.callbacks import PoolAlternation
    from lightning_dd.data import RawSplit, RealData
    from lightning_dd.distillers import FRePo
    from lightning_dd.utils.silence import quieten

    quieten()
    torch.set_num_threads(threads)

    class RandomPixels(RealData):
        """Noise of the workload's shape."""

        def read(self, *, train: bool) -> RawSplit:
            generator = torch.Generator().manual_seed(int(train))
            images = torch.randint(0, 256, (4 * workload.real_batch, *workload.shape), generator=generator)
            return RawSplit(images.to(torch.uint8), torch.arange(len(images)) % 10, tuple("0123456789"))

    class Stopwatch(Callback):
        """Note the time after every step, inner steps included."""

        times: list[float]

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.times = [time.perf_counter()]

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    stopwatch = Stopwatch()
    distiller = FRePo(
        ipc=workload.ipc,
        architecture=f"conv:width={workload.width}",
        flip=workload.flip,
        real_batch_size=workload.real_batch,
        compiled=compiled,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=warmup + steps,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=folder,
            callbacks=[PoolAlternation(), stopwatch],
        )
        trainer.fit(distiller, RandomPixels(val_fraction=0.0))
    device = trainer.strategy.root_device
    seconds = [b - a for a, b in zip(stopwatch.times[warmup:], stopwatch.times[warmup + 1 :], strict=False)]
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {
        "workload": asdict(workload),
        "precision": precision,
        "compiled": compiled,
        "steps": steps,
        "median_s": middle,
        "quartiles_s": [low, high],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_device_mb": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
        "threads": threads,
    }


def run_apart(*args: Any) -> dict[str, Any]:
    """Run :func:`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workloads", nargs="*", help=f"any of {', '.join(WORKLOADS)}; all of them if none is named")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the feature functions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    rows = []
    print("| workload | precision | compiled | median s | quartiles s | peak MB |\n|---|---|---|---|---|---|")
    for name in options.workloads or WORKLOADS:
        if name not in WORKLOADS:
            parser.error(f"unknown workload '{name}'; known: {', '.join(WORKLOADS)}")
        for precision in options.precision:
            row = run_apart(WORKLOADS[name], precision, options.compile, options.steps, options.warmup, options.threads)
            rows.append(row)
            low, high = row["quartiles_s"]
            print(
                f"| {name} | {precision} | {'yes' if options.compile else 'no'} | {row['median_s']:.4f} | "
                f"{low:.4f}-{high:.4f} | {row['peak_mb']:.0f} |",
                flush=True,
            )
    write_record(options.output, step=rows)


if __name__ == "__main__":
    main()
