"""Write the recorded results into the README's and docs/results.md's tables.

    python benchmarks/tables.py            # rewrite the tables
    python benchmarks/tables.py --check    # exit 1 if one is stale

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; NAME is a file of benchmarks/results.
The demo's rows are those `make demo` leaves in runs/demo/report/results.json.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from metadd_ablations import table as ablation_table

from lightning_dd.evaluators.matrix import Row
from lightning_dd.evaluators.report import markdown
from lightning_dd.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
_PATTERN = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def rendered(name: str) -> str:
    """Return the table of a file of recorded rows: an evaluation's, or those of MetaDD's ablations."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        experiment = ROOT / "benchmarks" / "ablations" / f"{Path(name).stem.removeprefix('metadd_')}.yaml"
        rows = [json.loads(line) for line in text.splitlines()]
        return ablation_table(yaml.safe_load(experiment.read_text(encoding="utf-8")), rows) + "\n"
    record = json.loads(text)
    if isinstance(record, list):
        return markdown([Row(**row) for row in record])
    return markdown([Row(**row) for row in record["rows"]]) + costs(record["runs"]) + made_with(record["made_with"])


def costs(runs: list[dict[str, Any]]) -> str:
    """Return the table of what distilling took; a method's first run trains the networks that the later ones reuse."""
    lines = ["", "| method | minutes per set | peak memory [MB] |", "|---|---|---|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        minutes = sorted({f"{run['seconds'] / 60:.1f}" for run in own}, key=float)
        time = minutes[0] if len(minutes) == 1 else f"{minutes[0]} to {minutes[-1]}"
        lines.append(f"| {method} | {time} | {max(run['peak_mb'] for run in own)} |")
    return "\n".join(lines) + "\n"


def made_with(record: dict[str, str]) -> str:
    """Return the line that says what a result was made with."""
    return "\nMade with `{command}` at commit {commit}, on {hardware}; {versions}.\n".format(**record)


def filled(text: str) -> str:
    """Return a page with its tables made from the recorded rows."""
    return _PATTERN.sub(lambda found: found[1] + rendered(found["name"]) + found[3], text)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if check:
            stale += filled(text) != text
        else:
            write_text(page, filled(text))
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
