"""All methods of an experiment in one table: same students, random real images beside them.

    python benchmarks/compare.py benchmarks/comparisons/mnist5k_ipc1.yaml --output runs/mnist5k_ipc1
    python benchmarks/compare.py benchmarks/comparisons/mnist5k_ipc1.yaml --output runs/some --methods dm frepo

Distils every method with every seed, as ``lightning-dd fit`` would, then evaluates all files together, as
``lightning-dd evaluate`` would. What is finished is not run again. Networks that methods need first (teachers, experts)
are trained in the experiment's own cache, so that the time of a method holds what it needs. Everything goes to
``benchmarks/results/<experiment>.json``; ``python benchmarks/tables.py`` writes docs/results.md from it.
"""

import argparse
import hashlib
import json
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from environment import environment

ROOT = Path(__file__).resolve().parent.parent


def distil_one(experiment: dict[str, Any], method: str, seed: int, output: Path) -> dict[str, Any]:
    """Distil one set in this process, alone, and return what it took."""
    from lightning_dd.experiment import distil_stage
    from lightning_dd.utils.files import write_text

    name = f"{method}-seed{seed}"
    record = output / f"{name}.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found
    config = ROOT / experiment["configs"] / f"{method.partition('.')[0]}.yaml"
    options = [*experiment.get("options", []), *(experiment["methods"][method] or [])]
    overrides = [f"--seed_everything={seed}", f"--model.init_args.ipc={experiment['ipc']}", *options]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    start = time.perf_counter()
    file = distil_stage([config], experiment["data"], output / name, [*overrides, *quiet])
    seconds = time.perf_counter() - start
    (output / f"{name}.safetensors").write_bytes(file.read_bytes())
    settings = config.read_text(encoding="utf-8") + str(overrides)
    run = {
        "method": method,
        "seed": seed,
        "settings": hashlib.blake2b(settings.encode(), digest_size=8).hexdigest(),
        "seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    write_text(record, json.dumps(run) + "\n")
    print(f"{name}: {seconds:.0f} s", flush=True)
    return run


def main() -> None:
    """Distil, evaluate, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", help="instead of all; nothing is recorded then")
    parser.add_argument("--root", help="folder of the real data, where it is no set that is downloaded")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args()
    experiment = yaml.safe_load(options.experiment.read_text(encoding="utf-8"))
    if options.root is not None:
        experiment["data"].setdefault("init_args", {})["root"] = options.root
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LIGHTNING_DD_CACHE"] = str((options.output / "cache").resolve())
    methods = options.methods or list(experiment["methods"])
    jobs = [(experiment, method, seed, options.output) for seed in range(experiment["seeds"]) for method in methods]
    # A process per run: its peak memory is then its own.
    with ProcessPoolExecutor(options.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = list(pool.map(distil_one, *zip(*jobs, strict=True)))

    from lightning_dd.evaluators.evaluate import evaluate_files
    from lightning_dd.evaluators.matrix import Hardware
    from lightning_dd.students.recipe import Recipe
    from lightning_dd.utils.files import write_text

    rows = evaluate_files(
        [str(options.output / f"{method}-seed{seed}.safetensors") for _, method, seed, _ in jobs],
        experiment["architectures"],
        str(options.output / "report"),
        experiment["students"],
        Recipe(steps=experiment["steps"], lr=experiment["lr"]),
        hardware=Hardware(accelerator="cpu"),
        workers=options.workers,
    )
    if not options.methods:
        record = {"made_with": environment(), "runs": runs, "rows": [asdict(row) for row in rows]}
        path = ROOT / "benchmarks" / "results" / f"{options.experiment.stem}.json"
        write_text(path, json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
