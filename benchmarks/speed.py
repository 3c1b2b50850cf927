"""Time a step of students, teachers and methods, alone and beside busy processes, with the machine's own limit.

    python benchmarks/speed.py --output benchmarks/results/speed.json        # everything; minutes on two cores
    python benchmarks/speed.py student frepo --busy 0 2

Random data of CIFAR-10's shape, in which classes can be told apart; one image per class. A step is everything between
two outer steps, as the Trainer runs them, or one of the bare loop that trains students and teachers. Every measurement
has a process of its own; busy processes compute beside it. FLOPs are those of convolutions and matrix products; the
limit is one large convolution in fp32. ``--peers FOLDER``, which holds a checkout of DatasetCondensation, runs the
official code of DC, DSA and DM as well, on the same data, in turns with ours.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from environment import write_record
from parity.official import SCIPY, Stop, checkout, run_script
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_dd.utils.machine import settle, spinning, threads_for

_WARMUP, _FEWEST = 3, 5
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "frepo": ("FRePo", {"architecture": "conv", "real_batch_size": 256}),
    "dm": ("DM", {}),
    "dm + metadd": ("DM", {}),
    "dc": ("DC", {}),
    "dsa": ("DSA", {}),
    "mtt": ("MTT", {"experts": 1, "trajectory_epochs": 4, "syn_steps": 10}),
    "sre2l": ("SRe2L", {"labels": "hard"}),
}
WORK = ("limit", "student", "teacher", *_METHODS)
"""What can be measured."""
_BESIDE = ("student", "teacher", "frepo")
"""What is measured beside busy processes, too."""
_PEERS = {
    "dm": ["main_DM.py"],
    "dc": ["main.py", "--init=real"],
    "dsa": ["main.py", "--init=real", "--method=DSA", "--dsa_strategy=color_crop_cutout_flip_scale_rotate"],
}
"""Scripts of DatasetCondensation and their arguments."""
_OFFICIAL, _TURNS = ", official", 3


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts those of convolutions and matrix products, forward and backward.

    torch's own FlopCounterMode follows modules too, which fails under ``autograd.grad``.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.count += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        return result


class Clock:
    """Notes when each step ends, and counts the FLOPs of the last one of the warm-up."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.times, self.flops = seconds, [time.perf_counter()], Flops()  # type: ignore[no-untyped-call]
        self._counting = ExitStack()

    def tick(self) -> bool:
        """Note a step; return whether there are enough."""
        self.times.append(time.perf_counter())
        if len(self.times) == _WARMUP:
            self._counting.enter_context(self.flops)
        elif len(self.times) > _WARMUP:
            self._counting.close()
        took = self.times[-1] - self.times[min(_WARMUP, len(self.times) - 1)]
        return len(self.times) > _WARMUP + _FEWEST and took > self.seconds

    def row(self) -> dict[str, Any]:
        """Return what was measured after the warm-up."""
        times = self.times[_WARMUP:]
        low, middle, high = statistics.quantiles([b - a for a, b in itertools.pairwise(times)], n=4)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        step = {"median_s": middle, "quartiles_s": [low, high], "flops": self.flops.count, "steps": len(times) - 1}
        return step | {"peak_mb": peak, "threads": torch.get_num_threads()}


