"""The report of an evaluation as one self-contained page, as a table for papers, and what it was made with."""

import base64
import csv
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dd.distilled.card import facts_of
from lightning_dd.distilled.export import pngs
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.evaluators.matrix import DISTILLED, Row
from lightning_dd.evaluators.report import Line, note, summarise
from lightning_dd.report import grouped
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.arguments import without_places
from lightning_dd.utils.board import SCORE
from lightning_dd.utils.files import write_text

_MOST_IMAGES, _MOST_POINTS = 100, 1000
_SCALE = 3  # screen pixels for each pixel of an image, for small ones
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left }
figure { display: inline-block; margin: .3em; text-align: center; font-size: 12px } img { max-width: 100% }
figure img { image-rendering: pixelated }
pre { background: #f6f6f6; padding: 1em; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def write_pages(
    folder: Path,
    rows: Sequence[Row],
    sets: Mapping[str, DistilledSet],
    made_with: Mapping[str, Any],
    files: Mapping[str, str | Path],
) -> None:
    """Write ``report.html``, ``results.tex``, ``classes.csv`` and ``provenance.json`` beside a report's other files.

    The page loads nothing: its pictures are inside, and there is no script.

    Args:
        folder: of the report; ``results.png`` is there already.
        rows: of all students.
        sets: by name.
        made_with: of :func:`provenance`.
        files: of the sets, by name; the curves of a run are shown where its folder is the set's.
    """
    lines = summarise(rows)
    short = short_names([line.architecture for line in lines])
    write_text(folder / "provenance.json", json.dumps(made_with, indent=1) + "\n")
    write_text(folder / "results.tex", latex(lines, short))
    write_text(folder / "classes.csv", _classes_csv(rows, sets))
    body = [
        "<h1>Distilled sets on architectures, seen and unseen</h1>",
        _table(_cells(lines, short)),
        f"<p>{escape(note(rows, lines).replace('`', ''))}</p>",
        _table([["short", "architecture"], *([name, whole] for whole, name in short.items())]),
        _picture((folder / "results.png").read_bytes(), "test accuracy by architecture"),
        *(_of_set(name, kept, by_class(rows, name, short), Path(files[name])) for name, kept in sets.items()),
        f"<h2>Made with</h2><pre>{escape(json.dumps(made_with, indent=1))}</pre>",
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>lightning_dd report</title>'
    write_text(folder / "report.html", "\n".join([head, f"<style>{_STYLE}</style>", *body, "</html>", ""]))


def provenance(
    sets: Mapping[str, DistilledSet],
    digests: Mapping[str, str],
    recipes: Mapping[str, Recipe],
    words: Sequence[str],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return what a report was made with: command, sets by hash and fingerprint, recipes and versions."""
    said = {
        name: {
            "blake2b": digests[name],
            "method": distilled.method,
            "data": distilled.data.get("name"),
            "fingerprint": distilled.data.get("fingerprint"),
        }
        for name, distilled in sets.items()
    }
    named = {name or "given": asdict(recipe) for name, recipe in recipes.items()}
    command = shlex.join(["lightning-dd", "evaluate", *without_places(list(words))])
    return {"command": command, "sets": said, "recipes": named, "versions": dict(versions)}


def short_names(architectures: Sequence[str]) -> dict[str, str]:
    """Return a short name for each architecture: its name without options, numbered where several share it.

    Example:
        >>> short_names(["convnet:width=4", "convnet:width=8", "resnet18"])
        {'convnet:width=4': 'convnet 1', 'convnet:width=8': 'convnet 2', 'resnet18': 'resnet18'}
    """
    whole = list(dict.fromkeys(architectures))
    bare = [name.partition(":")[0] for name in whole]
    return {
        name: own if bare.count(own) == 1 else f"{own} {bare[: place + 1].count(own)}"
        for place, (name, own) in enumerate(zip(whole, bare, strict=True))
    }


def latex(lines: Sequence[Line], short: Mapping[str, str]) -> str:
    """Return the table for a paper, with the rules of booktabs; short names are explained in comments."""
    head, *rows = _cells(lines, short)
    text = [r"% \usepackage{booktabs}", *(f"% {name}: {whole}" for whole, name in short.items())]
    text += [rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}", r"\toprule"]
    text += [" & ".join(map(_tex, head)) + r" \\", r"\midrule"]
    text += [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cells(lines: Sequence[Line], short: Mapping[str, str]) -> list[list[str]]:
    table = [["set", "architecture", "seen", "distilled", "random real", "gain"]]
    for line in lines:
        scores = [str(line.distilled), str(line.random_real), line.gain_text]
        table.append([line.set, short[line.architecture], "yes" if line.seen else "no", *scores])
    return table


def _tex(cell: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", cell).replace("±", r"$\pm$")


def _table(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in cells]
    return f"<table><tr>{head.replace('td>', 'th>')}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def by_class(rows: Sequence[Row], name: str, short: Mapping[str, str]) -> dict[str, list[float]]:
    """Return the mean accuracy of each class over a set's students, by short name of the architecture."""
    own = [row for row in rows if row.set == name and row.source == DISTILLED and row.by_class]
    by_architecture = grouped(own, lambda row: short[row.architecture])
    return {
        key: [fmean(values) for values in zip(*(row.by_class for row in some), strict=True)]
        for key, some in by_architecture.items()
    }


def _classes_csv(rows: Sequence[Row], sets: Mapping[str, DistilledSet]) -> str:
    """Return one line for each student and class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "architecture", "source", "seed", "protocol", "class", "accuracy"])
    for row in rows:
        for label, accuracy in zip(sets[row.set].class_names, row.by_class, strict=False):
            writer.writerow([row.set, row.architecture, row.source, row.seed, row.protocol, label, accuracy])
    return text.getvalue()


def _picture(png: bytes, caption: str, size: str = "") -> str:
    return f'<img alt="{caption}" {size} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _curves(file: Path) -> str:
    """Return what a run logged, where a set lies in its folder: its student's accuracy and its loss by outer step."""
    if file.stem not in ("best", "last") or not any(file.parent.glob("events.out.tfevents*")):
        return ""
    events = EventAccumulator(str(file.parent), size_guidance={"scalars": _MOST_POINTS}).Reload()
    tags = [tag for tag in (SCORE, "outer/loss") if tag in events.Tags()["scalars"]]
    if not tags:
        return ""
    figure, png = Figure(figsize=(4.5 * len(tags), 3), layout="constrained"), io.BytesIO()
    for axes, tag in zip(figure.subplots(1, len(tags), squeeze=False)[0], tags, strict=True):
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "")
        axes.set(xlabel="outer step", ylabel=tag)
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=100)
    return _picture(png.getvalue(), "curves of the run")


def _of_set(name: str, distilled: DistilledSet, accuracies: Mapping[str, Sequence[float]], file: Path) -> str:
    """Return a set's images and the names of their classes, accuracies of each, its run, and what it says of itself."""
    _, height, width = distilled.image_shape
    scale, figures = _SCALE if width <= 64 else 1, []
    for png, label in zip(islice(pngs(distilled), _MOST_IMAGES), distilled.classes.tolist(), strict=False):
        caption = escape(distilled.class_names[label])
        size = f'width="{scale * width}" height="{scale * height}"'
        figures.append(f"<figure>{_picture(png, caption, size)}<figcaption>{caption}</figcaption></figure>")
    facts = _table([["what", "is"], *([key, text] for key, text in facts_of(distilled).items())])
    columns = zip(distilled.class_names, *accuracies.values(), strict=True) if accuracies else []
    rows = [[label, *(f"{100 * value:.1f}" for value in values)] for label, *values in columns]
    classes = "<h3>Accuracy of each class, in %</h3>" + _table([["class", *accuracies], *rows]) if rows else ""
    return f"<h2>{escape(name)}</h2>{''.join(figures)}<br>{_curves(file)}{classes}<h3>The file</h3>{facts}"
