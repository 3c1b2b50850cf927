"""What MetaDD adds to a method: time per outer step and peak memory.

    python benchmarks/metadd_overhead.py
    python benchmarks/metadd_overhead.py --bases dm sre2l --settings metadd factor_2_metadd

A base and its settings are those of a plan of ``benchmarks/transfer.py``. Both times are of one run, for a machine's
speed drifts: the term acts in every other block of ten steps, and medians over steps with it and without are compared;
a term that is due in every third step costs a third of the difference.
Memory is the peak of a process with MetaDD and of one without (the networks' training is in neither if they are cached:
run it twice). The rows go to ``benchmarks/results/metadd_overhead.json``.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from environment import environment
from plans import read_plan
from transfer import Trial, metadd, real_data, trainer, trials
from transfer_tables import Row

import lightning_dd.distillers
from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.utils.files import write_text
from lightning_dd.utils.silence import quiet_trainers

HERE = Path(__file__).resolve().parent
BLOCK = 10


@quiet_trainers()
def measure(trial: Trial, steps: int, threads: int) -> dict[str, float]:
    """Distil some outer steps; return the median seconds of a step without and with MetaDD, and the peak memory."""
    import torch
    from pytorch_lightning import Callback

    class Clock(Callback):
        """Keep the time after every outer step."""

        def on_train_start(self, *args: Any) -> None:
            self.times: list[float] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.times.append(time.perf_counter())

    torch.set_num_threads(threads)
    arguments = dict(trial.distiller)
    distiller = getattr(lightning_dd.distillers, arguments.pop("class"))(**arguments, seed=0)
    clock, meta = Clock(), None if trial.metadd is None else metadd(trial.metadd, InBlocks)
    callbacks = [PoolAlternation(**trial.alternation), clock, *([meta] if meta else [])]
    trainer(steps, callbacks).fit(distiller, datamodule=real_data(json.dumps(trial.data)))
    found = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if meta:
        took = list(enumerate((later - earlier for earlier, later in itertools.pairwise(clock.times)), 1))[BLOCK:]
        for name, acts in (("plain", False), ("seconds", True)):
            found[name] = statistics.median(seconds for step, seconds in took if bool(meta.share_at(step)) == acts)
        found["seconds"] = found["plain"] + (found["seconds"] - found["plain"]) / meta.every
    return found


class InBlocks(MetaDD):
    """Acts in every other block of steps."""

    def share_at(self, outer_step: int) -> float:
        """Return what the rhythm says in a block with the term, else 0."""
        return super().share_at(outer_step) if outer_step // BLOCK % 2 else 0.0


def run_apart(*args: Any) -> dict[str, float]:
    """Run :func:`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main() -> None:
    """Measure what was asked for, print the table and record it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plan", type=Path, default=HERE / "transfer" / "cifar10_ipc10.yaml")
    parser.add_argument("--bases", nargs="+", default=["dm", "dc", "dsa", "sre2l"])
    parser.add_argument("--settings", nargs="+", default=["metadd"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    plan = read_plan(options.plan)
    rows: list[Row] = []
    for base, setting in itertools.product(options.bases, options.settings):
        stage = {"bases": [base], "settings": [setting], "seeds": 0, "students": []}
        ((trial, _),) = trials(plan, stage)
        runs = [run_apart(trial, options.steps, options.threads) for _ in range(options.repeats)]
        bare = [run_apart(replace(trial, metadd=None), 2, options.threads) for _ in range(options.repeats)]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        row = {
            "base": base,
            "setting": setting,
            "step_ms": round(1000 * middle["plain"], 2),
            "step_ms_metadd": round(1000 * middle["seconds"], 2),
            "peak_mb": round(statistics.median(run["peak_mb"] for run in bare)),
            "peak_mb_metadd": round(middle["peak_mb"]),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    record = {"made_with": environment(), "threads": options.threads, "overhead": rows}
    write_text(HERE / "results" / "metadd_overhead.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
