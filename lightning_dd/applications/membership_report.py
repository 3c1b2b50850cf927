"""The report of a membership experiment: one table as JSON, CSV and Markdown, and the accuracy-privacy figure."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_dd.applications import ATTACKS
from lightning_dd.applications.attacks import GRIDS
from lightning_dd.report import markdown_table, write_results
from lightning_dd.statistics import Score, nested_score


@dataclass(frozen=True)
class Row:
    """One attack on one victim after one training length; rates and accuracies in [0, 1]."""

    source: str
    """What the victim was trained on."""
    seed: int
    """Of the members, and of the distillation."""
    victim: int
    images: int
    """Size of the victim's training set."""
    steps: int
    accuracy: float
    """On held-out images."""
    member_accuracy: float
    attack: str
    auc: float
    tpr_at_01_percent: float | None
    """True-positive rate at 0.1 % false positives; none where there are fewer than 1,000 non-members."""
    tpr_at_1_percent: float | None
    members: int
    non_members: int


def spread(rows: Sequence[Row], name: str) -> Score | None:
    """Summarise a number of several victims, by seed; ``None`` if it is missing."""
    by_seed: dict[Hashable, list[float]] = {}
    for row in rows:
        value = getattr(row, name)
        if value is None:
            return None
        by_seed.setdefault(row.seed, []).append(value)
    return nested_score(by_seed) if by_seed else None


def markdown(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Render areas under the ROC curve by source and length, and true-positive rates at the longest length."""
    attacks = [attack for attack in ATTACKS if any(row.attack == attack for row in rows)]
    titles = [ATTACKS[attack] for attack in attacks]
    table = [["trained on", "images", "steps", "accuracy", "members' accuracy", *titles]]
    rates = [["trained on", "false positives", *titles]]
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        lengths = sorted({row.steps for row in own})
        for steps in lengths:
            cell = [row for row in own if row.steps == steps]
            first = [row for row in cell if row.attack == cell[0].attack]
            accuracies = [_percent(spread(first, name)) for name in ("accuracy", "member_accuracy")]
            areas = [_area(spread([row for row in cell if row.attack == attack], "auc")) for attack in attacks]
            table.append([source, str(own[0].images), str(steps), *accuracies, *areas])
        last = [row for row in own if row.steps == lengths[-1]]
        for label, name in (("0.1 %", "tpr_at_01_percent"), ("1 %", "tpr_at_1_percent")):
            cells = [_percent(spread([row for row in last if row.attack == attack], name)) for attack in attacks]
            rates.append([source, label, *cells])
    return f"{markdown_table(table)}\n\n{_explanation(rows, notes)}\n\n{markdown_table(rates)}\n\n{_resolution(rows)}\n"


def write_report(rows: Sequence[Row], folder: Path, notes: Sequence[str] = ()) -> None:
    """Write ``results.json``, ``results.csv``, ``results.md`` and ``results.png``, each atomically."""
    write_results(folder, [asdict(row) for row in rows], markdown(rows, notes), privacy_figure(rows))


def privacy_figure(rows: Sequence[Row]) -> Figure:
    """Draw accuracy against the area under the ROC curve: a panel per attack, a curve over lengths per source."""
    attacks = [attack for attack in ATTACKS if any(row.attack == attack for row in rows)]
    columns = min(3, len(attacks))
    lines = -(-len(attacks) // columns)
    figure = Figure(figsize=(1 + 3.4 * columns, 0.8 + 3.0 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, attack in zip(panels, attacks, strict=False):
        _draw(panel, [row for row in rows if row.attack == attack])
        panel.set_title(ATTACKS[attack], fontsize=10)
    for panel in panels[len(attacks) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.supxlabel("accuracy on held-out images [%]; numbers are training steps", fontsize=10)
    figure.supylabel("attack's area under the ROC curve", fontsize=10)
    return figure


def _draw(panel: Axes, rows: Sequence[Row]) -> None:
    panel.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
    sources = dict.fromkeys(row.source for row in rows)
    for index, source in enumerate(sources):
        own = [row for row in rows if row.source == source]
        points = []
        for steps in sorted({row.steps for row in own}):
            cell = [row for row in own if row.steps == steps]
            accuracy, area = spread(cell, "accuracy"), spread(cell, "auc")
            assert accuracy is not None
            assert area is not None
            points.append((steps, accuracy, area))
        panel.errorbar(
            [100 * accuracy.mean for _, accuracy, _ in points],
            [area.mean for _, _, area in points],
            xerr=[100 * accuracy.std for _, accuracy, _ in points],
            yerr=[area.std for _, _, area in points],
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.7,
            capsize=2,
            color=f"C{index}",
            label=source,
        )
        for steps, accuracy, area in _apart(points):
            panel.annotate(
                f"{steps}",
                (100 * accuracy.mean, area.mean),
                textcoords="offset points",
                xytext=(-4, 4),
                ha="right",
                fontsize=7,
                color=f"C{index}",
            )
    panel.grid(alpha=0.3)


def _apart(points: Sequence[tuple[int, Score, Score]]) -> list[tuple[int, Score, Score]]:
    """Return the points of a curve that have room for a label: the last, and those away from the one labelled after."""
    labelled = [points[-1]]
    for point in reversed(points[:-1]):
        _, accuracy, area = labelled[-1]
        if abs(point[1].mean - accuracy.mean) > 0.02 or abs(point[2].mean - area.mean) > 0.05:
            labelled.append(point)
    return labelled


def _explanation(rows: Sequence[Row], notes: Sequence[str]) -> str:
    seeds, victims = len({row.seed for row in rows}), len({row.victim for row in rows})
    over = f"{seeds} seeds of {victims} victims" if seeds > 1 else f"{victims} victims"
    own = (
        "Accuracies in %; attacks by the area under the ROC curve, 0.5 being a guess; mean ± sample standard "
        f"deviation over {over}. {rows[0].members} members, {rows[0].non_members} held-out images."
    )
    given = {row.members for row in rows if row.source == rows[0].source and row.attack in GRIDS}
    if given - {rows[0].members}:
        own += f" Learned attacks: {min(given)} of either, cross-validated."
    return " ".join([own, *notes])


def _resolution(rows: Sequence[Row]) -> str:
    count = rows[0].non_members
    text = (
        "True-positive rates in % at the longest training length, at a false-positive rate of at most the one named. "
        f"{count} non-members resolve steps of {100 / count:.2g} %: "
    )
    if count < 1000:
        return text + "0.1 % cannot be measured."
    return text + f"0.1 % is {count // 1000} false positive(s)."


def _percent(value: Score | None) -> str:
    return "-" if value is None else str(value)


def _area(value: Score | None) -> str:
    return "-" if value is None else f"{value.mean:.3f} ± {value.std:.3f}"
