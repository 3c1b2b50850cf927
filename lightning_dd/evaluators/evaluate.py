"""Run a whole evaluation with one progress bar."""

import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_dd.data.registry import DataChoice
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.evaluators.bench import Bench, check_asked, named
from lightning_dd.evaluators.matrix import Hardware, Row, cells_of
from lightning_dd.evaluators.report import markdown, write_report
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.checkpoint import public_settings
from lightning_dd.utils.files import require_writable
from lightning_dd.utils.silence import quiet_trainers


@quiet_trainers()
def evaluate_files(
    files: Sequence[str],
    architectures: Sequence[str],
    output: str,
    seeds: int,
    recipe: Recipe | Mapping[str, Recipe],
    data: DataChoice = DataChoice(),  # noqa: B008  (frozen)
    hardware: Hardware = Hardware(),  # noqa: B008
    workers: int | str = 1,
) -> list[Row]:
    """Train every architecture and seed on every set and on random real images, and write the report.

    Everything that can be wrong is looked at before the first student is trained. A finished student is kept in
    ``output/cells``: running the same command again trains only what is missing. Processes started by torchrun or SLURM
    share the students out between them and meet in that folder, unless ``hardware`` asks for several devices per
    student.

    Args:
        files: distilled-set files; a set is named by its file, without the suffix.
        architectures: names of the factory, or of groups (:mod:`lightning_dd.models.zoo`).
        output: folder of the report.
        seeds: students per architecture and source, at least 1.
        recipe: how students are trained; several by name make a matrix of sets by protocols.
        data: the real data; what is left out is taken from where a set says it came from.
        hardware: where students are trained.
        workers: processes of this machine that train students side by side, at least 1; ``auto`` for one per core.

    Returns:
        One row per student; nothing on processes that do not write the report.

    Raises:
        UserError: a file, an architecture, the data or the folder is unusable.
    """
    check_asked(files, architectures, seeds, workers)
    folder = require_writable(output)
    recipes = {"": recipe} if isinstance(recipe, Recipe) else dict(recipe)
    bench = Bench(named(files), recipes, folder, data, hardware)
    architectures = bench.architectures(architectures)
    cells = cells_of(list(bench.sets), architectures, seeds, list(recipes))
    if not bench.train(cells, workers):
        return []
    rows = _in_groups([bench.row(cell) for cell in cells], bench.sets)
    paths = write_report(rows, folder)
    print(f"\n{markdown(rows)}\nreport: {folder}/results.md, .json, .csv; figure: {paths['png']}")
    print(f"student curves: tensorboard --logdir {folder / 'tensorboard'}")
    return rows


def _in_groups(rows: Sequence[Row], sets: dict[str, DistilledSet]) -> list[Row]:
    """Mark the sets that differ in the seed of their distillation alone as one group."""
    alike: dict[str, list[str]] = {}
    for name, distilled in sets.items():
        config = {key: value for key, value in public_settings(distilled.config).items() if key != "seed"}
        alike.setdefault(
            json.dumps([distilled.method, distilled.label_kind, config, distilled.data], sort_keys=True), []
        ).append(name)
    group = {name: _group_name(names) for names in alike.values() for name in names}
    seeds = {name: distilled.training.get("seed") for name, distilled in sets.items()}
    return [replace(row, group=group[row.set], distillation_seed=seeds[row.set]) for row in rows]


def _group_name(names: Sequence[str]) -> str:
    """Name a group by what its members' names begin with: ``dm-seed0`` and ``dm-seed1`` are ``dm x2``."""
    if len(names) == 1:
        return names[0]
    common = re.sub(r"[-_.]?(seed)?[-_.]?\d*$", "", os.path.commonprefix(list(names)))  # noqa: RUF071
    return f"{common or names[0]} x{len(names)}"
