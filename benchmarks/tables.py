"""Write the recorded results into the README's tables.

    python benchmarks/tables.py            # rewrite the tables
    python benchmarks/tables.py --check    # exit 1 if one is stale

The demo's rows are those `make demo` leaves in runs/demo/report/results.json.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from lightning_dd.evaluators.matrix import Row
from lightning_dd.evaluators.report import markdown
from lightning_dd.files import write_text

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def filled(text: str) -> str:
    """Return the README with its demo table made from the recorded rows."""
    rows = [Row(**record) for record in json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())]
    pattern = r"(<!-- demo table: [^>]*-->\n).*?(<!-- end of demo table -->)"
    return re.sub(pattern, lambda found: found[1] + markdown(rows) + found[2], text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    text = README.read_text(encoding="utf-8")
    if parser.parse_args().check:
        return int(filled(text) != text)
    write_text(README, filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
