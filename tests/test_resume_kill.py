"""A run ended by SIGKILL and resumed equals the run never killed."""

import os
import signal

import pytest
import torch
from helpers import TinyData, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dd.callbacks import PoolAlternation
from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe


class Die(Callback):
    """The machine goes down in the middle of outer step ``at``."""

    def __init__(self, at):
        self.at = at

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, extra=(), ckpt_path=None):
    model = FRePo(architecture="conv:width=4,depth=2", real_batch_size=8, pool_size=3, lifetime=5, probe=Probe(steps=3))
    keep = ModelCheckpoint(folder, save_last=True, every_n_train_steps=5)
    trainer = tiny_trainer(
        folder, 20, callbacks=[PoolAlternation(), keep, *extra], enable_checkpointing=True, val_check_interval=4
    )
    trainer.fit(model, TinyData(), ckpt_path=ckpt_path)
    return model


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_and_resume_equal_the_run_never_killed(tmp_path):
    straight = run(tmp_path / "straight")
    child = os.fork()
    if child == 0:
        run(tmp_path / "killed", [Die(at=13)])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    checkpoint = tmp_path / "killed" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 10
    resumed = run(tmp_path / "killed", ckpt_path=str(checkpoint))
    assert torch.equal(straight.synthetic.images, resumed.synthetic.images)
    assert torch.equal(straight.synthetic.labels, resumed.synthetic.labels)
    for left, right in zip(straight.pool.members, resumed.pool.members, strict=True):
        assert left.age == right.age
        for name, value in left.network.state_dict().items():
            assert torch.equal(value, right.network.state_dict()[name])
