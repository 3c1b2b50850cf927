"""Who trains which student: this process, several workers, or the processes of a launcher; none of them twice."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm

from lightning_dd.data.base import RealData
from lightning_dd.data.registry import DataChoice
from lightning_dd.distilled.datamodule import check_match, real_data_of
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.evaluators.ledger import Ledger, tensor_digest
from lightning_dd.evaluators.matrix import Cell, Hardware, Row, run_cell
from lightning_dd.evaluators.sources import ALL_REAL, DISTILLED, RANDOM_REAL
from lightning_dd.models.factory import build_network
from lightning_dd.models.zoo import expand
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.silence import quieten


@dataclass(frozen=True)
class Job:
    """Everything a process needs to train any student of an evaluation; plain values, so that it travels."""

    files: Mapping[str, str]
    """Distilled-set files by set name."""
    recipes: Mapping[str, Recipe]
    """How students are trained, by name of the protocol."""
    folder: Path
    root: str | None = None
    hardware: Hardware = Hardware()  # noqa: RUF009  (frozen)


class Bench:
    """A process's place of work: the sets and their real data, each read once.

    Args:
        job: what is evaluated.

    Raises:
        UserError: a file or the data is unusable.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.sets = {name: DistilledSet.load(file) for name, file in job.files.items()}
        self.reals: dict[str, RealData] = {}
        self.ledger = Ledger(job.folder / "cells")
        self._versions = library_versions()
        self._preprocessing = {name: tensor_digest(kept.preprocessing.state_dict()) for name, kept in self.sets.items()}
        self._digests = {name: hashlib.blake2b(Path(file).read_bytes()).hexdigest() for name, file in job.files.items()}
        for name, distilled in self.sets.items():
            self.reals[name] = self._real(name, distilled)
            check_match(distilled, self.reals[name])

    def architectures(self, asked: Sequence[str]) -> list[str]:
        """Replace groups by their members, and build every network once for every set.

        Args:
            asked: names of the factory, or of groups (:mod:`lightning_dd.models.zoo`).

        Raises:
            UserError: a name is unknown, or a network cannot take a set's images.
        """
        found = expand(asked, min(distilled.image_shape for distilled in self.sets.values()))
        for distilled in self.sets.values():
            for architecture in found:
                build_network(architecture, distilled.num_classes, distilled.image_shape, seed=0)
        return found

    def steps(self, cell: Cell) -> int:
        """Training steps of a cell's student."""
        return self.job.recipes[cell.protocol].steps_for(len(self.sets[cell.set_name]))

    def identity(self, cell: Cell) -> dict[str, Any]:
        """Return everything the outcome of a cell depends on; cells with equal identities are one student.

        Random real images depend on the size and label form of a set alone, so sets of one size share them; the whole
        real data depends on no set.
        """
        distilled, real = self.sets[cell.set_name], self.reals[cell.set_name]
        if cell.source == ALL_REAL:
            own: dict[str, Any] = {"label_kind": "hard"}
        elif cell.source == RANDOM_REAL:
            own = {"ipc": distilled.ipc, "label_kind": distilled.label_kind}
        else:
            own = {"set": self._digests[cell.set_name], "label_kind": distilled.label_kind}
        return {
            **own,
            "preprocessing": self._preprocessing[cell.set_name],
            "data": real.facts.fingerprint,
            "source": cell.source,
            "architecture": cell.architecture,
            "seed": cell.seed,
            "recipe": asdict(self.job.recipes[cell.protocol]),
            "devices": self.job.hardware.devices,
            "versions": self._versions,
        }

    def work(self, cell: Cell, on_step: Callable[[], None] = lambda: None) -> Row:
        """Return a cell's row: from the ledger, or by training its student now."""
        found = self.finished(cell)
        if found is not None:
            return found
        start = time.perf_counter()
        job = self.job
        logs = job.folder / "tensorboard"
        distilled, real = self.sets[cell.set_name], self.reals[cell.set_name]
        row = run_cell(cell, distilled, real, job.recipes[cell.protocol], job.hardware, logs, on_step)
        row = replace(row, seconds=round(time.perf_counter() - start, 2))
        # A launcher's processes that share the students out keep their own; those of one student all come here.
        if _sharing(job) or not getattr(rank_zero_only, "rank", 0):
            self.ledger.write(self.identity(cell), asdict(row))
        return row

    def finished(self, cell: Cell) -> Row | None:
        """Return a cell's row if its student has been trained before."""
        record = self.ledger.read(self.identity(cell))
        if record is None:
            return None
        distilled = self.sets[cell.set_name]
        own = {"set": cell.set_name, "protocol": cell.protocol}
        own |= {"method": distilled.method} if cell.source == DISTILLED else {}
        return Row(**(record | own))

    def _real(self, name: str, distilled: DistilledSet) -> RealData:
        """Return set-up real data, shared by sets of the same data and preprocessing."""
        for other, real in self.reals.items():
            alike = self._preprocessing[other] == self._preprocessing[name]
            if alike and self.sets[other].data == distilled.data:
                return real
        real = real_data_of(distilled, DataChoice(root=self.job.root))
        real.use_preprocessing(distilled.preprocessing)
        real.prepare_data()
        real.setup("test")
        return real


