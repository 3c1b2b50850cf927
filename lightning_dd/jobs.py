"""Many jobs on some processes, and a ledger of their results that survives a kill.

A job is done once: its result is written to the ledger, under a hash of everything it depends on, by the process that
did it. Whoever is interrupted and starts again does only what is missing. Processes started by torchrun or SLURM share
the jobs out between them and meet in the ledger's folder. A worker imports neither torch nor Lightning before its first
job needs them.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning_utilities.core.rank_zero import rank_zero_only
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically
from lightning_dd.utils.machine import settle, spinning, threads_for
from lightning_dd.utils.silence import quiet_trainers

if TYPE_CHECKING:
    import torch
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

Record = Mapping[str, Any]
Tick = Callable[[], object]
"""Called by a job whenever it is a unit of its cost further."""
Work = Callable[[Any, Tick], Record]
"""From a task to its result; a function, or a method of an object that can be sent to another process."""

_PLACE: int | None = None  # of this process among the workers
_UNIT_SECONDS, _FLOPS_PER_SECOND = 5e-3, 5e10  # of small networks on one core, whose layers are many and thin
_WORTH_WORKERS = 30.0  # seconds of work, for every worker imports and reads what this process has
_WORKER_BYTES = 2 * 2**30


class Ledger:
    """Records by identity, in a folder; a record is written atomically once, and read by whoever needs it."""

    suffix: ClassVar[str] = ".json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: Mapping[str, Any]) -> Path:
        """Return the file of a record: named by a hash of everything its value depends on."""
        text = json.dumps(identity, sort_keys=True)
        return self.folder / (hashlib.blake2b(text.encode(), digest_size=16).hexdigest() + self.suffix)

    def read(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record, or ``None`` if there is none yet or its file is damaged."""
        try:
            return self._load(self.path(identity))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def need(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a job that is done, or refuse to go on without it."""
        record = self.read(identity)
        if record is None:
            raise UserError(f"'{self.path(identity)}' has disappeared or is damaged: run the same command again")
        return record

    def write(self, identity: Mapping[str, Any], record: Record) -> None:
        """Keep a record."""
        write_atomically(self.path(identity), lambda temporary: self._save(temporary, identity, record))

    def _load(self, path: Path) -> dict[str, Any]:
        return dict(json.loads(path.read_text(encoding="utf-8"))["record"])

    def _save(self, path: Path, identity: Mapping[str, Any], record: Record) -> None:
        path.write_text(json.dumps({"identity": identity, "record": record}, indent=1) + "\n", encoding="utf-8")


class ArrayLedger(Ledger):
    """A ledger whose records are numpy arrays by name, each record a safetensors file."""

    suffix = ".safetensors"

    def _load(self, path: Path) -> dict[str, Any]:
        return load_file(path)

    def _save(self, path: Path, identity: Mapping[str, Any], record: Record) -> None:
        save_file(dict(record), path)


def tensor_digest(tensors: "Mapping[str, torch.Tensor]") -> str:
    """Return a hash of named tensors' values."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        value = tensors[name].detach().cpu().contiguous().flatten()
        digest.update(value.view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()


@dataclass(frozen=True)
class Job:
    """One thing to do."""

    name: str
    """In words, for the bar and for errors."""
    identity: Mapping[str, Any]
    """Everything the result depends on, in plain values; jobs with equal identities are one."""
    task: Any
    """What the work is called with."""
    cost: int = 1
    """How long it takes, in units of the bar."""
    flops: float | None = None
    """Of one unit, as a training step, where that is known; small units take one thread."""

    @property
    def seconds(self) -> float | None:
        """About how long it takes on one core, where that is known."""
        return None if self.flops is None else self.cost * (_UNIT_SECONDS + self.flops / _FLOPS_PER_SECOND)


def check_workers(workers: int | str) -> None:
    """Refuse anything but a number from 1 and ``auto``."""
    if workers != "auto" and not (isinstance(workers, int) and workers >= 1):
        raise UserError(f"workers must be at least 1, or 'auto', got {workers}")


def run_jobs(
    jobs: Sequence[Job],
    work: Work,
    ledger: Ledger,
    workers: int | str = 1,
    *,
    unit: str = "job",
    together: bool = False,
) -> bool:
    """Do what the ledger lacks, in this process or in several, with one bar; the results are in the ledger then.

    Args:
        jobs: in any order; those with equal identities are done once.
        work: from a job's task to its record.
        ledger: where records are kept.
        workers: processes of this machine, each with its share of the cores; ``auto`` takes as many as there are
            cores, as far as memory goes, and this process alone where the work is short. There are never more than
            jobs, and one alone is this process.
        unit: of the jobs' costs.
        together: the processes of a launcher work on every job together, instead of sharing the jobs out.

    Returns:
        Whether this process is the one that writes the report.

    Raises:
        UserError: a job found a mistake of the user's, or a worker was killed.
    """
    check_workers(workers)
    settle()
    found = None if together else launcher()
    rank, world = (found.global_rank(), found.world_size()) if found else (0, 1)
    first = not getattr(rank_zero_only, "rank", 0)  # of the processes of one training
    leads = rank == 0 if found else first
    missing = sorted(share_of(jobs, ledger, rank, world), key=lambda job: (-(job.seconds or 0.0), -job.cost))
    cores = os.cpu_count() or 1
    count = _count(missing, 1 if workers == "auto" and world > 1 else workers, cores)
    silent = not (leads and missing)
    if not silent and count > 1:
        print(f"{len(missing)} jobs, {count} side by side; small ones take one thread each", file=sys.stderr)
    with tqdm(total=sum(job.cost for job in missing), unit=unit, smoothing=0.05, disable=silent) as bar:
        if count > 1:
            _in_workers(missing, pickle.dumps((work, ledger)), count, cores, lambda job: bar.update(job.cost))
        else:
            done = 0
            for job in missing:
                bar.set_description(job.name)
                with threads_for(job.flops):
                    record = work(job.task, bar.update)
                if found or first:
                    ledger.write(job.identity, record)
                done += job.cost
                bar.update(done - bar.n)
    if found:
        wait_for(jobs, ledger)
    return leads


def _count(jobs: Sequence[Job], workers: int | str, cores: int) -> int:
    """Return how many processes work on these jobs."""
    if workers != "auto":
        return min(int(workers), len(jobs))
    seconds = [job.seconds for job in jobs]
    if None not in seconds and sum(filter(None, seconds)) < _WORTH_WORKERS:
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(cores, len(jobs), max(1, memory // _WORKER_BYTES))


def share_of(jobs: Sequence[Job], ledger: Ledger, rank: int, world_size: int) -> list[Job]:
    """Return the jobs that process ``rank`` of ``world_size`` does: unfinished ones, each identity once.

    Shares are cut from the whole list, so processes that start at different times agree on them.
    """
    unique = {ledger.path(job.identity): job for job in jobs}
    return [job for job in list(unique.values())[rank::world_size] if ledger.read(job.identity) is None]


def wait_for(jobs: Sequence[Job], ledger: Ledger) -> None:
    """Wait until other processes have finished these jobs; a launcher that loses one of them ends all."""
    while any(ledger.read(job.identity) is None for job in jobs):
        time.sleep(1)


def launcher() -> "ClusterEnvironment | None":
    """Return the launcher this process was started by (torchrun, SLURM), if any."""
    if not os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"}:
        return None  # without importing what finds out
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kinds: tuple[type[ClusterEnvironment], ...] = (TorchElasticEnvironment, SLURMEnvironment)
    return next((kind() for kind in kinds if kind.detect()), None)


def place() -> int | None:
    """Return this worker's number, from 0; ``None`` in a process that is no worker."""
    return _PLACE


def device_of(accelerator: str) -> "torch.device":
    """Return where this process trains: the CPU if asked for or all there is, else a GPU; workers spread over all."""
    import torch

    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", (place() or 0) % torch.cuda.device_count())


def workers_on(accelerator: str, workers: int | str) -> int | str:
    """Return how many processes train side by side: where they train on GPUs, ``auto`` is one for each."""
    if workers != "auto" or device_of(accelerator).type == "cpu":
        return workers
    import torch

    return torch.cuda.device_count()


def _in_workers(jobs: Sequence[Job], payload: bytes, count: int, cores: int, on_done: Callable[[Job], object]) -> None:
    """Hand jobs out to new processes, one at a time; whatever happens, none of them is left."""
    context = multiprocessing.get_context("spawn")
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))
    waiting, busy, idle, workers = list(reversed(jobs)), dict[Connection, Job](), list[Connection](), []
    try:
        with _environment({"OMP_NUM_THREADS": threads, **spinning()}):  # read when torch is loaded there
            for number in range(count):
                line, theirs = context.Pipe()
                workers.append(context.Process(target=_serve, args=(theirs, payload, number), daemon=True))
                workers[-1].start()
                theirs.close()  # so that the line breaks when the worker dies
                idle.append(line)
        while waiting or busy:
            while waiting and idle:
                line = idle.pop()
                busy[line] = waiting.pop()
                with suppress(OSError):  # a worker that is gone is noticed where its answer is awaited
                    line.send(busy[line])
            for line in cast(list[Connection], wait(list(busy))):
                job = busy.pop(line)
                _check_answer(line, job, count)
                on_done(job)
                idle.append(line)
    finally:
        for worker in workers:
            worker.kill()  # ledgers are written atomically, so there is nothing to wait for
        for worker in workers:
            worker.join()


def _check_answer(line: Connection, job: Job, count: int) -> None:
    try:
        answer = line.recv()
    except (EOFError, OSError):
        raise UserError(
            f"the worker process of '{job.name}' was killed, perhaps for want of memory: run the same command again to "
            f"go on, with fewer workers than {count}"
        ) from None
    if answer is not None:
        is_mistake, text, trace = answer
        raise UserError(text) if is_mistake else RuntimeError(f"{job.name}: {text}\n\n{trace}")


def _serve(line: Connection, payload: bytes, number: int) -> None:
    """Work on one job after another, until the parent ends this process, or ends itself."""
    global _PLACE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _PLACE = number
    settle()
    try:
        work, ledger = pickle.loads(payload)  # heavy imports happen here
        with quiet_trainers():  # from here on, for Lightning says when it is imported that it will speak
            while True:
                job = line.recv()
                with threads_for(job.flops):
                    record = work(job.task, lambda: None)
                ledger.write(job.identity, record)
                line.send(None)
    except Exception as error:
        line.send((isinstance(error, UserError | OSError), f"{error}", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
            os.environ.update({name: before[name]} if name in before else {})
