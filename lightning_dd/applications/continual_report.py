"""The report of a continual experiment: forgetting, one table in four forms, and curves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lightning_dd.applications import JOINT
from lightning_dd.report import grouped, markdown_table, write_results
from lightning_dd.statistics import Score, nested_score


@dataclass(frozen=True)
class Row:
    """One method after one step of one class order; accuracies in [0, 1]."""

    method: str
    architecture: str
    order: int
    step: int
    """From 1."""
    classes: int
    """Classes seen so far."""
    images: int
    """Images the students learned from."""
    accuracy: float
    """On the test images of all classes seen, mean over students."""
    forgetting: float
    """See :func:`forgetting`."""
    students: tuple[float, ...]
    """The accuracy of each student."""
    class_accuracy: dict[str, float]
    """By class in the order of arrival, mean over students."""


@dataclass(frozen=True)
class Curve:
    """A method over the steps, over class orders."""

    label: str
    method: str
    classes: tuple[int, ...]
    accuracy: tuple[Score, ...]
    forgetting: tuple[Score, ...]
    average: Score
    """Mean accuracy over all steps (average incremental accuracy)."""


def forgetting(class_accuracy: Sequence[Sequence[float]]) -> list[float]:
    """Return the forgetting after every step: how far old classes fell from their best.

    After step t it is the mean over the classes seen before t of (best accuracy after any earlier step - accuracy now),
    class by class (Chaudhry et al. 2018, arXiv 1801.10112, who take tasks instead); 0 after the first step. Negative
    values mean that old classes gained. A learner trained from scratch forgets because the memory gets more classes
    to tell apart, and so does the upper line.

    Args:
        class_accuracy: after every step, the accuracy of each class seen so far, in the order of arrival.

    Example:
        >>> forgetting([[0.9, 0.7], [0.6, 0.7, 1.0]])
        [0.0, 0.15]
    """
    best, values = np.array([]), []
    for now in map(np.asarray, class_accuracy):
        seen = len(best)
        values.append(round(float((best - now[:seen]).mean()), 12) if seen else 0.0)
        best = np.concatenate([np.maximum(best, now[:seen]), now[seen:]])
    return values


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Reduce rows to one curve per method and architecture, in the order of the rows, the upper line last."""
    several = len({row.architecture for row in rows}) > 1
    found = []
    for (method, architecture), own in grouped(rows, lambda row: (row.method, row.architecture)).items():
        steps = list(grouped(own, lambda row: row.step).values())
        orders = grouped(own, lambda row: row.order).items()
        found.append(
            Curve(
                label=f"{method} ({architecture})" if several else method,
                method=method,
                classes=tuple(at[0].classes for at in steps),
                accuracy=tuple(nested_score({row.order: row.students for row in at}) for at in steps),
                forgetting=tuple(nested_score({row.order: [row.forgetting] for row in at}) for at in steps),
                average=nested_score({order: np.mean([row.students for row in at], axis=0) for order, at in orders}),
            )
        )
    return sorted(found, key=lambda curve: curve.method == JOINT)


def markdown(rows: Sequence[Row]) -> str:
    """Render the table: accuracies in %, mean ± sample standard deviation over class orders."""
    lines = curves(rows)
    table = [["memory", *(f"{count} classes" for count in lines[0].classes), "mean of steps", "forgetting"]]
    for line in lines:
        scores = (*line.accuracy, line.average, line.forgetting[-1])
        table.append([line.label, *(str(score) if score.count > 1 else f"{100 * score.mean:.1f}" for score in scores)])
    memory = next((row for row in rows if row.method != JOINT), rows[0])
    orders, students = len({row.order for row in rows}), len(rows[0].students)
    note = (
        f"Test accuracy in % on all classes seen so far, mean ± sample standard deviation over "
        f"{'class orders' if orders > 1 else 'students'} ({orders} order(s), {students} student(s) each, trained from "
        f"scratch after every step with one output per class seen); {memory.images / memory.classes:g} image(s) kept "
        "per class. `forgetting`: after the last step, mean over old classes of the best earlier accuracy minus the "
        "present one, in points."
    )
    if any(row.method == JOINT for row in rows):
        note += f" `{JOINT}`: all real training images of the classes seen, the upper line."
    return f"{markdown_table(table)}\n\n{note}\n"


def write_report(rows: Sequence[Row], folder: Path, show: bool = True) -> None:
    """Write the four files of an experiment, and one TensorBoard run per curve."""
    lines = curves(rows)
    write_results(folder, [asdict(row) for row in rows], markdown(rows), curve_figure(lines), show)
    for line in lines:
        _write_events(line, folder / "tensorboard" / line.label.replace("/", "-"))


def _write_events(line: Curve, folder: Path) -> None:
    """Write a curve as scalars over the number of classes seen, in place of an older one."""
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as board:
        for count, accuracy, fallen in zip(line.classes, line.accuracy, line.forgetting, strict=True):
            board.add_scalar("continual/accuracy", accuracy.mean, count)
            board.add_scalar("continual/accuracy_std", accuracy.std, count)
            board.add_scalar("continual/forgetting", fallen.mean, count)


def curve_figure(lines: Sequence[Curve]) -> Figure:
    """Draw accuracy and forgetting over the classes seen; bands are one standard deviation over class orders."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, line in enumerate(lines):
        colour, style = ("0.35", "--") if line.method == JOINT else (f"C{index}", "-")
        for axes, scores in ((left, line.accuracy), (right, line.forgetting)):
            mean, std = 100 * np.array([[score.mean, score.std] for score in scores]).T
            axes.plot(line.classes, mean, marker="o", markersize=3, label=line.label, color=colour, linestyle=style)
            axes.fill_between(line.classes, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    left.set_ylabel("test accuracy on classes seen [%]")
    right.set_ylabel("forgetting [points]")
    right.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    for axes in (left, right):
        axes.set_xlabel("classes seen")
        axes.set_xticks(lines[0].classes)
        axes.grid(alpha=0.3)
    left.set_ylim(top=102)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    return figure
