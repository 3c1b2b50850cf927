"""Fit how the time and the memory of an outer step grow with the size of the problem.

    python benchmarks/scale.py --output benchmarks/results/scale.json

From one base case one number is changed at a time; random images, networks of width 16, one thread, and CPU time, so
that other processes on the machine matter little. Memory is the peak of a process over what its imports take. The
ridge regression of FRePo is measured alone as well, forward and backward, by its rows; and a step with 50 images of
each of 200 classes by how many of them a network looks at together.
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from environment import write_record

from lightning_dd.utils.machine import settle

_WARMUP, _STEPS = 1, 3
BASE = {"images per class": 10, "classes": 10, "side": 32, "real images": 256}
AXES = {
    "images per class": (1, 10, 50),
    "classes": (5, 10, 20),
    "side": (16, 32, 64),
    "real images": (64, 256, 1024),
}
"""What is changed, and to what; DM takes a tenth of the real images of each class."""
ROWS = (1000, 2000, 4000, 10000)
"""Of the ridge regression."""
LARGE = {"images per class": 50, "classes": 200, "side": 32, "real images": 256}
SLICES = (500, 10000)
"""Images of the large case that a network of FRePo looks at together."""
METHODS = ("FRePo", "DM")


def method_steps(name: str, case: Mapping[str, int]) -> list[float]:
    """Return the CPU seconds at the end of each outer step of a method."""
    from pytorch_lightning import Callback, Trainer

    from lightning_dd import distillers
    from lightning_dd.data import RawSplit, RealData
    from lightning_dd.utils.silence import quiet_trainers

    side, classes, real = case["side"], case["classes"], case["real images"]

    class Noise(RealData):
        """As many images of each class as a step can take."""

        def read(self, *, train: bool) -> RawSplit:
            labels = torch.arange(classes).repeat_interleave(max(real // 10, 50, real // classes + 1))
            images = torch.randint(0, 256, (len(labels), 3, side, side), generator=torch.Generator().manual_seed(0))
            return RawSplit(images.to(torch.uint8), labels, tuple(map(str, range(classes))))

    class Stopwatch(Callback):
        """Notes when a step ends."""

        ends: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, *args: Any) -> None:
            self.ends.append(time.process_time())

    frepo = name == "FRePo"
    settings: dict[str, Any] = {"real_batch_size": real} if frepo else {"real_per_class": real // 10}
    if "slice" in case:
        settings |= {"slice": case["slice"], "flip": False}
    architecture = "conv:width=16" if frepo else "convnet:width=16"
    distiller = getattr(distillers, name)(ipc=case["images per class"], architecture=architecture, **settings)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    with quiet_trainers():
        trainer = Trainer(
            **quiet,
            accelerator="cpu",
            max_steps=_WARMUP + _STEPS + 1,
            limit_val_batches=0,
            callbacks=[Stopwatch()],
        )
        trainer.fit(distiller, Noise(val_fraction=0.0))
    return Stopwatch.ends


def regression_steps(rows: int) -> list[float]:
    """Return the CPU seconds at the end of each regression, forward and backward, of 256 real images in 100 classes."""
    from lightning_dd.losses.krr import krr_predict

    features, labels = torch.randn(rows, 1024, requires_grad=True), torch.randn(rows, 100, requires_grad=True)
    ends = []
    for _ in range(3):
        torch.autograd.backward(krr_predict(features, labels, torch.randn(256, 1024)).values.square().sum())
        features.grad = labels.grad = None
        ends.append(time.process_time())
    return ends


def measure(step: Callable[..., list[float]], *args: Any) -> dict[str, Any]:
    """Return CPU seconds of a step and megabytes, measured in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends = step(*args)[-_STEPS - 1 :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"cpu_s": statistics.median(b - a for a, b in itertools.pairwise(ends)), "mb": peak / 1024}


def apart(*args: Any) -> dict[str, Any]:
    """Measure in a process that has imported already what this one has."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, args)


def main() -> None:
    """Measure everything and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", help="a JSON file for the rows")
    options = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    import lightning_dd.distillers  # noqa: F401

    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for axis, sizes in AXES.items():
            rows += [
                {"work": method, "by": axis, "size": size, **apart(method_steps, method, {**BASE, axis: size})}
                for size in sizes
            ]
            print(rows[-1], flush=True)
    named = {"work": "ridge regression", "by": "rows"}
    rows += [{**named, "size": count, **apart(regression_steps, count)} for count in ROWS]
    print(rows[-1], flush=True)
    named = {"work": "FRePo, 200 x 50", "by": "images at a time"}
    for count in SLICES:
        rows.append({**named, "size": count, **apart(method_steps, "FRePo", {**LARGE, "slice": count})})
        print(rows[-1], flush=True)
    write_record(options.output, scale=rows)


if __name__ == "__main__":
    main()
