"""The figures of a plan's recorded rows: what each setting changes, and how far students of every budget come."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from plans import PLANS, read_plan
from transfer_tables import Row, half_interval, whole

_UNSEEN, _OWN = "#1f6f8b", "#d1603d"
_STYLES = {"hard": "-", "soft": "--", "learned": ":"}


def figure(path: Path) -> Figure:
    """Draw a record: levels by the students' steps where the plan compares budgets, else changes of each setting."""
    record = json.loads(path.read_text(encoding="utf-8"))
    plan = read_plan(PLANS / f"{path.stem.removeprefix('transfer_')}.yaml")
    scored = [row for row in record["transfer"] if "accuracy" in row]
    own = {name: base["own"] for name, base in plan["bases"].items()}
    return by_budget(scored, plan, set(own.values())) if "against" in plan else changes(scored, own)


def changes(scored: list[Row], own: dict[str, str]) -> Figure:
    """Draw a line for each setting: every pair, their mean, and a 95 % interval where there are three pairs or more."""
    names = [name for name in dict.fromkeys(row["architecture"] for row in scored) if name not in own.values()]
    lines = list(differences(scored, own, names))
    drawn = Figure(figsize=(7.5, 1 + 0.26 * len(lines)), layout="constrained")
    axes = drawn.subplots()
    axes.axvline(0, color="0.6", linewidth=1)
    kinds = (("networks never seen, mean", _UNSEEN, "o", 0.0), ("the own network", _OWN, "D", 0.22))
    for place, (_, *found) in enumerate(lines):
        for (label, colour, marker, shift), pairs in zip(kinds, found, strict=True):
            if not pairs:
                continue
            y, mean, half = place + shift, statistics.fmean(pairs), half_interval(pairs)
            axes.plot(pairs, [y] * len(pairs), "|", color=colour, alpha=0.6)
            axes.plot([mean - half, mean + half], [y, y], color=colour, linewidth=1.5)
            axes.plot(mean, y, marker, color=colour, markersize=5, label=None if place else label)
    axes.set_yticks(range(len(lines)), [title for title, *_ in lines])
    axes.set_ylim(len(lines), -1)
    axes.set_xlabel("change of accuracy in points, in pairs of one seed")
    axes.grid(axis="x", alpha=0.3)
    drawn.legend(loc="outside upper right", ncols=2, frameon=False)
    return drawn


def differences(
    scored: list[Row], own: dict[str, str], names: list[str]
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Yield base and setting, and the changes of the mean over ``names`` and of the own network, a pair each."""
    bases = list(dict.fromkeys(row["base"] for row in scored))
    kinds = dict.fromkeys((row["base"], row["setting"]) for row in scored)
    for base, setting in sorted(kinds, key=lambda kind: bases.index(kind[0])):
        found = []
        for group in (names, [own[base]]):
            new, old = (whole(scored, base, which, [group]) for which in (setting, "base"))
            pairs = [seed for seed in new if seed in old]
            found.append([statistics.fmean(new[seed][name] - old[seed][name] for name in group) for seed in pairs])
        if setting != "base" and found[0]:
            yield f"{base} {setting}", found[0], found[1]


def by_budget(scored: list[Row], plan: dict[str, Any], own: set[str]) -> Figure:
    """Draw the mean accuracy over unseen networks by the students' steps: a colour for images, a style for labels."""
    rows = [row for row in scored if row["architecture"] not in own]
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    drawn = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = drawn.subplots()
    colours: dict[str, str] = {}
    for base, setting in dict.fromkeys((row["base"], row["setting"]) for row in rows):
        kind = "soft" if "labels" in plan["settings"][setting] else plan.get("kinds", {}).get(setting, "hard")
        images = " + ".join([base, *(part for part in setting.split("_") if part not in ("base", "soft"))])
        colour = colours.setdefault(images, f"C{len(colours)}")
        points = {}
        for steps in sorted({row["steps"] for row in rows}):
            scores = whole([row for row in rows if row["steps"] == steps], base, setting, [names])
            if scores:
                points[steps] = statistics.fmean(statistics.fmean(each.values()) for each in scores.values())
        label = f"{images}, {kind}"
        axes.plot([*points], [*points.values()], _STYLES[kind], marker="o", markersize=4, color=colour, label=label)
    axes.set_xscale("log")
    ticks = sorted({row["steps"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("steps of a student")
    axes.set_ylabel("test accuracy in %, mean of unseen networks")
    axes.grid(alpha=0.3)
    drawn.legend(loc="outside right upper", frameon=False, fontsize="small", title="images, labels")
    return drawn
