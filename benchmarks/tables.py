"""Write the recorded results into the README's and docs/results.md's tables.

    python benchmarks/tables.py            # rewrite the tables
    python benchmarks/tables.py --check    # exit 1 if one is stale

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; NAME is a file of benchmarks/results.
Figures that a page shows from ``figures/NAME.png`` are drawn from NAME.json, unless checking. The demo's rows are those
`make demo` leaves in runs/demo/report/results.json.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from line_coverage import spans
from matplotlib.figure import Figure
from transfer_figures import figure as transfer_figure
from transfer_tables import rendered as transfer

from lightning_dd.applications import continual_report as continual
from lightning_dd.applications import membership_report as membership
from lightning_dd.cells import cells
from lightning_dd.evaluators.matrix import Row
from lightning_dd.evaluators.report import markdown
from lightning_dd.report import grouped, markdown_table
from lightning_dd.utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "transfer", "cells", "choose", "robustness", "scale")),
]
_LABELS = {"frepo": "learned", **dict.fromkeys(("random_soft", "rded", "sre2l"), "a teacher's")}
_PATTERN = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)
_FIGURE = re.compile(r"\(figures/([\w.-]+)\.png\)")


def rendered(name: str) -> str:
    """Return the table of a file of recorded rows.

    ``cells`` is what ``lightning-dd list cells`` knows; ``choose.NAME`` sums up NAME.json, a line for each method.
    """
    if name == "cells":
        return published_cells()
    if name.startswith("choose."):
        return choice(json.loads((RESULTS / f"{name.removeprefix('choose.')}.json").read_text(encoding="utf-8")))
    path = RESULTS / name
    record = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(record, list):
        return markdown([Row(**row) for row in record])
    if "continual" in record:
        return continual.markdown(continual_rows(record)) + made_with(record["made_with"])
    if "transfer" in record:
        return transfer(path) + made_with(record["made_with"])
    if "membership" in record:
        return membership.markdown(membership_rows(record)) + made_with(record["made_with"])
    measured = {
        "curves": curves,
        "vectorised": vectorised,
        "overhead": overhead,
        "memory": memory,
        "step": step,
        "speed": speed,
        "scale": scale,
        "parity": parity,
        "fuzz": plain,
        "kills": plain,
        "mutations": mutations,
        "coverage": coverage,
    }
    for kind in measured.keys() & record.keys():
        return measured[kind](record[kind]) + made_with(record["made_with"])
    cost = costs(record["runs"]) if "runs" in record else evaluation_cost(record["evaluation"])
    return markdown([Row(**row) for row in record["rows"]]) + cost + made_with(record["made_with"])


def published_cells() -> str:
    """Return the table of every published cell."""
    lines = [["`lightning-dd fit --config`", "paper [%]", "ours [%]", "students", "figure from", "settings from"]]
    for cell in cells():
        command = cell.command.removeprefix("lightning-dd fit --config ")
        facts = [cell.accuracy, cell.ours, f"`{cell.evaluate}`", cell.source, cell.settings]
        lines.append([f"`{command}`", *facts])
    return markdown_table(lines) + "\n"


def costs(runs: list[dict[str, Any]]) -> str:
    """Return the table of what distilling took; a method's first run trains the networks that the later ones reuse."""
    lines = [["method", "minutes per set", "peak memory [MB]"]]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        minutes = sorted({f"{run['seconds'] / 60:.1f}" for run in own}, key=float)
        time = minutes[0] if len(minutes) == 1 else f"{minutes[0]} to {minutes[-1]}"
        lines.append([method, time, str(max(run["peak_mb"] for run in own))])
    return f"\n{markdown_table(lines)}\n"


