"""The runner: nothing is done twice, nothing is left behind, and one line says what went wrong."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_jobs
from pytorch_lightning.utilities import rank_zero_only
from toy_jobs import Launched, jobs, run, work

from lightning_dd import jobs as module
from lightning_dd.jobs import (
    ArrayLedger,
    Job,
    Ledger,
    check_workers,
    device_of,
    launcher,
    place,
    run_jobs,
    workers_on,
)
from lightning_dd.utils.errors import UserError


def started(folder):
    """The numbers of the jobs begun, and the processes that did."""
    return [tuple(map(int, path.stem.split("-"))) for path in Path(folder).glob("*.pid")]


def is_alive(process):
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start(folder, kinds, workers=2):
    """Run toy jobs in a process of its own, and wait until two of them have begun."""
    command = [sys.executable, toy_jobs.__file__, str(folder), ",".join(kinds), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(toy_jobs.__file__).parent.parent)}
    parent = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(started(folder)) >= 2)
    return parent


# ---- the ledger --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "record"), [(Ledger, {"a": [1.5, None]}), (ArrayLedger, {"a": np.arange(3), "b": np.array([True])})]
)
def test_a_record_is_kept_under_everything_it_depends_on(kind, record, tmp_path):
    ledger, identity = kind(tmp_path / "new"), {"seed": 0, "of": ["x"]}
    assert ledger.read(identity) is None
    ledger.write(identity, record)
    found = ledger.need({"of": ["x"], "seed": 0})
    assert {name: list(value) for name, value in found.items()} == {name: list(value) for name, value in record.items()}
    assert ledger.read(identity | {"seed": 1}) is None
    (path,) = ledger.folder.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert ledger.read(identity) is None
    with pytest.raises(UserError, match="has disappeared or is damaged"):
        ledger.need(identity)


# ---- who does what -----------------------------------------------------------------------------------------------


def test_one_worker_and_two_give_the_same_and_the_longest_job_comes_first(tmp_path):
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        run(["short"] * 5, tmp_path / str(workers), workers)
    one, two = (Ledger(tmp_path / name / "ledger") for name in "12")
    for number in range(5):
        mine, theirs = (ledger.need({"number": number}) for ledger in (one, two))
        assert mine["value"] == theirs["value"]
        assert not theirs["torch"]  # a worker is as light as its work
    assert {process for _, process in started(tmp_path / "1")} == {os.getpid()}
    assert len({process for _, process in started(tmp_path / "2")} | {os.getpid()}) == 3
    order = []
    run_jobs(jobs(["short"] * 3, tmp_path), lambda task, tick: order.append(task[1]) or {}, Ledger(tmp_path / "other"))
    assert order == [2, 1, 0]


def test_an_identity_is_done_once_and_a_damaged_record_again(tmp_path):
    calls = []
    ledger = Ledger(tmp_path)
    asked = [Job(f"job {name}", {"same": number}, number) for name, number in enumerate([0, 1, 0, 1])]

    def count(task, tick):
        calls.append(task)
        return {"task": task}

    assert run_jobs(asked, count, ledger)
    assert sorted(calls) == [0, 1]
    ledger.path({"same": 1}).write_text("{")
    run_jobs(asked, count, ledger)
    assert sorted(calls) == [0, 1, 1]
    assert [ledger.need(job.identity)["task"] for job in asked] == [0, 1, 0, 1]


def test_processes_of_a_launcher_share_the_jobs_and_one_leads(tmp_path, monkeypatch):
    ledger, calls = Ledger(tmp_path), []

    def as_rank(rank, together=False):
        monkeypatch.setattr(module, "launcher", lambda: Launched(rank))
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        return run_jobs(
            jobs(["short"] * 4, tmp_path), lambda task, tick: calls.append(task[1]) or {}, ledger, together=together
        )

    def other(jobs, ledger):  # in place of waiting, the other process does its work
        monkeypatch.setattr(module, "wait_for", lambda jobs, ledger: None)
        calls.append("waiting")
        assert not as_rank(1)

    monkeypatch.setattr(module, "wait_for", other)
    assert as_rank(0)
    assert calls == [2, 0, "waiting", 3, 1]
    # Processes that train every student together all do everything, and the first one keeps it.
    ledger, calls = Ledger(tmp_path / "together"), []
    assert not as_rank(1, together=True)
    assert calls == [3, 2, 1, 0]
    assert not ledger.folder.exists()
    assert as_rank(0, together=True)
    assert len(list(ledger.folder.iterdir())) == 4


def test_the_leader_waits_for_what_others_do(tmp_path, monkeypatch):
    (job,) = jobs(["short"], tmp_path)
    ledger = Ledger(tmp_path)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: ledger.write(job.identity, {}))
    module.wait_for([job], ledger)
    assert ledger.read(job.identity) == {}


def test_launchers_are_recognised(monkeypatch):
    assert launcher() is None
    settings = {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "3"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = launcher()
    assert (found.global_rank(), found.world_size()) == (1, 3)


def test_every_worker_has_a_gpu_of_its_own_as_far_as_they_go(monkeypatch):
    assert place() is None
    assert device_of("cpu").type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for number, index in ((None, 0), (0, 0), (1, 1), (2, 0)):
        monkeypatch.setattr(module, "_PLACE", number)
        assert device_of("auto").index == index
        assert device_of("cpu").type == "cpu"
    assert workers_on("auto", "auto") == 2
    assert workers_on("cpu", "auto") == "auto"
    assert workers_on("auto", 3) == 3


@pytest.mark.parametrize("workers", [0, -1, "many", 1.5])
def test_workers_are_a_number_or_auto(workers):
    with pytest.raises(UserError, match="workers must be at least 1, or 'auto', got"):
        check_workers(workers)


def test_auto_takes_the_cores_but_no_more_than_there_are_jobs(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(module, "_in_workers", lambda jobs, payload, count, *more: counts.append(count))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for kinds in (["short"] * 3, ["short"] * 9):
        run_jobs(jobs(kinds, tmp_path), work, Ledger(tmp_path / "ledger"), "auto")
    assert counts == [3, 4]
    run_jobs(jobs(["short"], tmp_path), work, Ledger(tmp_path / "ledger"), "auto")
    assert counts == [3, 4]  # one job alone is this process's
    assert {process for _, process in started(tmp_path)} == {os.getpid()}


def test_auto_leaves_short_work_to_this_process_and_every_process_its_memory(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(module, "_in_workers", lambda jobs, payload, count, *more: counts.append(count))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for number, flops in enumerate((1e3, 1e12)):
        asked = [replace(job, flops=flops) for job in jobs(["short"] * 3, tmp_path)]
        run_jobs(asked, work, Ledger(tmp_path / str(number)), "auto")
    assert counts == [3]
    monkeypatch.setattr(module, "_WORKER_BYTES", 2**60)
    run_jobs(jobs(["short"] * 3, tmp_path), work, Ledger(tmp_path / "ledger"), "auto")
    assert counts == [3]


def test_the_longest_job_comes_first_by_what_its_steps_take(tmp_path):
    order = []
    asked = [Job(f"{flops}", {"of": flops}, flops, cost, flops) for flops, cost in ((1e9, 3), (1e12, 2), (1e6, 9))]
    run_jobs(asked, lambda task, tick: order.append(task) or {}, Ledger(tmp_path))
    assert order == [1e12, 1e9, 1e6]


@pytest.mark.parametrize("workers", [1, 2])
def test_small_jobs_take_one_thread_here_and_in_workers(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    asked = [Job(f"{flops}", {"of": flops}, flops, flops=flops) for flops in (1e3, 1e12)]
    run_jobs(asked, toy_jobs.count_threads, Ledger(tmp_path), workers)
    assert [Ledger(tmp_path).need(job.identity)["threads"] for job in asked] == [1, 2]
    torch.set_num_threads(before)


# ---- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_ends_the_run_with_its_message(workers, tmp_path):
    with pytest.raises(UserError, match=r"^number 1 will not do$"):
        run(["short", "mistake"], tmp_path, workers)
    with pytest.raises((ZeroDivisionError, RuntimeError), match="number 1"):
        run(["short", "fault", "short"], tmp_path, workers)


def test_a_killed_worker_is_one_line_that_names_its_job(tmp_path):
    with pytest.raises(UserError, match=r"'job 1' was killed, perhaps for want of memory.* fewer workers than 2$"):
        run(["short", "kill"], tmp_path, 2)
    processes = {process for _, process in started(tmp_path)} - {os.getpid()}
    assert processes
    wait_until(lambda: not any(map(is_alive, processes)), 5)


def test_ctrl_c_ends_soon_leaves_nobody_and_the_next_run_does_what_is_missing(tmp_path):
    parent = start(tmp_path, ["short", "long", "long", "short"])
    ledger = Ledger(tmp_path / "ledger")
    wait_until(lambda: ledger.read({"number": 3}))
    wait_until(lambda: len(started(tmp_path)) == 3)
    end = time.monotonic() + 5
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the parent and to the workers
    errors = parent.communicate(timeout=60)[1]
    assert time.monotonic() < end
    assert parent.returncode != 0
    assert errors.count("Traceback") == 1  # the parent's own
    assert not any(is_alive(process) for _, process in started(tmp_path))
    before = len(started(tmp_path))
    (tmp_path / "short").touch()
    run(["short", "long", "long", "short"], tmp_path, 1)
    assert sorted(number for number, process in started(tmp_path) if process == os.getpid()) == [0, 1, 2]
    assert len(started(tmp_path)) == before + 3


def test_workers_end_when_their_parent_is_killed(tmp_path):
    parent = start(tmp_path, ["long", "long"])
    processes = [process for _, process in started(tmp_path)]
    assert all(map(is_alive, processes))
    parent.kill()
    parent.communicate()
    wait_until(lambda: not any(map(is_alive, processes)), 10)
