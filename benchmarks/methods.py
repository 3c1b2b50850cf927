"""All methods on MNIST5k in one table: same students, random real images beside them.

    python benchmarks/methods.py --ipc 1 --output runs/methods1
    python benchmarks/methods.py --ipc 10 --output runs/methods10 --methods dm frepo random

Distils every configuration under configs/mnist5k with every seed, as ``lightning-dd fit`` would, then evaluates all
files together, as ``lightning-dd evaluate`` would. What is finished is not run again. The rows go to
``benchmarks/results/methods_mnist5k_ipc<ipc>.json``; ``python benchmarks/tables.py`` writes docs/results.md from them.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "mnist5k"
DATA = {"class_path": "MNIST5k", "init_args": {}}
ARCHITECTURES = ["convnet:width=32,norm=instance", "conv:width=32,norm=none"]
STEPS, LR = 500, 1e-3


def distil_one(method: str, ipc: int, seed: int, folder: str) -> tuple[str, float]:
    """Distil one set in this process and return its file and the wall time (0 if it was there)."""
    from lightning_dd.stages import distil

    output = Path(folder) / f"{method}-seed{seed}"
    there = (output / "last.safetensors").is_file()
    start = time.perf_counter()
    overrides = [
        f"--seed_everything={seed}",
        f"--model.init_args.ipc={ipc}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    file = distil([CONFIGS / f"{method}.yaml"], DATA, output, overrides)
    seconds = 0.0 if there else time.perf_counter() - start
    renamed = Path(folder) / f"{method}-seed{seed}.safetensors"
    renamed.write_bytes(Path(file).read_bytes())
    print(f"{renamed.name}: {seconds:.0f} s", flush=True)
    return str(renamed), seconds


def main() -> None:
    """Distil, evaluate, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="distilled sets per method")
    parser.add_argument("--students", type=int, default=2, help="students per set and architecture")
    parser.add_argument("--methods", nargs="+", default=sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    Path(options.output).mkdir(parents=True, exist_ok=True)
    jobs = [(method, options.ipc, seed, options.output) for method in options.methods for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        done = list(pool.map(distil_one, *zip(*jobs, strict=True)))

    from lightning_dd.evaluators.evaluate import evaluate_files
    from lightning_dd.evaluators.matrix import Hardware
    from lightning_dd.files import write_text
    from lightning_dd.recipe import Recipe

    files = [file for file, _ in done]
    recipe = Recipe(steps=STEPS, lr=LR)
    report = str(Path(options.output) / "report")
    hardware = Hardware(accelerator="cpu")
    rows = evaluate_files(files, ARCHITECTURES, report, options.students, recipe, None, hardware, options.workers)
    record = ROOT / "benchmarks" / "results" / f"methods_mnist5k_ipc{options.ipc}.json"
    write_text(record, json.dumps([asdict(row) for row in rows], indent=0) + "\n")


if __name__ == "__main__":
    main()