def choice(record: dict[str, Any]) -> str:
    """Return the table of what each method reached and took: means over sets and students of one experiment."""
    lines = [["method", "labels", "its own network", "another", "above random real", "minutes per set", "memory [MB]"]]
    rows = [row for row in record["rows"] if not row["protocol"]]
    for method in dict.fromkeys(run["method"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["method"] == method]
        own = [row for row in rows if row["set"].rpartition("-seed")[0] == method]

        def mean(source: str, seen: bool, own: list[dict[str, Any]] = own) -> float:
            return 100 * statistics.fmean(r["accuracy"] for r in own if r["source"] == source and r["seen"] == seen)

        seen, unseen = mean("distilled", True), mean("distilled", False)
        gains = [seen - mean("random-real", True), unseen - mean("random-real", False)]
        labels = _LABELS.get(method, "hard")
        minutes = statistics.median(run["seconds"] for run in runs) / 60
        cells = [f"{seen:.1f}", f"{unseen:.1f}", f"{gains[0]:+.1f} and {gains[1]:+.1f}", f"{minutes:.1f}"]
        lines.append([method, labels, *cells, str(max(run["peak_mb"] for run in runs))])
    return markdown_table(lines) + "\n"


def evaluation_cost(cost: dict[str, float]) -> str:
    """Return the line that says what one command took; memory is that of its largest process."""
    return f"\nThe whole command took {cost['seconds'] / 60:.1f} minutes and {cost['peak_mb']:g} MB.\n"


def curves(rows: list[dict[str, Any]]) -> str:
    """Return the table of runs' validation accuracies by outer step."""
    lines = [["run", "outer steps", "minutes", "validation accuracy by outer step [%]"]]
    for row in rows:
        points = ", ".join(f"{step:,}: {100 * value:.1f}" for step, value in row["curve"])
        lines.append([row["run"], f"{row['steps']:,}", f"{row['minutes']:g}", points])
    return markdown_table(lines) + "\n"


def overhead(rows: list[dict[str, Any]]) -> str:
    """Return the table of what MetaDD adds to its bases."""
    heads = ["base", "setting", "step [ms]", "with MetaDD", "", "peak memory [MB]", "with MetaDD", ""]
    lines = [heads]
    for row in rows:
        cells = [row["base"], row["setting"]]
        for name in ("step_ms", "peak_mb"):
            base, meta = row[name], row[f"{name}_metadd"]
            cells += [f"{base:g}", f"{meta:g}", f"{100 * (meta / base - 1):+.0f} %"]
        lines.append(cells)
    return markdown_table(lines) + "\n"


def memory(rows: list[dict[str, Any]]) -> str:
    """Return the table of what MetaDD's gradient takes, by the number of architectures."""
    lines = [["architectures", "way", "memory [MB]", "of the fewest", "seconds", "norm of the gradient"]]
    for row in rows:
        numbers = [f"{row['extra_mb']:.1f}", f"{row['relative_to_first']:.2f}", f"{row['seconds']:.2f}"]
        lines.append([str(row["networks"]), row["way"], *numbers, f"{row['gradient_norm']:.6g}"])
    return markdown_table(lines) + "\n"


def step(rows: list[dict[str, Any]]) -> str:
    """Return the table of the time of one outer step and its inner one."""
    lines = [["workload", "precision", "step [ms]", "quartiles [ms]", "peak memory [MB]"]]
    for row in rows:
        work = row["workload"]
        shape = " x ".join(map(str, work["shape"]))
        workload = f"{shape}, {work['ipc']} per class, width {work['width']}, {work['real_batch']} real"
        low, high = (1000 * seconds for seconds in row["quartiles_s"])
        times = [f"{1000 * row['median_s']:.1f}", f"{low:.1f} to {high:.1f}"]
        lines.append([workload, row["precision"], *times, f"{row['peak_mb']:.0f}"])
    return markdown_table(lines) + "\n"


def speed(rows: list[dict[str, Any]]) -> str:
    """Return the table of the time of a step alone and beside busy processes, and its share of the machine's limit."""
    by_work = grouped(rows, lambda row: row["work"])
    ((most,),) = ([row["flops"] / row["median_s"] for row in own] for own in [by_work.pop("limit")])
    beside = sorted({row["busy"] for row in rows} - {0})
    lines = [["work", "step [ms]", *(f"beside {count}" for count in beside), "of the limit", "peak memory [MB]"]]
    for work, (alone, *others) in by_work.items():
        times = {row["busy"]: f"{row['median_s'] / alone['median_s']:.1f}x" for row in others}
        share = 100 * alone["flops"] / alone["median_s"] / most
        took = [f"{1000 * alone['median_s']:.1f}", *(times.get(count, "") for count in beside)]
        lines.append([work, *took, f"{share:.0f} %", f"{alone['peak_mb']:.0f}"])
    limit = f"The limit, one large convolution in fp32, is {most / 1e9:.0f} GFLOP/s."
    return f"{markdown_table(lines)}\n\n{limit}\n"


def scale(rows: list[dict[str, Any]]) -> str:
    """Return the table of a step's time and memory by the size of the problem, with the powers that fit them best."""
    lines = [["work", "by", "sizes", "step [CPU ms]", "memory [MB]", "time grows as", "memory grows as"]]
    for (work, by), own in grouped(rows, lambda row: (row["work"], row["by"])).items():
        sizes, seconds, megabytes = ([row[name] for row in own] for name in ("size", "cpu_s", "mb"))
        told = [sizes, [f"{1000 * value:.0f}" for value in seconds], [f"{value:.0f}" for value in megabytes]]
        powers = [f"n^{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}" for values in (seconds, megabytes)]
        lines.append([work, by, *(", ".join(map(str, values)) for values in told), *powers])
    return f"{markdown_table(lines)}\n"


def parity(rows: list[dict[str, Any]]) -> str:
    """Return the table of what equals the official code; comparisons of one thing with one file share a row."""
    lines = [["part", "what", "compared with", "difference", "verdict"]]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["what"].partition(": ")[0], row["official"]), []).append(row)
    for (part, thing, official), group in groups.items():
        found = []
        for row in group:
            measure = row["what"].partition(": ")[2]
            value = [] if row["difference"] is None else [f"{row['difference']:.1g}"]
            note = f"({row['note']})" if value and row["note"] else row["note"]
            found.append(" ".join(word for word in (measure, *value, note) if word))
        verdicts = ", ".join(dict.fromkeys(row["verdict"] for row in group))
        lines.append([part, thing, f"`{official}`", "; ".join(found), verdicts])
    return markdown_table(lines) + "\n"


