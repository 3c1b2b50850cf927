"""Record which lines of the package no test runs, from the report of pytest-cov.

    python -m pytest -n 2 --cov=lightning_dd --cov-report=json:runs/coverage.json
    python benchmarks/line_coverage.py runs/coverage.json

``make coverage`` does both. Rows go to ``benchmarks/results/coverage.json``; ``python benchmarks/tables.py`` writes
docs/robustness.md from them.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from environment import write_record

RESULTS = Path(__file__).parent / "results"


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each module with statements: how many there are, and the lines of those that were not run."""
    found = []
    for file, module in sorted(report["files"].items()):
        if module["summary"]["num_statements"]:
            said = {"module": file, "statements": module["summary"]["num_statements"]}
            found.append(said | {"missing": module["missing_lines"]})
    return found


def spans(lines: list[int]) -> str:
    """Return line numbers with neighbours joined.

    Example:
        >>> spans([3, 4, 5, 9])
        '3-5, 9'
    """
    breaks = [0, *(place for place, (a, b) in enumerate(pairwise(lines), 1) if b > a + 1), len(lines)]
    parts = [lines[start:end] for start, end in pairwise(breaks) if end > start]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def main() -> None:
    """Read and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path)
    options = parser.parse_args()
    report = json.loads(options.report.read_text(encoding="utf-8"))
    write_record(str(RESULTS / "coverage.json"), coverage=rows(report))


if __name__ == "__main__":
    main()
