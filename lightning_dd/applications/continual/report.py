"""The report of a continual experiment: forgetting, one table in four forms, and curves."""

import statistics
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lightning_dd.applications.continual.plan import JOINT
from lightning_dd.report import markdown_table, write_results
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
    """By class in order of their coming, mean over students."""


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
        class_accuracy: after every step, the accuracy of each class seen so far, in order of their coming.

    Example:
        >>> forgetting([[0.9, 0.7], [0.6, 0.7, 1.0]])
        [0.0, 0.15]
    """
    values = [0.0]
    for step in range(1, len(class_accuracy)):
        old = range(len(class_accuracy[step - 1]))
        falls = [
            max(row[label] for row in class_accuracy[:step] if label < len(row)) - class_accuracy[step][label]
            for label in old
        ]
        values.append(round(statistics.fmean(falls), 12))
    return values


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Reduce rows to one curve per method and architecture, in the order of the rows, the upper line last."""
    several = len({row.architecture for row in rows}) > 1
    keys = list(dict.fromkeys((row.method, row.architecture) for row in rows))
    found = []
    for method, architecture in sorted(keys, key=lambda key: key[0] == JOINT):
        own = [row for row in rows if (row.method, row.architecture) == (method, architecture)]
        steps = sorted({row.step for row in own})
        at = [[row for row in own if row.step == step] for step in steps]
        orders = list(dict.fromkeys(row.order for row in own))
        means: dict[Hashable, list[float]] = {
            order: [
                statistics.fmean(steps)
                for steps in zip(*(row.students for row in own if row.order == order), strict=True)
            ]
            for order in orders
        }
        found.append(
            Curve(
                label=f"{method} ({architecture})" if several else method,
                method=method,
                classes=tuple(step_rows[0].classes for step_rows in at),
                accuracy=tuple(nested_score({row.order: row.students for row in step_rows}) for step_rows in at),
                forgetting=tuple(nested_score({row.order: [row.forgetting] for row in step_rows}) for step_rows in at),
                average=nested_score(means),
            )
        )
    return found


def markdown(rows: Sequence[Row]) -> str:
    """Render the table: accuracies in %, mean ± sample standard deviation over class orders."""
    lines = curves(rows)
    header = ["memory", *(f"{count} classes" for count in lines[0].classes), "mean of steps", "forgetting"]
    table = [header]
    table += [
        [line.label, *(_text(score) for score in (*line.accuracy, line.average, line.forgetting[-1]))] for line in lines
    ]
    memory = [row for row in rows if row.method != JOINT] or list(rows)
    per_class = memory[0].images / memory[0].classes
    orders, students = len({row.order for row in rows}), len(rows[0].students)
    over = "class orders" if orders > 1 else "students"
    note = (
        f"Test accuracy in % on all classes seen so far, mean ± sample standard deviation over {over} ({orders} "
        f"order(s), {students} student(s) each, trained from scratch after every step with one output per class seen); "
        f"{per_class:g} image(s) kept per class. `forgetting`: after the last step, mean over old classes of the best "
        f"earlier accuracy minus the present one, in points."
    )
    if any(row.method == JOINT for row in rows):
        note += f" `{JOINT}`: all real training images of the classes seen, the upper line."
    return f"{markdown_table(table)}\n\n{note}\n"


def write_report(rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Write ``results.json``, ``.csv``, ``.md`` and ``.png``, each atomically, and one TensorBoard run per method.

    Returns:
        The paths by suffix.
    """
    records = [asdict(row) for row in rows]
    flat = [{name: value for name, value in record.items() if name != "class_accuracy"} for record in records]
    for record in flat:
        record["students"] = " ".join(map(str, record["students"]))
    lines = curves(rows)
    write_tensorboard(lines, folder / "tensorboard")
    return write_results(folder, records, markdown(rows), curve_figure(lines), flat)


def write_tensorboard(lines: Sequence[Curve], folder: Path) -> None:
    """Write the curves as scalars over the number of classes seen, one run per curve, in place of older ones."""
    for line in lines:
        run = folder / line.label.replace("/", "-")
        for old in run.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(run)) as board:
            for count, accuracy, fallen in zip(line.classes, line.accuracy, line.forgetting, strict=True):
                board.add_scalar("continual/accuracy", accuracy.mean, count)
                board.add_scalar("continual/accuracy_std", accuracy.std, count)
                board.add_scalar("continual/forgetting", fallen.mean, count)


def curve_figure(lines: Sequence[Curve]) -> Figure:
    """Draw accuracy and forgetting over the classes seen; bands are one standard deviation over class orders."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, line in enumerate(lines):
        joint = line.method == JOINT
        style = ("0.35", "--") if joint else (f"C{index}", "-")
        _draw(left, line.classes, line.accuracy, line.label, *style)
        _draw(right, line.classes, line.forgetting, line.label, *style)
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


def _text(score: Score) -> str:
    return str(score) if score.count > 1 else f"{100 * score.mean:.1f}"


def _draw(axes: Axes, classes: Sequence[int], scores: Sequence[Score], label: str, colour: str, linestyle: str) -> None:
    mean = [100 * score.mean for score in scores]
    low = [100 * (score.mean - score.std) for score in scores]
    high = [100 * (score.mean + score.std) for score in scores]
    axes.plot(classes, mean, marker="o", markersize=3, label=label, color=colour, linestyle=linestyle)
    axes.fill_between(classes, low, high, color=colour, alpha=0.15, linewidth=0)
