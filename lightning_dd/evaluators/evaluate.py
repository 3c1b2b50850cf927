"""Run a whole evaluation: which students there are, which of them are alike, and one report of all."""

import hashlib
import json
import os.path
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from lightning_dd.data.base import RealData
from lightning_dd.data.parts import DataChoice
from lightning_dd.distilled.card import label_bytes
from lightning_dd.distilled.datamodule import check_match, other_data, real_data_of
from lightning_dd.distilled.set import DistilledSet, find_set, library_versions
from lightning_dd.evaluators.label_rows import LabelRows
from lightning_dd.evaluators.matrix import ALL_REAL, DISTILLED, RANDOM_REAL, Cell, Hardware, Row, run_cell
from lightning_dd.evaluators.page import provenance, write_pages
from lightning_dd.evaluators.probe import linear_probe, which_weights
from lightning_dd.evaluators.report import bar_figure, markdown, summarise
from lightning_dd.jobs import Job, Ledger, Tick, check_workers, device_of, place, run_jobs, tensor_digest, workers_on
from lightning_dd.models.factory import build_network
from lightning_dd.models.zoo import expand
from lightning_dd.report import grouped, write_results
from lightning_dd.students.loop import step_flops
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.arguments import public_settings
from lightning_dd.utils.errors import UserError, check_range
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
    workers: int | str = "auto",
    names: Sequence[str] = (),
    labels: LabelRows = LabelRows(),  # noqa: B008
    probe: str | None = None,
) -> list[Row]:
    """Train every architecture and seed on every set and on random real images, and write the report.

    Everything that can be wrong is looked at before the first student is trained. A finished student is kept in
    ``output/cells``: running the same command again trains only what is missing. Processes started by torchrun or SLURM
    share the students out between them and meet in that folder, unless ``hardware`` asks for several devices per
    student. Arguments are those of :func:`lightning_dd.evaluate`; several recipes by name make a matrix of sets by
    protocols.

    Returns:
        One row per student; nothing on processes that do not write the report.
    """
    named, folder = check_asked(files, architectures, output, seeds, workers, names)
    recipes = {"": recipe} if isinstance(recipe, Recipe) else dict(recipe)
    for each in recipes.values():
        each.augmentation(mirror=True)
    bench = Bench(named, recipes, folder, data, hardware, probe)
    architectures = bench.architectures(architectures)
    if labels.kinds:  # teachers are trained here
        bench = replace(bench, files=labels.files(named, recipes.values(), data, folder / "labelled"))
    for name, difference in bench.elsewhere.items():
        rank_zero_warn(f"'{name}' is {difference}")
    cells = [
        Cell(name, architecture, source, seed, protocol)
        for protocol in recipes
        for name in bench.sets
        for architecture in architectures
        for source in (DISTILLED, RANDOM_REAL)
        for seed in range(seeds)
    ]
    if not bench.train(cells, workers):
        return []
    rows = _in_groups([bench.row(cell) for cell in cells], bench.sets)
    records = [{name: value for name, value in asdict(row).items() if name != "by_class"} for row in rows]
    write_results(folder, records, markdown(rows), bar_figure(summarise(rows)))
    words = [*files, "--architectures", *architectures, f"--seeds={seeds}", *labels.words]
    words += [] if probe is None else [f"--probe={probe}"]
    made_with = provenance(bench.sets, bench.digests, recipes, words, library_versions())
    write_pages(folder, rows, bench.sets, made_with, bench.files)
    print(f"to hand on: {folder}/report.html, results.tex, provenance.json")
    print(f"student curves: tensorboard --logdir {folder / 'tensorboard'}")
    return rows


