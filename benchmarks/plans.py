"""Plans of trials, as YAML files that may build on one another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PLANS = Path(__file__).parent / "transfer"


def read_plan(path: Path) -> dict[str, Any]:
    """Read a plan, over the one that it is ``like``, if it is like another."""
    plan: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return merged(read_plan(PLANS / f"{plan['like']}.yaml"), plan) if "like" in plan else plan


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with the entries of another one in it, level by level."""
    pairs = {name: (old[name], new[name]) for name in old.keys() & new.keys()}
    both = {name: merged(*pair) for name, pair in pairs.items() if all(isinstance(part, Mapping) for part in pair)}
    return {**old, **new, **both}
