"""Two real processes (gloo on the CPU): what is shared, what is not, and what is counted."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TinyData, make_distilled, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_dd.callbacks import DistillationProgress, ExportDistilledSet, PoolAlternation, SyntheticImages
from lightning_dd.distilled import DistilledData
from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe
from lightning_dd.students import Student
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.processes import Lookout, _Signs, error_of_process
from lightning_dd.utils.trainer import make_trainer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
TINY = {
    "architecture": "conv:width=4,depth=2",
    "real_batch_size": 8,
    "pool_size": 2,
    "lifetime": 4,
    "probe": Probe(steps=3),
}
TWO = {"devices": 2, "strategy": "ddp_fork"}


class KeepRank(Callback):
    """Let every rank write what it holds when training ends."""

    def __init__(self, folder):
        self.folder = folder

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer, pl_module):
        state = {"module": pl_module.state_dict(), "gradients": self.gradients}
        if isinstance(pl_module, FRePo):
            state["pool"] = pl_module.pool.state_dict()
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


def ranks(folder, count=2):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


def distil(folder, steps, model=None, ckpt_path=None, every=100, more=(), **kwargs):
    folder.mkdir(exist_ok=True)
    callbacks = [
        PoolAlternation(),
        KeepRank(folder),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1),
        *more,
    ]
    trainer = tiny_trainer(folder, steps, callbacks=callbacks, enable_checkpointing=True, **kwargs)
    trainer.fit(model or FRePo(**TINY), TinyData(), ckpt_path=ckpt_path)
    return trainer


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_ranks_share_the_synthetic_set_and_keep_their_own_pools(tmp_path):
    distil(tmp_path, 6, **TWO)
    first, second = ranks(tmp_path)
    assert same(first["module"], second["module"])
    assert not same(first["pool"]["members"][0]["network"], second["pool"]["members"][0]["network"])


class SplitBatch(FRePo):
    """Every rank sees its half of one fixed batch, through the same network."""

    def configure_pool(self, generator, device):
        return super().configure_pool(torch.Generator().manual_seed(0), device)

    def draw_real(self):
        train = self.trainer.datamodule.train
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return train.take(slice(rank, None, world))


def test_two_processes_give_the_gradient_of_one(tmp_path):
    distil(tmp_path / "one", 1, SplitBatch(**TINY))
    distil(tmp_path / "two", 1, SplitBatch(**TINY), **TWO)
    (one,), two = ranks(tmp_path / "one", 1), ranks(tmp_path / "two")
    assert set(one["gradients"]) == {"synthetic.parameterisation.images", "synthetic.labels"}
    for rank in two:
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-4, atol=1e-8)


def test_every_rank_resumes_its_own_pool_bit_for_bit(tmp_path):
    distil(tmp_path / "straight", 8, every=3, **TWO)
    distil(tmp_path / "resumed", 8, ckpt_path=str(tmp_path / "straight" / "step=3.ckpt"), **TWO)
    for straight, resumed in zip(ranks(tmp_path / "straight"), ranks(tmp_path / "resumed"), strict=True):
        assert same(straight["module"], resumed["module"])
        for left, right in zip(straight["pool"]["members"], resumed["pool"]["members"], strict=True):
            assert same(left["network"], right["network"])


def test_every_callback_and_logger_works_on_two_processes(tmp_path):
    callbacks = [
        PoolAlternation(),
        ExportDistilledSet(),
        SyntheticImages(every=2),
        DistillationProgress(),
        LearningRateMonitor(),
        ModelCheckpoint(every_n_train_steps=2, save_last=True),
    ]
    trainer = tiny_trainer(
        tmp_path,
        6,
        callbacks=callbacks,
        logger=TensorBoardLogger(tmp_path, name="run", version="v"),
        enable_checkpointing=True,
        enable_progress_bar=True,
        log_every_n_steps=2,
        val_check_interval=3,
        **TWO,
    )
    trainer.fit(FRePo(**TINY), TinyData())
    written = {path.name for path in (tmp_path / "run" / "v").rglob("*") if path.is_file()}
    assert {"best.safetensors", "last.safetensors", "initial.png", "final.png", "labels.png", "last.ckpt"} <= written


def test_another_number_of_processes_cannot_continue(tmp_path):
    distil(tmp_path / "two", 2, every=2, **TWO)
    with pytest.raises(UserError, match=r"written by 2 process\(es\) and this run has 1"):
        distil(tmp_path / "one", 4, ckpt_path=str(tmp_path / "two" / "step=2.ckpt"))


class OddTest(TinyData):
    per_class = 7  # 21 test images: one rank has one more


def test_accuracy_counts_every_test_image_once(tmp_path):
    results = []
    for kwargs in ({}, TWO):
        student = Student("conv:width=4,depth=2,norm=none", augment="none")
        data = DistilledData.from_set(make_distilled(), OddTest())
        trainer = tiny_trainer(tmp_path, 8, callbacks=[], **kwargs)
        results.append(trainer.test(student, data, verbose=False)[0]["test/accuracy"])
    assert results[0] == pytest.approx(results[1], abs=1e-7)
    assert (results[1] * 21) == pytest.approx(round(results[1] * 21), abs=1e-4)


def test_students_on_two_processes_take_the_steps_of_one(tmp_path):
    for name, kwargs in (("one", {}), ("two", TWO)):
        (tmp_path / name).mkdir()
        student = Student("conv:width=4,depth=2,norm=none", augment="none", lr=0.01)
        data = DistilledData.from_set(make_distilled(ipc=2), TinyData())  # 6 rows: 3 for each of two ranks
        tiny_trainer(tmp_path, 5, callbacks=[KeepRank(tmp_path / name)], **kwargs).fit(student, data)
    (one,), two = ranks(tmp_path / "one", 1), ranks(tmp_path / "two")
    assert same(two[0]["module"], two[1]["module"])
    for name, value in one["module"].items():
        torch.testing.assert_close(two[0]["module"][name], value, rtol=1e-3, atol=1e-5)


def test_a_process_with_fewer_rows_counts_less_so_that_three_processes_are_as_one(tmp_path):
    for name, kwargs in (("one", {}), ("three", TWO | {"devices": 3})):
        (tmp_path / name).mkdir()
        student = Student("conv:width=4,depth=2,norm=none", augment="none", lr=0.01)
        data = DistilledData.from_set(make_distilled(ipc=4, data=TinyData), TinyData(), batch_size=None)
        data.distilled = replace(
            data.distilled, **{part: getattr(data.distilled, part)[:10] for part in ("images", "labels", "classes")}
        )  # 4, 3 and 3 rows
        tiny_trainer(tmp_path, 5, callbacks=[KeepRank(tmp_path / name)], **kwargs).fit(student, data)
    (one,), three = ranks(tmp_path / "one", 1), ranks(tmp_path / "three", 3)
    for rank in three:
        for name, value in one["module"].items():
            torch.testing.assert_close(rank["module"][name], value, rtol=1e-3, atol=1e-5)


def test_more_processes_than_synthetic_images_are_refused():
    from lightning_dd.distilled.views import SyntheticBatches

    with pytest.raises(UserError, match="4 processes cannot share 3 synthetic images"):
        SyntheticBatches(torch.zeros(3, 1, 2, 2), torch.zeros(3, 3), 5, 1, 0, world_size=4)


@pytest.fixture
def watched(monkeypatch):
    """The signs of life of process 0, with those of process 1 in the test's hands, and how it would have exited."""
    exits = []
    for name, value in {"SILENT_AFTER": 0.5, "_BEAT": 0.05, "os._exit": exits.append}.items():
        monkeypatch.setattr(f"lightning_dd.utils.processes.{name}", value)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    made = []

    def watch(sign, started=()):
        store.set("lightning_dd/1", sign)
        made.append(_Signs(0, 2, started))
        while 1 not in made[0]._seen:
            time.sleep(0.01)
        return made[0], exits

    yield watch
    made[0].stop()