def train_students(cells: Sequence[Cell], job: Job, bench: Bench, workers: int) -> bool:
    """Train what is missing; return whether this process writes the report."""
    spread = _sharing(job)
    rank, world = (spread.global_rank(), spread.world_size()) if spread else (0, 1)
    first = not getattr(rank_zero_only, "rank", 0)  # the processes of one student all come here
    share = share_of(cells, bench, rank, world)
    with tqdm(total=sum(map(bench.steps, share)), unit="step", smoothing=0.05, disable=not first or rank > 0) as bar:
        if workers > 1:
            run_workers(share, job, workers, lambda cell: bar.update(bench.steps(cell)) and None)
        else:
            for cell in share:
                bar.set_description(f"{cell.architecture} {cell.source} {cell.seed}")
                bench.work(cell, lambda: bar.update() and None)
    if rank == 0:
        wait_for(cells, bench)
    return first and rank == 0


def share_of(cells: Sequence[Cell], bench: Bench, rank: int, world_size: int) -> list[Cell]:
    """Return the cells that process ``rank`` of ``world_size`` trains: unfinished ones, each identity once.

    Shares are cut from the whole list, so processes that start at different times agree on them.
    """
    unique = {bench.ledger.path(bench.identity(cell)): cell for cell in cells}
    return [cell for cell in list(unique.values())[rank::world_size] if bench.finished(cell) is None]


def run_workers(cells: Sequence[Cell], job: Job, workers: int, on_cell: Callable[[Cell], None]) -> None:
    """Train the cells in several processes of this machine; every process gets its share of the CPU's cores.

    Args:
        cells: unfinished, no two alike.
        job: what is evaluated.
        workers: number of processes.
        on_cell: called with each cell when it is done.
    """
    threads = max(1, (os.cpu_count() or workers) // workers)
    context = get_context("spawn")
    places = context.Queue()
    for place in range(workers):
        places.put(place)
    with (
        _environment(OMP_NUM_THREADS=str(threads)),  # read when torch is loaded in the new process
        ProcessPoolExecutor(workers, context, initializer=_open, initargs=(job, places, threads)) as pool,
    ):
        for future in as_completed({pool.submit(_work, cell): cell for cell in cells}):
            on_cell(future.result())


def _sharing(job: Job) -> ClusterEnvironment | None:
    """Return the launcher whose processes share the students out; with a strategy they train each of them together."""
    return launcher() if job.hardware.strategy == "auto" else None


def launcher() -> ClusterEnvironment | None:
    """Return the launcher this process was started by (torchrun, SLURM), if any."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            found: ClusterEnvironment = environment()
            return found
    return None


def wait_for(cells: Sequence[Cell], bench: Bench, seconds: float = 1.0) -> None:
    """Wait until other processes have finished these cells; a launcher that loses one of them ends all."""
    while any(bench.finished(cell) is None for cell in cells):
        time.sleep(seconds)


_BENCH: list[Bench] = []  # a worker's own; its process trains nothing else


def _open(job: Job, places: Any, threads: int) -> None:
    quieten(bar_only=True)
    torch.set_num_threads(threads)
    place = places.get()
    if torch.cuda.is_available() and job.hardware.accelerator != "cpu":
        job = replace(job, hardware=replace(job.hardware, devices=[place % torch.cuda.device_count()]))
    _BENCH.append(Bench(job))


def _work(cell: Cell) -> Cell:
    _BENCH[0].work(cell)
    return cell


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
