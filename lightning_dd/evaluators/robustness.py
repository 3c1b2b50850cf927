"""Scores of a distilled set's images alone, with the help of labels and augmentation taken out (Li et al. 2025).

DD-Ranking (arXiv 2505.13300) compares accuracies in [0, 1] of students that differ in what they are trained on:

* label-robust score: ``alpha = w (own - random) - (1 - w) (all - hard)``, where ``own`` is the set with its labels,
  ``random`` random real images with the same labels, ``hard`` its images with one-hot labels and ``all`` the whole real
  training split;
* augmentation-robust score: ``beta = w (own - random) + (1 - w) (own' - random')``, the primed without augmentation.

Both are mapped to ``(e^x - e^-1) / (e - e^-1)``; ``w`` is a half. More is better; where nothing differs it is 0.27.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from lightning_dd.data.parts import DataChoice
from lightning_dd.distilled.set import DistilledSet, find_set
from lightning_dd.evaluators.evaluate import Bench, check_asked
from lightning_dd.evaluators.matrix import (
    ALL_REAL,
    DISTILLED,
    HARD_LABELS,
    RANDOM_REAL,
    SAME_LABELS,
    WITHOUT_VIEWS,
    Cell,
    Hardware,
)
from lightning_dd.report import draw_bars, grouped, markdown_table, write_results
from lightning_dd.statistics import Score, nested_score
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.silence import quiet_trainers

_OWN, _PLAIN, _FULL, _CONTROL = "own", "plain", "full", "control"
_SCORES = {"label_robust": "label-robust score", "augmentation_robust": "augmentation-robust score"}
_ACCURACIES = {
    "own": "own labels",
    "hard": "hard labels",
    "random": "random real, same labels",
    "plain": "not augmented",
    "random_plain": "random real, same labels, not augmented",
    "all_real": "all real",
}


def robust_score(difference: float) -> float:
    """Map a weighted difference of accuracies in [-1, 1] to [0, 1].

    Example:
        >>> robust_score(-1.0), robust_score(1.0), round(robust_score(0.0), 3)
        (0.0, 1.0, 0.269)
    """
    return (math.exp(difference) - math.exp(-1)) / (math.e - math.exp(-1))


@dataclass(frozen=True)
class Robustness:
    """Accuracies in [0, 1] of the students of one seed, by what they learned from, and the scores made of them."""

    set: str
    architecture: str
    seed: int
    own: float
    hard: float
    random: float
    plain: float
    random_plain: float
    all_real: float

    def label_robust(self, weight: float = 0.5) -> float:
        """Return the label-robust score."""
        return robust_score(weight * (self.own - self.random) - (1 - weight) * (self.all_real - self.hard))

    def augmentation_robust(self, weight: float = 0.5) -> float:
        """Return the augmentation-robust score."""
        return robust_score(weight * (self.own - self.random) + (1 - weight) * (self.plain - self.random_plain))


@quiet_trainers()
def score_files(
    files: Sequence[str],
    architectures: Sequence[str],
    output: str,
    seeds: int,
    recipe: Recipe,
    full: Recipe,
    control: str | None = None,
    data: DataChoice = DataChoice(),  # noqa: B008  (frozen)
    hardware: Hardware = Hardware(),  # noqa: B008
    workers: int | str = "auto",
) -> list[Robustness]:
    """Train the students that both scores need, and write the report; finished students are not trained again.

    The arguments are those of :func:`~lightning_dd.evaluators.evaluate.evaluate_files` and two more: ``full``, how
    students learn from the whole real training split (it has ``steps``), and ``control``, a file of random real images
    with soft labels of the same teacher, which sets with soft labels need.

    Returns:
        One record per set, architecture and seed; nothing on processes that do not write the report.
    """
    names, folder = check_asked(files, architectures, output, seeds, workers)
    if _CONTROL in names:
        raise UserError(f"a set must not be called '{_CONTROL}': rename {names[_CONTROL]}")
    recipes = {_OWN: recipe, _PLAIN: replace(recipe, augment="none"), _FULL: full}
    bench = Bench(names | ({_CONTROL: str(find_set(control))} if control else {}), recipes, folder, data, hardware)
    for name in names:
        _check_control(name, bench.sets[name], bench.sets.get(_CONTROL))
    architectures = bench.architectures(architectures)
    asked = {
        (name, architecture, seed): cells_of_scores(name, bench.sets[name], architecture, seed)
        for name in names
        for architecture in architectures
        for seed in range(seeds)
    }
    if not bench.train([cell for cells in asked.values() for cell in cells.values()], workers):
        return []
    records = [
        Robustness(*key, *(bench.row(cells[name]).accuracy for name in _ACCURACIES)) for key, cells in asked.items()
    ]
    write_results(folder, [_as_row(record) for record in records], markdown(records), _figure(records))
    return records


def cells_of_scores(name: str, distilled: DistilledSet, architecture: str, seed: int) -> dict[str, Cell]:
    """Return the students of one seed, by the accuracy of :class:`Robustness` they give."""

    def cell(source: str, protocol: str, of: str = name) -> Cell:
        return Cell(of, architecture, source, seed, protocol)

    soft, one_hot = distilled.label_kind == "soft", distilled.label_kind == "hard"
    same = RANDOM_REAL if one_hot else SAME_LABELS
    return {
        "own": cell(DISTILLED, _OWN),
        "hard": cell(DISTILLED if one_hot else HARD_LABELS, _OWN),
        "random": cell(DISTILLED, _OWN, _CONTROL) if soft else cell(same, _OWN),
        "plain": cell(WITHOUT_VIEWS if distilled.views else DISTILLED, _PLAIN),
        "random_plain": cell(WITHOUT_VIEWS, _PLAIN, _CONTROL) if soft else cell(same, _PLAIN),
        "all_real": cell(ALL_REAL, _FULL),
    }


def _check_control(name: str, distilled: DistilledSet, control: DistilledSet | None) -> None:
    if distilled.label_kind != "soft":
        return
    if control is None:
        raise UserError(
            f"'{name}' has a teacher's soft labels: give --control, a file of the distiller Random with soft labels"
        )
    if control.label_kind != "soft" or control.ipc != distilled.ipc:
        raise UserError(
            f"control: {control.ipc} image(s) per class with {control.label_kind} labels, "
            f"but '{name}' has {distilled.ipc} with soft ones"
        )


def markdown(records: Sequence[Robustness]) -> str:
    """Render the table: scores and accuracies in %, mean ± sample standard deviation over seeds."""
    lines = [["set", "architecture", *_SCORES.values(), *_ACCURACIES.values()]]
    for (name, architecture), scores in _summary(records).items():
        lines.append([name, f"`{architecture}`", *(str(scores[key]) for key in (*_SCORES, *_ACCURACIES))])
    seeds = len({record.seed for record in records})
    return f"{markdown_table(lines)}\n\nIn %, mean ± sample standard deviation over {seeds} student seeds.\n"


def _as_row(record: Robustness) -> dict[str, Any]:
    return asdict(record) | {name: getattr(record, name)() for name in _SCORES}


def _summary(records: Sequence[Robustness]) -> dict[tuple[str, str], dict[str, Score]]:
    """Return means over seeds of scores and accuracies, by set and architecture."""
    lines = grouped(map(_as_row, records), lambda row: (row["set"], row["architecture"]))
    return {
        line: {key: nested_score({line: [row[key] for row in own]}) for key in (*_SCORES, *_ACCURACIES)}
        for line, own in lines.items()
    }


def _figure(records: Sequence[Robustness]) -> Figure:
    """Draw both scores of every set, one panel per architecture."""
    by_panel = grouped(_summary(records).items(), lambda line: line[0][1])
    figure = Figure(figsize=(2 + 4 * len(by_panel), 3.5), layout="constrained")
    panels = figure.subplots(1, len(by_panel), squeeze=False)[0]
    for axes, (architecture, lines) in zip(panels, by_panel.items(), strict=True):
        sets = [name for (name, _), _ in lines]
        bars = [(label, {name: scores[key] for (name, _), scores in lines}, None) for key, label in _SCORES.items()]
        draw_bars(axes, bars, sets)
        axes.axhline(100 * robust_score(0.0), color="0.5", linestyle=":", label="no difference")
        axes.set_xticks(range(len(sets)), sets, fontsize=8, rotation=20)
        axes.set_title(architecture, fontsize=8)
        axes.set_ylabel("score [%]")
        axes.legend(frameon=False, fontsize=7)
    return figure
