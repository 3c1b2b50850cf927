"""Two real processes (gloo on the CPU): what is shared, what is not, and what is counted."""

from dataclasses import replace

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


def distil(folder, steps, model=None, ckpt_path=None, every=100, **kwargs):
    folder.mkdir(exist_ok=True)
    callbacks = [
        PoolAlternation(),
        KeepRank(folder),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1),
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
