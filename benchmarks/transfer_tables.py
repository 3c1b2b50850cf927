"""The tables of a plan's recorded rows: accuracies of a base, and what each setting changes, in pairs of one seed."""

import json
import statistics
from pathlib import Path
from typing import Any

from plans import PLANS, read_plan
from scipy.stats import t as student_t

from lightning_dd.report import markdown_table

Row = dict[str, Any]
_ENOUGH = 3
"""Pairs that give an interval."""


def rendered(path: Path) -> str:
    """Return the tables of a record, one for each split and each number of student steps."""
    record = json.loads(path.read_text(encoding="utf-8"))
    plan = read_plan(PLANS / f"{path.stem.removeprefix('transfer_')}.yaml")
    own = {name: base["own"] for name, base in plan["bases"].items()}
    scored = [row for row in record["transfer"] if "accuracy" in row]
    failed = [row for row in record["transfer"] if "failed" in row]
    parts = [budgets(record["transfer"], plan) + "\n"] if "against" in plan else by_budget(scored, own)
    parts += [f"{row['base']} {row['setting']}, seed {row['seed']}, failed: {row['failed']}\n" for row in failed]
    return "\n".join(parts)


def by_budget(scored: list[Row], own: dict[str, str]) -> list[str]:
    """Return a table for each split and number of student steps."""
    parts = []
    for split, steps in dict.fromkeys((row["split"], row["steps"]) for row in scored):
        rows = [row for row in scored if (row["split"], row["steps"]) == (split, steps)]
        title = f"{'Test' if split == 'test' else 'Validation'} accuracy in %, students of {steps} steps:"
        parts.append(f"{title}\n\n{table(rows, own)}\n")
    return parts


def budgets(rows: list[Row], plan: dict[str, Any]) -> str:
    """Return the table of images by labels and student budgets: means over unseen architectures.

    Beside each stands the paired difference to the base ``against`` with the same kind of labels and the same budget.
    """
    own = {base["own"] for base in plan["bases"].values()}
    scored = [row for row in rows if "accuracy" in row and row["architecture"] not in own]
    names = list(dict.fromkeys(row["architecture"] for row in scored))
    steps = sorted({row["steps"] for row in scored})
    labels = {setting: "soft" if "labels" in spec else "hard" for setting, spec in plan["settings"].items()}
    plain = {
        kind: next(setting for setting, own_kind in labels.items() if own_kind == kind) for kind in labels.values()
    }
    lines = [["images", "labels", "images [kB]", "labels [kB]", "seeds", *(f"{count} steps" for count in steps)]]
    for base, setting in dict.fromkeys((row["base"], row["setting"]) for row in rows):
        kind = labels[setting]
        named = plan.get("kinds", {}).get(setting, kind)
        cells, seeds = [], list[str]()
        for count in steps:
            here = [row for row in scored if row["steps"] == count]
            scores, reference = (
                whole(here, *which, [names]) for which in ((base, setting), (plan["against"], plain[kind]))
            )
            seeds.append(str(len(scores)))
            pairs = [(scores[seed], reference[seed]) for seed in scores if seed in reference]
            itself = base == plan["against"] and setting == plain[kind]
            difference = "" if itself or not pairs else f" ({change(pairs, names)})"
            cells.append(level([*scores.values()], names) + difference if scores else "-")
        stored = next(row for row in rows if (row["base"], row["setting"]) == (base, setting) and "image_bytes" in row)
        sizes = [f"{stored[name] / 1000:.0f}" for name in ("image_bytes", "label_bytes")]
        called = " + ".join([base, *(part for part in setting.split("_") if part not in ("base", "soft"))])
        lines.append([called, named, *sizes, ", ".join(seeds if len(set(seeds)) > 1 else seeds[:1]), *cells])
    return markdown_table(lines)


def table(rows: list[Row], own: dict[str, str]) -> str:
    """Return the Markdown table: a base's accuracies, and under it the mean paired differences of its settings."""
    others = [name for name in dict.fromkeys(row["architecture"] for row in rows) if name not in own.values()]
    heads = [name.partition(":")[0] for name in others]
    lines = [["base", "setting", "seeds", "own", *heads, "mean of these"]]
    for base in dict.fromkeys(row["base"] for row in rows):
        groups = [[own[base]], *([name] for name in others), others]
        if not any(row["base"] == base and row["architecture"] == own[base] for row in rows):
            groups[0] = []
        found = {name: whole(rows, base, name, groups) for name in dict.fromkeys(row["setting"] for row in rows)}
        plain = found["base"]
        levels = [level([*plain.values()], names) for names in groups] if plain else []
        lines += [[base, "base", str(len(plain)), *levels]] if plain else []
        for setting, scores in found.items():
            pairs = [(scores[seed], plain[seed]) for seed in scores if seed in plain]
            if setting != "base" and pairs:
                changes = [change(pairs, names) for names in groups]
                lines.append(["", setting, str(len(pairs)), *changes])
    return markdown_table(lines)


def whole(rows: list[Row], base: str, setting: str, groups: list[list[str]]) -> dict[int, dict[str, float]]:
    """Return accuracies in % by seed and architecture, of the seeds whose students are all there."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if (row["base"], row["setting"]) == (base, setting):
            found.setdefault(row["seed"], {})[row["architecture"]] = 100 * row["accuracy"]
    wanted = {name for names in groups for name in names}
    return {seed: scores for seed, scores in found.items() if scores.keys() >= wanted}


def level(scores: list[dict[str, float]], names: list[str]) -> str:
    """Return mean and sample standard deviation over seeds of the mean over architectures."""
    if not names:
        return "-"
    means = [statistics.fmean(one[name] for name in names) for one in scores]
    spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.1f}{spread}"


def change(pairs: list[tuple[dict[str, float], dict[str, float]]], names: list[str]) -> str:
    """Return the mean difference of pairs, with its 95 % interval (Student's t) where there are three or more."""
    if not names:
        return "-"
    differences = [statistics.fmean(new[name] - old[name] for name in names) for new, old in pairs]
    spread = f" ± {half_interval(differences):.1f}" if len(differences) >= _ENOUGH else ""
    return f"{statistics.fmean(differences):+.1f}{spread}"


def half_interval(differences: list[float]) -> float:
    """Return half of a 95 % interval (Student's t) of a mean; 0 for fewer than three numbers."""
    count = len(differences)
    if count < _ENOUGH:
        return 0.0
    return float(student_t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5)
