"""What MetaDD adds to a method: time per outer step and peak memory.

    python benchmarks/metadd_overhead.py                                   # every base of benchmarks/ablations
    python benchmarks/metadd_overhead.py benchmarks/ablations/sre2l_mnist5k_ipc10.yaml --settings default of_8

A base and its settings are those of an ablation's YAML file. Times are medians over the whole Trainer's outer steps.
Both are of one run, for a machine's speed drifts: steps without the term give the base's, whole intervals what it is
with MetaDD. Memory is the peak of a process with MetaDD and of one without (the networks' training is in neither if
they are cached: run it twice). The rows go to ``benchmarks/results/metadd_overhead.json``.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import yaml
from environment import environment

from lightning_dd.utils.silence import quiet_trainers

HERE = Path(__file__).resolve().parent
WARM_UP = 10


@quiet_trainers()
def measure(experiment: dict[str, Any], setting: str | None, steps: int, threads: int) -> dict[str, float]:
    """Distil ``steps`` outer steps after a warm-up; return seconds per step without and with MetaDD, and memory."""
    import torch
    from metadd_ablations import QUIET, real_data
    from metadd_settings import metadd
    from pytorch_lightning import Callback, Trainer

    import lightning_dd.distillers
    from lightning_dd.callbacks import PoolAlternation

    class Clock(Callback):
        """Keep the time after every outer step."""

        def on_train_start(self, *args: Any) -> None:
            self.times: list[float] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.times.append(time.perf_counter())

    torch.set_num_threads(threads)
    data = real_data(experiment["data"])
    arguments = dict(experiment["distiller"])
    distiller = getattr(lightning_dd.distillers, arguments.pop("class"))(**arguments, seed=0)
    meta = metadd({**experiment["metadd"], **experiment["settings"][setting]}) if setting else None
    clock = Clock()
    callbacks = [PoolAlternation(**experiment.get("alternation", {})), clock, *([meta] if meta else [])]
    trainer = Trainer(max_steps=WARM_UP + steps, callbacks=callbacks, **QUIET)
    trainer.fit(distiller, datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"peak_mb": peak / 1024}
    if meta:
        took = [later - earlier for earlier, later in itertools.pairwise(clock.times)]  # of step 1, 2, ...
        every = meta.every
        if every == 1:
            raise SystemExit(f"{setting}: every step carries the term, so the run has no step without it to compare")
        plain = [seconds for step, seconds in enumerate(took, 1) if not meta.weight_at(step)]
        whole = [statistics.fmean(took[first : first + every]) for first in range(0, steps, every)]
        found |= {"plain": statistics.median(plain), "seconds": statistics.median(whole)}
    return found


def run_apart(*args: Any) -> dict[str, float]:
    """Run :func:`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main() -> None:
    """Measure what was asked for, print the table and record it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiments", type=Path, nargs="*", default=sorted((HERE / "ablations").glob("*_ipc1.yaml")))
    parser.add_argument(
        "--settings", nargs="+", default=["default"], help="of the files; those a file lacks are left out"
    )
    parser.add_argument("--steps", type=int, default=100, help="at least ten times MetaDD's interval")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for path in options.experiments:
        experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = [None, *(name for name in options.settings if name in experiment["settings"])]
        found: dict[str | None, list[dict[str, float]]] = {name: [] for name in settings}
        for _ in range(options.repeats):
            for name in settings:
                found[name].append(run_apart(experiment, name, options.steps, options.threads))
        peak = {name: statistics.median(run["peak_mb"] for run in runs) for name, runs in found.items()}
        for name in settings[1:]:
            plain, seconds = (statistics.median(run[kind] for run in found[name]) for kind in ("plain", "seconds"))
            row = {
                "base": path.stem,
                "setting": name,
                "step_ms": round(1000 * plain, 2),
                "step_ms_metadd": round(1000 * seconds, 2),
                "peak_mb": round(peak[None]),
                "peak_mb_metadd": round(peak[name]),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)

    from lightning_dd.utils.files import write_text

    record = {"made_with": environment(), "threads": options.threads, "overhead": rows}
    write_text(HERE / "results" / "metadd_overhead.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