def test_a_process_without_a_sign_of_life_ends_the_run(watched, capfd):
    _, exits = watched("1 0")
    wait_until(lambda: exits)
    assert exits[0] == 2
    line = "process 1 (they are 0 to 1) has shown no sign of life for 0.5 s; what was written before stays as it is"
    assert capfd.readouterr().err.splitlines()[0] == f"lightning-dd: error: {line}"


def test_a_process_that_is_done_needs_no_sign_of_life(watched):
    signs, exits = watched("over")
    signs._threads[1].join(1)
    assert not exits


class Ended:
    def __init__(self, status):
        self.status, self.killed = status, False

    def poll(self):
        return self.status

    def kill(self):
        self.killed = True


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (-9, "process 1 (they are 0 to 1) has died"),
        (2, ""),  # it has said why itself
        (None, "process 1 (they are 0 to 1) lives, but the others waited for it in vain"),
    ],
)
def test_who_did_not_come_is_named(watched, capfd, monkeypatch, status, line):
    process = Ended(status)
    signs, exits = watched("1 0", [process])
    monkeypatch.setattr(signs, "_silent", lambda seconds: [])
    signs.place = 1
    failed, look = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"), Lookout()
    look._signs = signs
    look.on_exception(None, None, failed)
    assert line in capfd.readouterr().err
    assert exits[0] == 2
    assert process.killed
    look.on_exception(None, None, failed)  # as Lightning calls it again


