"""Jobs for tests of the runner: they import nothing heavy, in the parent and in workers alike."""

import os
import signal
import sys
import time
from pathlib import Path

from lightning_dd.jobs import Job, Ledger, place, run_jobs
from lightning_dd.utils.errors import UserError


def work(task, tick):
    """Leave the process's id behind, and do what the task says."""
    kind, number, folder = task
    Path(folder, f"{number}-{os.getpid()}.pid").touch()
    if kind == "kill" and place() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "mistake":
        raise UserError(f"number {number} will not do")
    if kind == "fault":
        raise ZeroDivisionError(f"number {number}")
    if kind == "long" and not Path(folder, "short").exists():
        time.sleep(120)
    tick()
    return {"number": number, "value": sum(1 / (n + number + 1) for n in range(1000)), "torch": "torch" in sys.modules}


def count_threads(task, tick):
    """Say how many threads torch would take."""
    import torch

    return {"threads": torch.get_num_threads()}


def jobs(kinds, folder):
    """One job per kind; the cost grows with the number."""
    return [
        Job(f"job {number}", {"number": number}, (kind, number, str(folder)), cost=number + 1)
        for number, kind in enumerate(kinds)
    ]


def run(kinds, folder, workers):
    """Do them, with a ledger in the folder."""
    ledger = Ledger(Path(folder) / "ledger")
    run_jobs(jobs(kinds, folder), work, ledger, workers)
    return ledger


class Launched:
    """One of two processes of a launcher."""

    def __init__(self, rank):
        self.rank = rank

    def global_rank(self):
        return self.rank

    def world_size(self):
        return 2


if __name__ == "__main__":
    run(sys.argv[2].split(","), sys.argv[1], int(sys.argv[3]))