@dataclass
class Bench:
    """The sets and their real data, each read once; sent to another process, it is made anew there."""

    files: Mapping[str, str]
    """By set name."""
    recipes: Mapping[str, Recipe]
    """By name of the protocol."""
    folder: Path
    """Of the ledger (``cells``) and of the students' TensorBoard logs."""
    data: DataChoice
    hardware: Hardware
    probe: str | None = None
    """Weights under a linear layer, which is all that is trained then."""

    def __post_init__(self) -> None:
        self.sets = {name: DistilledSet.load(file) for name, file in self.files.items()}
        self.ledger = Ledger(self.folder / "cells")
        self._preprocessing = {name: tensor_digest(kept.preprocessing.state_dict()) for name, kept in self.sets.items()}
        self.digests = {name: hashlib.blake2b(Path(file).read_bytes()).hexdigest() for name, file in self.files.items()}
        self._versions = library_versions()
        self.reals: dict[str, RealData] = {}
        for name, distilled in self.sets.items():
            self.reals[name] = self._real(name, distilled)
            check_match(distilled, self.reals[name])
        found = {name: other_data(distilled, self.reals[name]) for name, distilled in self.sets.items()}
        self.elsewhere = {name: difference for name, difference in found.items() if difference}

    def __reduce__(self) -> tuple[type["Bench"], tuple[Any, ...]]:
        return Bench, (self.files, self.recipes, self.folder, self.data, self.hardware, self.probe)

    def architectures(self, asked: Sequence[str]) -> list[str]:
        """Replace groups by their members, and refuse networks that cannot take a set's images: each is built once."""
        found = expand(asked, min(distilled.image_shape for distilled in self.sets.values()))
        for name, distilled in self.sets.items():
            for architecture in found:
                if self.probe is None:
                    build_network(architecture, distilled.num_classes, distilled.image_shape, seed=0)
                else:
                    linear_probe(architecture, self.probe, self.reals[name].facts, distilled.preprocessing, seed=0)
        return found

    def train(self, cells: Sequence[Cell], workers: int | str) -> bool:
        """Train what the ledger lacks; return whether this process writes the report."""
        together = self.hardware.strategy != "auto"  # then all processes of a launcher train one student
        jobs = [self._job(cell) for cell in cells]
        alone = together or self.hardware.devices != 1
        workers = 1 if alone and workers == "auto" else workers_on(self.hardware.accelerator, workers)
        return run_jobs(jobs, self.work, self.ledger, workers, unit="step", together=together)

    def _job(self, cell: Cell) -> Job:
        found, recipe, train = self.sets[cell.set_name], self.recipes[cell.protocol], self.reals[cell.set_name].train
        assert train is not None
        rows, classes = len(train) if cell.source == ALL_REAL else len(found), found.num_classes
        return Job(
            f"{cell.architecture} {cell.source} {cell.seed}",
            self._identity(cell),
            cell,
            cost=recipe.steps_for(len(found), classes),
            flops=step_flops(cell.architecture, recipe, rows, classes, found.image_shape),
        )

    def work(self, cell: Cell, tick: Tick) -> dict[str, Any]:
        """Train a cell's student and return its row as plain values."""
        start, hardware, device = time.perf_counter(), self.hardware, device_of(self.hardware.accelerator)
        if place() is not None and device.type == "cuda":
            hardware = replace(hardware, devices=[device.index])
        distilled, real, recipe = self.sets[cell.set_name], self.reals[cell.set_name], self.recipes[cell.protocol]
        row = run_cell(cell, distilled, real, recipe, hardware, self.folder / "tensorboard", tick, self.probe)
        return asdict(replace(row, seconds=round(time.perf_counter() - start, 2)))

    def row(self, cell: Cell) -> Row:
        """Return the row of a cell whose student, or one like it, has been trained."""
        elsewhere = cell.set_name in self.elsewhere
        own: dict[str, Any] = {"set": cell.set_name, "protocol": cell.protocol, "other_data": elsewhere}
        if cell.source == DISTILLED:
            distilled = self.sets[cell.set_name]
            own |= {"method": distilled.method, "label_bytes": label_bytes(distilled)}
        return Row(**(self.ledger.need(self._identity(cell)) | own))

    def _identity(self, cell: Cell) -> dict[str, Any]:
        """Return everything the outcome of a cell depends on; cells with equal identities are one student.

        Random real images depend on the size and label form of a set alone, so sets of one size share them; the whole
        real data depends on no set.
        """
        distilled, real = self.sets[cell.set_name], self.reals[cell.set_name]
        own: dict[str, Any] = {"label_kind": "hard" if cell.source == ALL_REAL else distilled.label_kind}
        if cell.source == RANDOM_REAL:
            own["ipc"] = distilled.ipc
            if distilled.stored is not None:  # they are trained for as many steps as its students are
                own["shown_ipc"] = distilled.shown_ipc
        elif cell.source != ALL_REAL:
            own["set"] = self.digests[cell.set_name]
        if self.data.name is not None:  # its test images may be others than those the sets remember
            own["chosen"] = [self.data.name, dict(self.data.arguments)]
        if self.probe is not None:
            own["probe"] = which_weights(self.probe)
        return {
            **own,
            "preprocessing": self._preprocessing[cell.set_name],
            "data": real.facts.fingerprint,
            "mirror": real.mirror,
            "source": cell.source,
            "architecture": cell.architecture,
            "seed": cell.seed,
            "recipe": asdict(self.recipes[cell.protocol]),
            "devices": self.hardware.devices,
            "versions": self._versions,
        }

    def _real(self, name: str, distilled: DistilledSet) -> RealData:
        """Return set-up real data, shared by sets of the same data and preprocessing."""
        for other, real in self.reals.items():
            kept = self.sets[other]
            alike = self._preprocessing[other] == self._preprocessing[name] and kept.mirror == distilled.mirror
            if alike and (self.data.name is not None or kept.data == distilled.data):
                return real
        real = real_data_of(distilled, self.data)
        real.prepare_data()
        real.setup("test")
        return real