SLOW = {
    "stop": (signal.SIGSTOP, 1, "process 1 (they are 0 to 1) has shown no sign of life for 60 s"),
    "kill": (signal.SIGKILL, 1, "process 1 (they are 0 to 1) has died"),
    "kill the first": (signal.SIGKILL, 0, "process 0 (they are 0 to 1) has died"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SLOW)
def test_a_process_that_dies_or_stops_is_named_in_a_run(tmp_path, what):
    number, rank, line = SLOW[what]
    words = ["fit", "--config=mnist5k/dm", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    words += ["--trainer.max_steps=100000", "--trainer.enable_progress_bar=false", "--trainer.val_check_interval=99999"]
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen([sys.executable, "-m", "lightning_dd", *words], stdout=said, stderr=said)
        try:
            wait_until(lambda: "Total Flops" in (tmp_path / "said").read_text())
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            other = next(int(pid) for pid in children if b"lightning_dd" in Path(f"/proc/{pid}/cmdline").read_bytes())
            os.kill(other if rank else run.pid, number)
            wait_until(lambda: "lightning-dd: error" in (tmp_path / "said").read_text())
            wait_until(lambda: run.poll() is not None)
        finally:
            run.kill()
    (only,) = [text for text in (tmp_path / "said").read_text().splitlines() if "error" in text or "gloo/" in text]
    assert line in only
    assert run.wait() == (2 if rank else -9)


def wait_until(true, seconds=300):
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.2)


def test_what_a_process_of_several_raised_is_one_line(tmp_path):
    class Break(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_rank == 1:
                raise UserError("ipc must be at least 1")

    with pytest.raises(Exception, match="ipc must be") as caught:
        distil(tmp_path, 2, more=[Break()], **TWO)
    assert str(error_of_process(caught.value)) == "ipc must be at least 1"
    assert error_of_process(ValueError()) is None


def test_every_trainer_of_several_processes_looks_out():
    assert any(isinstance(callback, Lookout) for callback in make_trainer(accelerator="cpu", **TWO).callbacks)
    alone = make_trainer(accelerator="cpu", devices=1)
    assert not any(isinstance(callback, Lookout) for callback in alone.callbacks)
