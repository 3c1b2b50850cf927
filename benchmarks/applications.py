"""Run and record the two applications on MNIST5k: continual learning and membership inference.

    python benchmarks/applications.py --output runs/applications
    python benchmarks/applications.py continual --output runs/applications

Each is its verb with its committed configuration; what is finished is not run again. The rows go to
``benchmarks/results/<application>_mnist5k.json``; ``python benchmarks/tables.py`` writes docs/results.md from them.
"""

import argparse
import json
from pathlib import Path

from environment import environment

ROOT = Path(__file__).resolve().parent.parent
APPLICATIONS = ("continual", "membership")


def main() -> None:
    """Run what was asked for and record it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("applications", nargs="*", default=APPLICATIONS, help=f"of {', '.join(APPLICATIONS)}")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from lightning_dd.cli import main as lightning_dd
    from lightning_dd.utils.files import write_text

    for application in options.applications:
        config = ROOT / "configs" / application / "mnist5k.yaml"
        folder = options.output / application
        lightning_dd([application, f"--config={config}", f"--output={folder}"])
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        record = {"made_with": environment(), application: rows}
        write_text(ROOT / "benchmarks" / "results" / f"{application}_mnist5k.json", json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