def check_asked(
    files: Sequence[str],
    architectures: Sequence[str],
    output: str,
    seeds: int,
    workers: int | str,
    names: Sequence[str] = (),
) -> tuple[dict[str, str], Path]:
    """Refuse to evaluate nothing; return the files by name, and the folder of the report.

    A set is called as ``names`` says, else after its file; files that every run calls the same, ``best`` and ``last``,
    are called after method, data, images per class and seed.
    """
    check_range("at least 1", seeds=seeds)
    check_workers(workers)
    if not files or not architectures:
        raise UserError("name at least one file and one architecture")
    if names and (len(names) != len(files) or len(set(names)) != len(names)):
        raise UserError(f"names must be {len(files)} different ones, one for each file, got {', '.join(names)}")
    found: dict[str, str] = {}
    for index, path in enumerate(map(find_set, files)):
        name = names[index] if names else _name_of(path)
        choices = (name, f"{path.parent.name}-{name}", f"{path.parent.name}-{name}-{path.stem}")
        free = [choice for choice in choices if choice not in found]
        if not free:
            raise UserError(f"two files give the same set name '{name}': say --names, one for each file")
        found[free[0]] = str(path)
    return found, require_writable(output)


def _name_of(path: Path) -> str:
    """Name a set after its file, or after what it holds where files of all runs are called alike."""
    if path.stem not in ("best", "last"):
        return path.stem
    held = DistilledSet.load(path)
    parts = [held.method, str(held.data.get("name", "unknown")), f"ipc{held.ipc}"]
    parts += [f"seed{held.training['seed']}"] if "seed" in held.training else []
    return re.sub(r"[^\w.=-]+", "-", "-".join(parts))  # folders are called so


def _in_groups(rows: Sequence[Row], sets: Mapping[str, DistilledSet]) -> list[Row]:
    """Mark the sets that differ in the seed of their distillation alone as one group."""

    def origin(name: str) -> str:
        distilled = sets[name]
        config = {key: value for key, value in public_settings(distilled.config).items() if key != "seed"}
        run = {key: value for key, value in distilled.run.items() if key != "seed_everything"}  # MetaDD among it
        return json.dumps([distilled.method, distilled.label_kind, config, distilled.data, run], sort_keys=True)

    group = {name: _group_name(names) for names in grouped(sets, origin).values() for name in names}
    seeds = {name: distilled.training.get("seed") for name, distilled in sets.items()}
    return [replace(row, group=group[row.set], distillation_seed=seeds[row.set]) for row in rows]


def _group_name(names: Sequence[str]) -> str:
    """Name a group by what its members' names begin with: ``dm-seed0`` and ``dm-seed1`` are ``dm x2``."""
    if len(names) == 1:
        return names[0]
    common = re.sub(r"[-_.]?(seed)?[-_.]?\d*$", "", os.path.commonprefix(list(names)))  # noqa: RUF071
    return f"{common or names[0]} x{len(names)}"
