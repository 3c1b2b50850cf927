"""The report of an evaluation: one table as JSON, CSV and Markdown, and one figure."""

import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib
import matplotlib.colors
from matplotlib.figure import Figure

from lightning_dd.evaluators.matrix import DISTILLED, RANDOM_REAL, Row
from lightning_dd.report import draw_bars, grouped, markdown_table
from lightning_dd.statistics import Difference, Nested, Score, gain_interval, nested_score, paired_difference


@dataclass(frozen=True)
class Line:
    """One architecture on one set, or on a group of sets that differ in their distillation's seed alone."""

    set: str
    architecture: str
    seen: bool
    distilled: Score
    best: Score | None
    random_real: Score
    gain: tuple[float, float]
    """95 % interval of the distilled minus the random-real mean (bootstrap)."""
    gap: float | None
    """Mean accuracy minus that of the (first) seen architecture on the same set."""

    @property
    def gain_text(self) -> str:
        """The gain in points with its interval, which one student alone has not."""
        gain, (low, high) = 100 * (self.distilled.mean - self.random_real.mean), (100 * end for end in self.gain)
        return f"{gain:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if self.distilled.count > 1 else "")


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Reduce rows to one line per set (or group of sets) and architecture, the seen ones first."""
    lines: list[Line] = []
    for name, own in grouped(rows, _labels(rows)).items():
        cells = sorted(grouped(own, lambda row: row.architecture).values(), key=lambda cell: not cell[0].seen)
        reference: float | None = None
        for cell in cells:
            distilled = [row for row in cell if row.source == DISTILLED]
            real = _nested(row for row in cell if row.source == RANDOM_REAL)
            best = [row for row in distilled if row.accuracy_best is not None]
            score = nested_score(_nested(distilled))
            if cell[0].seen and reference is None:
                reference = score.mean
            lines.append(
                Line(
                    set=name,
                    architecture=cell[0].architecture,
                    seen=cell[0].seen,
                    distilled=score,
                    best=nested_score(_nested(best, "accuracy_best")) if best else None,
                    random_real=nested_score(real),
                    gain=gain_interval(_nested(distilled), real),
                    gap=None if reference is None else score.mean - reference,
                )
            )
    return lines


def compare(rows: Sequence[Row]) -> dict[str, dict[str, Difference]]:
    """Compare every set (or group) with the first, paired by distillation seed, else by student seed.

    Returns:
        By set: the paired difference on the ``seen`` architectures, those that either of the two was distilled with,
        and on the mean of the ``unseen`` ones.
    """
    own = grouped((row for row in rows if row.source == DISTILLED), _group)
    nested = any(len({row.set for row in side}) > 1 for side in own.values())
    found: dict[str, dict[str, Difference]] = {}
    first, *others = own
    for name in others:
        pair = (own[name], own[first])
        seen = {row.architecture for side in pair for row in side if row.seen}
        for kind in ("seen", "unseen"):
            chosen = [[row for row in side if (row.architecture in seen) == (kind == "seen")] for side in pair]
            this, reference = (_by_seed(side, nested) for side in chosen)
            if set(this) & set(reference):
                found.setdefault(name, {})[kind] = paired_difference(this, reference)
    return found


def _by_seed(rows: Sequence[Row], nested: bool) -> dict[Hashable, float]:
    """Return mean accuracies by seed: of the distillation, where sets differ in it, else of the student."""
    by_seed = grouped(rows, lambda row: row.distillation_seed if nested else row.seed)
    return {seed: statistics.fmean(row.accuracy for row in own) for seed, own in by_seed.items()}


def markdown(rows: Sequence[Row]) -> str:
    """Render the table: accuracies in %, mean ± sample standard deviation over seeds."""
    lines = summarise(rows)
    with_set = len({line.set for line in lines}) > 1
    header = ["set"] if with_set else []
    header += ["architecture", "seen", "distilled (last)", "distilled (best)", "random real", "gain", "gap to seen"]
    table = [header]
    for line in lines:
        cells = [line.set] if with_set else []
        cells += [
            f"`{line.architecture}`",
            "yes" if line.seen else "no",
            str(line.distilled),
            str(line.best) if line.best else "-",
            str(line.random_real),
            line.gain_text,
            "-" if line.gap is None or line.seen else f"{100 * line.gap:+.1f}",
        ]
        table.append(cells)
    text = f"{markdown_table(table)}\n\n{note(rows, lines)}\n"
    for own in grouped(rows, lambda row: row.protocol).values():
        if differences := compare(own):
            text += "\n" + _paired_table(_labels(rows)(own[0]), differences)
    return text


def note(rows: Sequence[Row], lines: Sequence[Line]) -> str:
    """Say what the table shows, and first of all which sets were scored on other data than theirs."""
    stored = {(row.ipc, row.shown_ipc or 0) for row in rows}
    sizes = ", ".join(f"{ipc} (shown as {shown})" if shown else str(ipc) for ipc, shown in sorted(stored))
    steps = ", ".join(map(str, sorted({row.steps for row in rows})))
    students = max(line.distilled.count // line.distilled.sets for line in lines)
    many = max(line.distilled.sets for line in lines)
    over = f"{many} distilled sets of {students} students each" if many > 1 else f"{students} student seeds"
    alone = many == students == 1
    spread = "of one student" if alone else f"mean ± sample standard deviation over {over}"
    gain = "distilled less random real" if alone else "with its 95 % bootstrap interval"
    elsewhere = sorted({row.set for row in rows if row.other_data})
    warning = f"**Scored on other data than the set was made from:** {', '.join(elsewhere)}.\n\n" if elsewhere else ""
    sizes_of = {_group(row): row.label_bytes for row in rows if row.source == DISTILLED and row.label_bytes}
    labels = ", ".join(f"{name} {size / 1000:,.1f} kB" for name, size in sizes_of.items())
    stored_labels = f" Labels: {labels}." if len(set(sizes_of.values())) > 1 else ""
    return (
        f"{warning}Test accuracy in %, {spread}; {sizes} image(s) per class, "
        f"{steps} steps. "
        "`last` is the last step, `best` the step with the best validation accuracy. `random real`: as many random "
        f"real training images, drawn anew for each seed, same recipe, last step. `gain`: {gain}. "
        f"`seen`: the set was distilled with an architecture of that name.{stored_labels}"
    )


def _paired_table(reference: str, differences: dict[str, dict[str, Difference]]) -> str:
    table = [["set", "seen", "mean of unseen", "p (unseen)"]]
    for name, kinds in differences.items():
        cells = [str(kinds[kind]) if kind in kinds else "-" for kind in ("seen", "unseen")]
        p = f"{kinds['unseen'].p:.3f}" if "unseen" in kinds and kinds["unseen"].pairs > 1 else "-"
        table.append([name, *cells, p])
    note = f"Paired difference to `{reference}` in points with its 95 % interval (Student's t), paired by seed."
    return f"{markdown_table(table)}\n\n{note}\n"


def _group(row: Row) -> str:
    return row.group or row.set


def _labels(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return how sets are called in a report: with the protocol where there are several."""
    if len({row.protocol for row in rows}) < 2:
        return _group
    return lambda row: f"{_group(row)} ({row.protocol})"


