"""Fit how the time and the memory of an outer step grow with the size of the problem.

    python benchmarks/scale.py --output benchmarks/results/scale.json
    python benchmarks/scale.py --published --output benchmarks/results/unrolled.json

From one base case one number is changed at a time; random images, networks of width 16, one thread, and CPU time, so
that other processes on the machine matter little. Memory is the peak of a process over what its imports take. The
ridge regression of FRePo is measured alone as well, forward and backward, by its rows; and a step with 50 images of
each of 200 classes by how many of them a network looks at together. With ``--published`` FRePo stands beside MTT, which
unrolls the training of a network, both with the inner steps and real images of the papers' CIFAR-10.
"""

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
PUBLISHED = {"images per class": (1, 10), "width": (32, 64)}
"""What is changed of a paper's smallest case, and to what."""
SMALLEST = {"images per class": 1, "classes": 10, "side": 32, "real images": 1024, "width": 32}


def settings_of(name: str, case: Mapping[str, int]) -> dict[str, Any]:
    """Return what a method is given beside images per class and architecture."""
    if name == "FRePo":
        sliced = {"slice": case["slice"], "flip": False} if "slice" in case else {}
        return {"real_batch_size": case["real images"], **sliced}
    if name == "DM":
        return {"real_per_class": case["real images"] // 10}
    steps = 50 if case["images per class"] == 1 else 30
    return {"syn_steps": steps, "experts": 1, "trajectory_epochs": 3, "constant_memory": name == "MTT"}


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

    architecture = f"{'conv' if name == 'FRePo' else 'convnet'}:width={case.get('width', 16)}"
    method = getattr(distillers, name.partition(",")[0])
    distiller = method(ipc=case["images per class"], architecture=architecture, **settings_of(name, case))
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


def grown() -> Iterator[dict[str, Any]]:
    """Yield how steps grow from the base."""
    for method, (axis, sizes) in itertools.product(METHODS, AXES.items()):
        for size in sizes:
            took = apart(method_steps, method, {**BASE, axis: size})
            yield {"work": method, "by": axis, "size": size, **took}
    for count in ROWS:
        yield {"work": "ridge regression", "by": "rows", "size": count, **apart(regression_steps, count)}
    for count in SLICES:
        took = apart(method_steps, "FRePo", {**LARGE, "slice": count})
        yield {"work": "FRePo, 200 x 50", "by": "images at a time", "size": count, **took}


def published() -> Iterator[dict[str, Any]]:
    """Yield what a step takes in FRePo and in MTT, which first trains experts that the measured run then finds."""
    for axis, sizes in PUBLISHED.items():
        for size in sizes:
            apart(method_steps, "MTT", {**SMALLEST, axis: size})
        for method, size in itertools.product(("FRePo", "MTT", "MTT, unrolled"), sizes):
            took = apart(method_steps, method, {**SMALLEST, axis: size})
            yield {"work": method, "by": axis, "size": size, **took}


def main() -> None:
    """Measure everything and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--published", action="store_true", help="FRePo and MTT at the papers' sizes instead")
    parser.add_argument("--output", help="a JSON file for the rows")
    options = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    import lightning_dd.distillers  # noqa: F401

    with tempfile.TemporaryDirectory() as cache:
        os.environ["LIGHTNING_DD_CACHE"] = cache
        rows = []
        for row in published() if options.published else grown():
            print(row, flush=True)
            rows.append(row)
    write_record(options.output, scale=rows)


if __name__ == "__main__":
    main()
