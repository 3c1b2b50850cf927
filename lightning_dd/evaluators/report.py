"""The report of an evaluation: one table as JSON, CSV and Markdown, and one figure."""

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lightning_dd.evaluators.matrix import DISTILLED, RANDOM_REAL, Row
from lightning_dd.files import write_atomically, write_text


@dataclass(frozen=True)
class Score:
    """Mean and sample standard deviation over seeds, in [0, 1]."""

    mean: float
    std: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f}"


@dataclass(frozen=True)
class Line:
    """One architecture on one set."""

    set: str
    architecture: str
    seen: bool
    distilled: Score
    best: Score | None
    random_real: Score
    gap: float | None
    """Mean accuracy minus that of the (first) seen architecture on the same set."""


def score(values: Sequence[float]) -> Score:
    """Summarise accuracies of several seeds.

    Example:
        >>> str(score([0.5, 0.7]))
        '60.0 ± 14.1'
    """
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Reduce rows to one line per set and architecture, the seen ones first."""
    lines: list[Line] = []
    for name in dict.fromkeys(row.set for row in rows):
        own = [row for row in rows if row.set == name]
        architectures = sorted(dict.fromkeys((row.architecture, row.seen) for row in own), key=lambda pair: not pair[1])
        reference: float | None = None
        for architecture, seen in architectures:
            cell = [row for row in own if row.architecture == architecture]
            distilled = [row for row in cell if row.source == DISTILLED]
            best = [row.accuracy_best for row in distilled if row.accuracy_best is not None]
            mean = score([row.accuracy for row in distilled])
            if seen and reference is None:
                reference = mean.mean
            lines.append(
                Line(
                    set=name,
                    architecture=architecture,
                    seen=seen,
                    distilled=mean,
                    best=score(best) if best else None,
                    random_real=score([row.accuracy for row in cell if row.source == RANDOM_REAL]),
                    gap=None if reference is None else mean.mean - reference,
                )
            )
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """Render the table: accuracies in %, mean ± sample standard deviation over seeds."""
    lines = summarise(rows)
    with_set = len({line.set for line in lines}) > 1
    header = ["set"] if with_set else []
    header += ["architecture", "seen", "distilled (last)", "distilled (best)", "random real", "gain", "gap to seen"]
    table = [header, ["---"] * len(header)]
    for line in lines:
        gain = 100 * (line.distilled.mean - line.random_real.mean)
        cells = [line.set] if with_set else []
        cells += [
            f"`{line.architecture}`",
            "yes" if line.seen else "no",
            str(line.distilled),
            str(line.best) if line.best else "-",
            str(line.random_real),
            f"{gain:+.1f}",
            "-" if line.gap is None or line.seen else f"{100 * line.gap:+.1f}",
        ]
        table.append(cells)
    first = rows[0]
    seeds = max(line.distilled.count for line in lines)
    note = (
        f"Test accuracy in %, mean ± sample standard deviation over {seeds} student seeds; {first.ipc} image(s) per "
        f"class, {first.steps} steps. `last` is the last step, `best` the step with the best validation accuracy. "
        "`random real`: as many random real training images, drawn anew for each seed, same recipe, last step. "
        "`seen`: the set was distilled with an architecture of that name."
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table) + f"\n\n{note}\n"


def write_report(rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Write ``results.json``, ``results.csv``, ``results.md`` and ``results.png``, each atomically.

    Returns:
        The paths by suffix.
    """
    records = [asdict(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    figure = bar_figure(summarise(rows))
    return {
        "json": write_text(folder / "results.json", json.dumps(records, indent=1) + "\n"),
        "csv": write_text(folder / "results.csv", text.getvalue()),
        "md": write_text(folder / "results.md", markdown(rows)),
        "png": write_atomically(folder / "results.png", lambda path: figure.savefig(path, dpi=120)),
    }


def bar_figure(lines: Sequence[Line]) -> Figure:
    """Draw one group of bars per architecture: every set, and random real images beside it."""
    sets = list(dict.fromkeys(line.set for line in lines))
    architectures = list(dict.fromkeys(line.architecture for line in lines))
    figure = Figure(figsize=(2 + 1.3 * len(architectures), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / (2 * len(sets))
    for index, name in enumerate(sets):
        own = {line.architecture: line for line in lines if line.set == name}
        places = [architectures.index(architecture) for architecture in own]
        real = f"random real ({name})" if len(sets) > 1 else "random real"
        bars = (
            (2 * index, name if len(sets) > 1 else "distilled", [line.distilled for line in own.values()], f"C{index}"),
            (2 * index + 1, real, [line.random_real for line in own.values()], "0.75"),
        )
        for offset, label, scores, colour in bars:
            axes.bar(
                [place + (offset - len(sets) + 0.5) * width for place in places],
                [100 * value.mean for value in scores],
                width,
                yerr=[100 * value.std for value in scores],
                label=label,
                color=colour,
                capsize=2,
            )
    seen = {line.architecture for line in lines if line.seen}
    ticks = [_wrapped(name) + ("\n(seen)" if name in seen else "") for name in architectures]
    axes.set_xticks(range(len(architectures)), ticks, fontsize=8)
    axes.set_ylabel("test accuracy [%]")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    return figure


def _wrapped(architecture: str) -> str:
    """Break ``name:option=value,...`` into short lines for an axis label."""
    name, _, options = architecture.partition(":")
    return name + ("\n" + re.sub(r",(?![^\[]*\])", "\n", options) if options else "")