def _nested(rows: Iterable[Row], field: str = "accuracy") -> Nested:
    """Collect accuracies by distilled set; random-real ones count as one set, for each is drawn anew."""
    by_set = grouped(rows, lambda row: row.set if row.source == DISTILLED else row.source)
    return {name: [getattr(row, field) for row in own] for name, own in by_set.items()}


_COLOURS = [f"C{index}" for index in range(10) if index != 7] + [  # without the grey, which is random real
    matplotlib.colors.to_hex(colour)
    for colour in matplotlib.colormaps["Set2"].colors  # type: ignore[attr-defined]
]


def bar_figure(lines: Sequence[Line]) -> Figure:
    """Draw one group of bars per architecture: every set, and random real images once for all sets they suit."""
    by_architecture = grouped(lines, lambda line: line.architecture)
    by_set = {
        name: {line.architecture: line for line in own} for name, own in grouped(lines, lambda line: line.set).items()
    }
    bars: list[tuple[str, Mapping[str, Score], str | None]] = []
    for (name, own), colour in zip(by_set.items(), cycle(_COLOURS), strict=False):
        label = name if len(by_set) > 1 else "distilled"
        bars.append((label, {key: line.distilled for key, line in own.items()}, colour))
    greys = iter(("0.75", "0.6", "0.45"))
    for names in _of_equal_baseline(by_set):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        label = f"random real ({names[0]}{others})" if len(names) < len(by_set) else "random real"
        scores = {key: line.random_real for key, line in by_set[names[0]].items()}
        bars.append((label, scores, next(greys, "0.3")))
    figure = Figure(figsize=(2 + max(1.3, 0.2 * len(bars)) * len(by_architecture), 4), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, bars, list(by_architecture))
    ticks = [
        _wrapped(name) + ("\n(seen)" if all(line.seen for line in own) else "") for name, own in by_architecture.items()
    ]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_ylabel("test accuracy [%]")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    if len(bars) > 4:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False, loc="upper right", fontsize=8)
    return figure


def _of_equal_baseline(by_set: Mapping[str, Mapping[str, Line]]) -> list[list[str]]:
    """Group sets whose random-real scores are the same students': those of one size, label form and recipe."""
    students = {name: tuple((key, line.random_real.mean) for key, line in own.items()) for name, own in by_set.items()}
    return list(grouped(by_set, students.__getitem__).values())


def _wrapped(architecture: str) -> str:
    """Break ``name:option=value,...`` into short lines for an axis label."""
    name, _, options = architecture.partition(":")
    name = re.sub(r"(?<=\w{12})_(?=\w)", "_\n", name, count=1)
    return name + ("\n" + re.sub(r",(?![^\[]*\])", "\n", options) if options else "")
