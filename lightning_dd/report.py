"""The four files every experiment ends in: one table for programs, spreadsheets and readers, and one figure."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_dd.statistics import Score
from lightning_dd.utils.errors import printable
from lightning_dd.utils.files import write_atomically, write_text

Item = TypeVar("Item")
Key = TypeVar("Key")


def write_results(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    markdown: str,
    figure: Figure,
    show: bool = True,
) -> None:
    """Write ``results.json``, ``results.csv``, ``results.md`` and ``results.png``, each atomically.

    Args:
        folder: made where it is missing.
        records: at least one, all with the same names; a spreadsheet holds no dictionaries among their values.
        markdown: the table for readers.
        figure: the picture.
        show: print the table as well, and where the files are.
    """
    columns = [name for name, value in records[0].items() if not isinstance(value, dict)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_in_a_cell(record[name]) for name in columns] for record in records)
    write_text(folder / "results.json", json.dumps(records, indent=1) + "\n")
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "results.md", markdown)
    write_atomically(folder / "results.png", lambda path: figure.savefig(path, dpi=120))
    if show:
        print(f"\n{markdown}\nreport: {folder}/results.md, .json, .csv; figure: {folder}/results.png")


def _in_a_cell(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def draw_bars(axes: Axes, bars: Sequence[tuple[str, Mapping[str, Score], str | None]], places: Sequence[str]) -> None:
    """Draw scores in % with their deviations, side by side at every place.

    Args:
        axes: the panel.
        bars: label, scores by place (none where there is no score) and colour (matplotlib's next one if ``None``).
        places: from left to right.
    """
    width = 0.8 / len(bars)
    for index, (label, scores, colour) in enumerate(bars):
        axes.bar(
            [places.index(place) + (index - (len(bars) - 1) / 2) * width for place in scores],
            [100 * score.mean for score in scores.values()],
            width,
            yerr=[100 * score.std for score in scores.values()],
            label=label,
            color=colour,
            capsize=2,
        )


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Collect items by a key, in the order in which the keys first appear.

    Example:
        >>> grouped(["bear", "ape", "bee"], lambda word: word[0])
        {'b': ['bear', 'bee'], 'a': ['ape']}
    """
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    r"""Render rows of cells, the first of them the heading; what a cell quotes cannot end it.

    Example:
        >>> print(markdown_table([["a", "b"], ["1", "x|y"]]))
        | a | b |
        | --- | --- |
        | 1 | x\|y |
    """
    rows = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