def limit(clock: Clock, width: int) -> None:
    """Convolve 64 maps of 32 x 32 pixels and 128 channels."""
    images = torch.randn(64, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
    layer(images)
    while not clock.tick():
        layer(images)


def network_steps(clock: Clock, architecture: str, shape: tuple[int, int, int], batch: int) -> None:
    """Take the steps of a student or a teacher."""
    from lightning_dd.models import build_network
    from lightning_dd.students.loop import StudentStep, step_flops, take_steps
    from lightning_dd.students.recipe import Recipe

    recipe = Recipe(batch_size=batch)
    network = build_network(architecture, 10, shape, 0).to(memory_format=torch.channels_last).train()
    images, labels = torch.randn(batch, *shape), torch.eye(10)[torch.arange(batch) % 10]
    step = StudentStep("hard", 1.0, False, recipe.augmentation(True), 0)
    with threads_for(step_flops(architecture, recipe, batch, 10, shape)):
        for _ in take_steps(network, recipe, 10**6, lambda k: step.loss(network, images, labels, k)):
            if clock.tick():
                return


def patterns(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``count`` images of ten classes, uint8: a pattern for each, and noise; and the labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    pattern = torch.randint(0, 128, (10, 3, 32, 32), generator=generator)
    noise = torch.randint(0, 128, (count, 3, 32, 32), generator=generator)
    return (pattern[labels] + noise).to(torch.uint8), labels


def method_steps(clock: Clock, name: str, width: int) -> None:
    """Take a method's outer and inner steps under a Trainer."""
    from pytorch_lightning import Callback, Trainer

    from lightning_dd import distillers
    from lightning_dd.callbacks import MetaDD
    from lightning_dd.data import RawSplit, RealData
    from lightning_dd.pretrained import ClassifierRecipe, Teacher

    class Patterns(RealData):
        """The patterns."""

        def read(self, *, train: bool) -> RawSplit:
            return RawSplit(*patterns(3000 if train else 200), tuple("0123456789"))

    class Stopwatch(Callback):
        """Ends the run when there are enough steps."""

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = clock.tick()

    kind, settings = _METHODS[name]
    settings = {"architecture": "convnet", **settings}
    settings["architecture"] += f":width={width}" + (",norm=batch" if kind == "SRe2L" else "")
    more = {"teacher": Teacher(steps=40)} if kind == "SRe2L" else {}
    distiller = getattr(distillers, kind)(**settings, **more)
    names = ["convnet:width=16", "vgg11:width=16"]
    meta = [MetaDD(names, every=1, training=ClassifierRecipe(steps=40))] if name.endswith("metadd") else []
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        **quiet, max_steps=10**6, limit_val_batches=0, num_sanity_val_steps=0, callbacks=[*meta, Stopwatch()]
    )
    trainer.fit(distiller, Patterns(val_fraction=0.1))


class Copying(TorchFunctionMode):
    """Lets ``x[:] = x[0]`` of the official code pass, as older torch did."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, with what an item is set to copied first."""
        if func is torch.Tensor.__setitem__ and isinstance(args[2], torch.Tensor):
            args = (*args[:2], args[2].clone())
        return func(*args, **(kwargs or {}))


def official_steps(clock: Clock, name: str, folder: Path) -> None:
    """Let the official code take its steps, at its own settings for one image per class; each draws one network."""
    images, labels = patterns(3000)
    data = torch.utils.data.TensorDataset((images / 255 - 0.5) / 0.25, labels)
    script, *arguments = _PEERS[name]
    with checkout(folder, SCIPY), suppress(Stop), redirect_stdout(io.StringIO()), Copying():
        draw = import_module("utils").get_network

        def draw_and_tick(*args: Any) -> Any:
            if clock.tick():
                raise Stop
            return draw(*args)

        facts = 3, (32, 32), 10, list("0123456789"), [0.5] * 3, [0.25] * 3, data, data, None
        answers = {"get_dataset": lambda *_: facts, "get_network": draw_and_tick}
        run_script(folder, script, ["--ipc=1", "--eval_mode=S", "--num_eval=0", *arguments], answers)


def measure(name: str, seconds: float, width: int, peers: str | None = None) -> dict[str, Any]:
    """Measure in this process."""
    from lightning_dd.utils.silence import quieten

    settle()
    quieten()
    clock = Clock(seconds)
    if name.endswith(_OFFICIAL):
        official_steps(clock, name.removesuffix(_OFFICIAL), Path(str(peers), "DatasetCondensation").resolve())
    elif name == "limit":
        limit(clock, width)
    elif name == "student":  # of the demo
        network_steps(clock, "conv:width=32,norm=none", (1, 28, 28), 10)
    elif name == "teacher":
        network_steps(clock, f"conv:width={min(width, 32)}", (3, 32, 32), 128)
    else:
        method_steps(clock, name, min(width, 32) if name == "frepo" else width)
    return clock.row()


@contextmanager
def beside(busy: int) -> Iterator[None]:
    """Run a block beside processes that compute."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_compute, daemon=True) for _ in range(busy)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


def _compute() -> None:
    while True:
        pass


def apart(*args: Any) -> dict[str, Any]:
    """Measure in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main() -> None:
    """Measure what was asked for and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", nargs="*", metavar="work", help=f"any of {', '.join(WORK)}; all if none is named")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="processes that compute beside it")
    parser.add_argument("--seconds", type=float, default=4.0, help="at least, of each measurement")
    parser.add_argument("--width", type=int, default=128, help="of the methods' networks")
    parser.add_argument("--peers", help="a folder with a checkout of DatasetCondensation, to be measured beside ours")
    parser.add_argument("--output", help="a JSON file for the rows")
    options = parser.parse_args()
    if unknown := set(options.work) - set(WORK):
        parser.error(f"unknown work {', '.join(unknown)}; known: {', '.join(WORK)}")
    os.environ.update(spinning())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIGHTNING_DD_CACHE"] = str(Path(folder))
        for name in options.work or WORK:
            both = [name, name + _OFFICIAL] if options.peers and name in _PEERS else [name]
            for busy in options.busy if name in _BESIDE else [0]:
                with beside(busy):
                    turns = [
                        {"work": each, "busy": busy, **apart(each, options.seconds, options.width, options.peers)}
                        for each in both * (_TURNS if len(both) > 1 else 1)
                    ]
                for place, each in enumerate(both):
                    own = sorted(turns[place :: len(both)], key=lambda row: row["median_s"])
                    rows.append(row := own[len(own) // 2])
                    print(f"{each:12} beside {busy}: {1000 * row['median_s']:8.1f} ms a step", flush=True)
    write_record(options.output, speed=rows)


if __name__ == "__main__":
    main()
