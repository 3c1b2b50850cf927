"""Run one evaluation and record its rows with what they took.

    python benchmarks/record.py unseen_small_mnist5k lightning-dd evaluate runs/mnist5k_ipc1/frepo-seed0.safetensors \
        --architectures unseen-small --seeds 5 --steps 500 --lr 0.001 --workers 2 --output runs/unseen_small

The command is run as it stands. Rows, wall time and peak memory go to ``benchmarks/results/NAME.json``;
``python benchmarks/tables.py`` writes docs/results.md from it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from environment import environment

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run, measure, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the recorded file, without suffix")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="with --output; a folder that is not there yet")
    options = parser.parse_args()
    if "--output" not in options.command[:-1]:
        parser.error("the command needs --output")
    folder = Path(options.command[options.command.index("--output") + 1])
    if folder.exists():
        parser.error(f"{folder} is there already: finished students would be measured as if they took no time")
    start = time.perf_counter()
    code = subprocess.run(options.command, check=False).returncode
    seconds = time.perf_counter() - start
    if code:
        return code
    from lightning_dd.utils.files import write_text

    cost = {
        "seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    record = {"made_with": environment(), "evaluation": cost, "rows": rows}
    write_text(ROOT / "benchmarks" / "results" / f"{options.name}.json", json.dumps(record, indent=0) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
