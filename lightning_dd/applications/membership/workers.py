"""Independent tasks, one after another in this process or side by side in several."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import torch

from lightning_dd.utils.errors import UserError

Task = TypeVar("Task")

_PLACE = 0  # of this process among the workers


def run_tasks(
    function: Callable[[Task], None], tasks: Sequence[Task], workers: int, on_done: Callable[[], None] = lambda: None
) -> None:
    """Call a function on every task; it leaves its result in a file.

    Every process gets its share of the CPU's cores. The first error of a task ends the others.

    Args:
        function: of a module, or a partial of one, so that it can be sent to another process.
        tasks: plain values.
        workers: processes; 1 is this one.
        on_done: called after each task.

    Raises:
        UserError: a process was killed.
    """
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            function(task)
            on_done()
        return
    threads = max(1, (os.cpu_count() or workers) // workers)
    context = get_context("spawn")
    places = context.Queue()
    for place in range(workers):
        places.put(place)
    with (
        _environment("OMP_NUM_THREADS", str(threads)),  # read when torch is loaded in the new process
        ProcessPoolExecutor(workers, context, initializer=_open, initargs=(places, threads)) as pool,
    ):
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                on_done()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory: run the same command again to go on, "
                f"with fewer workers than {workers}"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def device_of(accelerator: str) -> torch.device:
    """Return where this process trains: a GPU of its own if there is one and ``accelerator`` is not ``cpu``."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _PLACE % torch.cuda.device_count())


def _open(places: "object", threads: int) -> None:
    global _PLACE
    torch.set_num_threads(threads)
    _PLACE = places.get()  # type: ignore[attr-defined]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old