def plain(rows: list[dict[str, Any]]) -> str:
    """Return a table of rows as they are, a column for each name in one of them."""
    heads = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table([heads, *[[str(row.get(name, "-")) for name in heads] for row in rows]]) + "\n"


def mutations(rows: list[dict[str, Any]]) -> str:
    """Return the table of changed formulas, and of how many changes a test noticed."""
    lines = [["formula", "changed", "noticed", "by so many tests"]]
    for formula, own in grouped(rows, lambda row: row["formula"]).items():
        tests = [row["caught by"] for row in own if row["caught by"]]
        lines.append([formula, str(len(own)), str(len(tests)), str(len(set(tests)))])
    noticed = sum(row["caught by"] is not None for row in rows)
    return f"{markdown_table([*lines, ['all', str(len(rows)), str(noticed), '']])}\n"


def coverage(rows: list[dict[str, Any]]) -> str:
    """Return the share of statements that tests run, and the table of modules that have others."""
    whole, missed = sum(row["statements"] for row in rows), sum(len(row["missing"]) for row in rows)
    lines = [["module", "statements", "run", "lines not run"]]
    for row in sorted(rows, key=lambda row: -len(row["missing"])):
        if row["missing"]:
            share = 1 - len(row["missing"]) / row["statements"]
            lines.append([f"`{row['module']}`", str(row["statements"]), f"{100 * share:.0f} %", spans(row["missing"])])
    share = 100 * (1 - missed / whole)
    return f"{share:.1f} % of {whole:,} statements in {len(rows)} modules are run.\n\n{markdown_table(lines)}\n"


def vectorised(rows: list[dict[str, Any]]) -> str:
    """Return the table of seeds trained one after the other and together."""
    heads = ["architecture", "one after the other [ms]", "together [ms]", "ratio"]
    lines = [heads]
    for row in rows:
        cells = [f"`{row['architecture']}`", f"{row['sequential_ms']:.1f}"]
        cells += [f"{row['vmap_ms']:.1f}", f"{row['vmap_ms'] / row['sequential_ms']:.2f}"] if "vmap_ms" in row else []
        cells += ["-"] * (len(heads) - len(cells))
        lines.append(cells)
    return markdown_table(lines) + "\n"


def made_with(record: dict[str, str]) -> str:
    """Return the line that says what a result was made with."""
    return "\nMade with `{command}` at commit {commit}, on {hardware}; {versions}.\n".format(**record)


def continual_rows(record: dict[str, Any]) -> list[continual.Row]:
    """Return the rows of a continual experiment."""
    return [continual.Row(**{**row, "students": tuple(row["students"])}) for row in record["continual"]]


def membership_rows(record: dict[str, Any]) -> list[membership.Row]:
    """Return the rows of a membership experiment."""
    return [membership.Row(**row) for row in record["membership"]]


def figure_of(path: Path) -> Figure:
    """Draw the rows of an application, or of a plan of trials."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if "transfer" in record:
        return transfer_figure(path)
    if "continual" in record:
        return continual.curve_figure(continual.curves(continual_rows(record)))
    return membership.privacy_figure(membership_rows(record))


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
            for name in _FIGURE.findall(text):
                figure = figure_of(RESULTS / f"{name}.json")
                figure.savefig(page.parent / "figures" / f"{name}.png", dpi=110, metadata={"Software": None})
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
