"""The report of a membership experiment: one table as JSON, CSV and Markdown, and the accuracy-privacy figure."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_dd.applications import ATTACKS
from lightning_dd.applications.attacks import GRIDS
from lightning_dd.report import grouped, markdown_table
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


def score_of(rows: Sequence[Row], name: str) -> Score:
    """Summarise a number of several victims, by seed."""
    by_seed = grouped(rows, lambda row: row.seed)
    values: dict[Hashable, list[float]] = {seed: [getattr(row, name) for row in own] for seed, own in by_seed.items()}
    return nested_score(values)


def markdown(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Render areas under the ROC curve by source and length, and true-positive rates at the longest length."""
    attacks = [attack for attack in ATTACKS if any(row.attack == attack for row in rows)]
    titles = [ATTACKS[attack] for attack in attacks]
    table = [["trained on", "images", "steps", "accuracy", "members' accuracy", *titles]]
    rates = [["trained on", "false positives", *titles]]
    for source, own in grouped(rows, lambda row: row.source).items():
        by_length = {steps: grouped(cell, lambda row: row.attack) for steps, cell in _by_length(own).items()}
        for steps, by_attack in by_length.items():
            first = next(iter(by_attack.values()))
            accuracies = [_cell(first, "accuracy"), _cell(first, "member_accuracy")]
            areas = [_cell(by_attack.get(attack, []), "auc", _share) for attack in attacks]
            table.append([source, str(own[0].images), str(steps), *accuracies, *areas])
        last = by_length[max(by_length)]
        for label, name in (("0.1 %", "tpr_at_01_percent"), ("1 %", "tpr_at_1_percent")):
            rates.append([source, label, *(_cell(last.get(attack, []), name) for attack in attacks)])
    return f"{markdown_table(table)}\n\n{_explanation(rows, notes)}\n\n{markdown_table(rates)}\n\n{_resolution(rows)}\n"


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
    for index, (source, own) in enumerate(grouped(rows, lambda row: row.source).items()):
        cells = _by_length(own)
        accuracy, area = ([score_of(cell, name) for cell in cells.values()] for name in ("accuracy", "auc"))
        x, y = [100 * score.mean for score in accuracy], [score.mean for score in area]
        panel.errorbar(
            x,
            y,
            xerr=[100 * score.std for score in accuracy],
            yerr=[score.std for score in area],
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.7,
            capsize=2,
            color=f"C{index}",
            label=source,
        )
        labelled: list[tuple[float, float]] = []
        for steps, *place in reversed(list(zip(cells, x, y, strict=True))):
            # A number is left out where it would stand on the one of a greater length.
            if labelled and abs(place[0] - labelled[-1][0]) <= 2 and abs(place[1] - labelled[-1][1]) <= 0.05:
                continue
            labelled.append((place[0], place[1]))
            panel.annotate(
                f"{steps}",
                labelled[-1],
                textcoords="offset points",
                xytext=(-4, 4),
                ha="right",
                fontsize=7,
                color=f"C{index}",
            )
    panel.grid(alpha=0.3)


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


def _by_length(rows: Sequence[Row]) -> dict[int, list[Row]]:
    return dict(sorted(grouped(rows, lambda row: row.steps).items()))


def _cell(rows: Sequence[Row], name: str, text: Callable[[Score], str] = str) -> str:
    missing = not rows or any(getattr(row, name) is None for row in rows)
    return "-" if missing else text(score_of(rows, name))


def _share(score: Score) -> str:
    return f"{score.mean:.3f}" + (f" ± {score.std:.3f}" if score.count > 1 else "")
