"""What several processes of one run do when one of them dies or hangs: the run ends, in one line that names it."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lightning_dd.utils.errors import UserError

SILENT_AFTER = 60.0
"""Seconds without a sign of life after which a process counts as hanging."""
_BEAT = 1.0
_NAME, _OVER = "lightning_dd/", "over"


class Lookout(Callback):
    """Let every process of a run show signs of life, and end the run where one of them stops.

    A process that is stopped, or whose machine is gone, is noticed after :data:`SILENT_AFTER` seconds; one that is
    killed, when the others next wait for it; one that lives and takes no part any more, after the process group's
    timeout (of Lightning's strategy; 30 minutes). Then the first process that is left says which one it was, ends those
    that it started, and exits with status 2.
    """

    _signs: "_Signs | None" = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin."""
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized() and self._signs is None:
            self._signs = _Signs(trainer.global_rank, trainer.world_size, _started_by(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say that this process is done."""
        if self._signs is not None:
            self._signs.stop()
            self._signs = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run in one line if what failed was waiting for another process."""
        signs, self._signs = self._signs, None
        if signs is not None:
            waited = isinstance(exception, dist.DistError) or "gloo" in str(exception).lower()
            signs.name_missing() if waited else signs.stop()

    def on_train_batch_start(self, *args: Any) -> None:
        """Note how far this process is."""
        self._go_on()

    def on_before_backward(self, *args: Any) -> None:
        """Note how far this process is: it waits for the others next."""
        self._go_on()

    def on_train_batch_end(self, *args: Any) -> None:
        """Note how far this process is."""
        self._go_on()

    def _go_on(self) -> None:
        if self._signs is not None:
            self._signs.place += 1


class _Signs:
    """Signs of life of all processes, in the store where they met: each its own count and how far its run is.

    Two threads: what reads may wait for ever for a store whose process is stopped, and what judges must not.
    """

    def __init__(self, rank: int, world_size: int, started: Sequence[Any]) -> None:
        self.rank, self.world_size, self.started = rank, world_size, started
        self.place = 0
        self._over = threading.Event()
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            *place, is_master=False, timeout=timedelta(seconds=SILENT_AFTER)
        )
        self._store.set(f"{_NAME}{rank}", "0 0")  # before any process goes on to what it may die of
        self._seen: dict[int, tuple[str, float]] = {}
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Show that this process is done, and no longer look at the others."""
        self._over.set()
        self._threads[0].join(2 * _BEAT)

    def name_missing(self) -> None:
        """End the run: another process has failed, or did not come for longer than the process group waits."""
        ended = self._ended()
        if not ended:
            time.sleep(4 * _BEAT)  # until the signs of a process that is gone are seen to be missing
            store_gone = not self._threads[0].is_alive()
            ended = dict.fromkeys(self._silent(3 * _BEAT) or [0] * store_gone, -1)
        if ended:
            died = [rank for rank, status in ended.items() if status < 0]  # the others have said why themselves
            self._end(died, "has died")
        places = {rank: int(sign.split()[1]) for rank, (sign, _) in self._seen.items() if sign != _OVER}
        last = min(places, key=lambda rank: (places[rank], rank == self.rank), default=0)
        self._end([last], "lives, but the others waited for it in vain")

    def _ended(self) -> dict[int, int]:
        """Return the exit statuses of processes that this one started, soon after one of them has ended."""
        for _ in range(10):
            ended = {self.rank + place: proc.poll() for place, proc in enumerate(self.started, start=1)}
            if found := {rank: status for rank, status in ended.items() if status}:
                return found
            time.sleep(_BEAT / 10)
        return {}

    def _beat(self) -> None:
        names = [_NAME + str(rank) for rank in range(self.world_size)]
        with suppress(Exception):  # the store is gone, and the process with it that kept it: nobody is seen any more
            count = 0
            while not self._over.wait(_BEAT):
                count += 1
                self._store.set(names[self.rank], f"{count} {self.place}")
                if self._store.check(names):
                    for rank, sign in enumerate(self._store.multi_get(names)):
                        if self._seen.get(rank, ("", 0.0))[0] != sign.decode():
                            self._seen[rank] = sign.decode(), time.monotonic()
            self._store.set(names[self.rank], _OVER)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(_BEAT):
            now = time.monotonic()
            if now - before > SILENT_AFTER / 2:  # this process was stopped itself, and the others with it perhaps
                self._seen = {rank: (sign, now) for rank, (sign, _) in self._seen.items()}
            before = now
            if silent := self._silent(SILENT_AFTER):
                self._end(silent, f"has shown no sign of life for {SILENT_AFTER:g} s")

    def _silent(self, seconds: float) -> list[int]:
        """Return the other processes of which nothing new was seen for some time; of all, the one with the store."""
        now = time.monotonic()
        silent = [rank for rank, (sign, then) in self._seen.items() if sign != _OVER and now - then > seconds]
        return [0] if 0 in silent else [rank for rank in silent if rank != self.rank]

    def _end(self, ranks: Sequence[int], what: str) -> None:
        first = min(set(range(self.world_size)) - set(ranks), default=0)
        if ranks and self.rank == first:
            named = " and ".join(map(str, ranks))
            text = (
                f"process {named} (they are 0 to {self.world_size - 1}) {what}; what was written before stays as it is"
            )
            print(f"lightning-dd: error: {text}", file=sys.stderr, flush=True)
        for process in self.started:
            process.kill()
        os._exit(2)  # from a thread, and past what would wait for the others


def _started_by(trainer: Trainer) -> Sequence[Any]:
    """Return the processes that this one has started for the run; those of fork and spawn have a parent that waits."""
    processes: Sequence[Any] = getattr(trainer.strategy.launcher, "procs", ())
    return [process for process in processes if hasattr(process, "poll")]


def error_of_process(error: Exception) -> UserError | SystemExit | None:
    """Return what to raise where a process of fork or spawn failed: in one line, or silently if it has spoken itself.

    Returns:
        ``None`` for any other fault.
    """
    if isinstance(error, ProcessExitedException):
        if error.signal_name is None:
            return SystemExit(error.exit_code)
        return UserError(f"process {error.error_index} of the run was ended by {error.signal_name}")
    if not isinstance(error, ProcessRaisedException):
        return None
    kind, _, text = str(error).strip().rpartition("\n")[2].partition(": ")
    return UserError(text) if kind == f"{UserError.__module__}.{UserError.__name__}" else None
