"""A run that breaks stops in one line, and what was written before is whole."""

import pytest
import torch
from helpers import TinyData, tiny_settings, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dd.callbacks import ExportDistilledSet, PoolAlternation
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import DC, DM, DSA, MTT, FRePo, SRe2L
from lightning_dd.distillers.base import OuterTerm
from lightning_dd.students import Student
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.finite import all_finite

BREAKS_AT = 3


@pytest.fixture(autouse=True)
def quick_stages(monkeypatch):
    """In place of training: teachers as they are, said to be good."""
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", lambda architecture, network, *args: 1.0)
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)


class Spoil(Callback):
    """Put a number that is none into something of the run, in or after one outer step."""

    def __init__(self, what, number=float("nan")):
        self.what, self.number = what, number

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_step + 1 == BREAKS_AT and self.what == "seen":
            model.synthetic.parameterisation.images.data[:] = self.number

    def on_before_optimizer_step(self, trainer, model, optimizer):
        if trainer.global_step + 1 == BREAKS_AT and self.what == "gradient":
            self.spoil(model.synthetic.parameterisation.images.grad)

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if trainer.global_step != BREAKS_AT - 1:
            return
        if self.what in ("images", "labels"):
            self.spoil(getattr(model.synthetic, self.what))
        if self.what == "network":
            self.spoil(next(model.pool.members[0].network.parameters()))
        if self.what == "optimizer":
            self.spoil(next(iter(trainer.optimizers[0].state.values()))["exp_avg"])

    def spoil(self, tensor):
        tensor.data.flatten()[0] = self.number


class Infinite(OuterTerm):
    def add(self, trainer, distiller, images, labels, loss):
        due = trainer.global_step + 1 == BREAKS_AT
        return loss, {"own": (float("inf") if due else 0.0) * images.square().sum()}


def build(cls, **changes):
    width = "convnet:width=4,depth=2,norm=" + ("none" if cls is MTT else "batch")
    return cls(**tiny_settings(cls) | {"architecture": width, **changes})


def fit(folder, model, spoil=(), steps=6, every=1):
    keep = ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=every)
    callbacks = [PoolAlternation(), ExportDistilledSet(str(folder)), keep, *spoil]
    trainer = tiny_trainer(folder, steps, callbacks=callbacks, enable_checkpointing=True, val_check_interval=2)
    trainer.fit(model, TinyData())


def written_before(folder, step):
    """The state of what a run has left: all of it from before it broke."""
    for path in (folder / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["global_step"] == step
        assert all_finite([checkpoint["state_dict"], checkpoint["optimizer_states"], checkpoint["lightning_dd"]])
    assert not (folder / "last.safetensors").exists()


@pytest.mark.parametrize("cls", [DM, DC, DSA, MTT, SRe2L, FRePo])
@pytest.mark.parametrize(
    ("what", "message", "kept"),
    [
        ("seen", r"outer step 3: (\w+ is nan|the \d x \d synthetic kernel is not positive definite)", 2),
        ("gradient", r"outer step 3: the gradient of synthetic\.parameterisation\.images is nan", 2),
        ("images", "after outer step 2: images have pixels of nan", 1),
    ],
)
def test_nan_in_any_method_stops_it_before_anything_is_written(tmp_path, cls, what, message, kept):
    with pytest.raises(UserError, match=rf"^{message}.*; lower model\.lr \([\d.]+\)") as error:
        fit(tmp_path, build(cls), [Spoil(what)])
    assert "\n" not in str(error.value)
    written_before(tmp_path, kept)


@pytest.mark.parametrize(
    ("spoil", "message", "kept"),
    [
        (Spoil("labels"), "after outer step 2: labels are not finite; lower model.lr", 1),
        (Spoil("network"), r"after outer step 2: not all .*; a network .*: lower model\.inner_lr \(0\.0003\)", 1),
        (Spoil("optimizer"), "after outer step 2: not all of its state is finite", 1),
        (Spoil("images", 1e11), r"after outer step 2: images have pixels of \d.*e\+\d\d, far beyond \[0, 1\]", 1),
        (Infinite(), "outer step 3: own is inf; lower model.lr", 2),
    ],
)
def test_whatever_breaks_is_named(tmp_path, spoil, message, kept):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, build(FRePo), [spoil])
    written_before(tmp_path, kept)


def test_a_rate_far_too_large_ends_in_one_line_and_the_best_set_stays(tmp_path):
    fit(tmp_path, build(DM), steps=2)
    best = (tmp_path / "best.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"far beyond \[0, 1\]; lower model\.lr \(1e\+08\)"):
        fit(tmp_path, build(DM, lr=1e8))
    assert (tmp_path / "best.safetensors").read_bytes() == best
    assert all_finite(DistilledSet.load(tmp_path / "last.safetensors").images)


def test_a_set_that_nothing_reads_is_not_written_in_silence(tmp_path):
    class Far(Callback):
        def on_train_batch_end(self, trainer, model, *args):
            model.synthetic.parameterisation.images.data[:] = model.task.preprocessing(torch.full((3, 1, 8, 8), 500.0))

    with pytest.warns(UserWarning, match=r"pixels beyond 100, .* nothing reads a set of them; lower model\.lr"):
        fit(tmp_path, build(DM), [Far()], steps=2)
    with pytest.raises(UserError, match=r"pixels lie in .*, far beyond \[0, 1\]"):
        DistilledSet.load(tmp_path / "last.safetensors")


def test_between_looks_the_first_of_the_faults_is_the_one_named(tmp_path):
    """As on a GPU, where a look waits for the device."""
    model = build(DM)
    tiny_trainer(tmp_path, 1).fit(model, TinyData())
    model.note({"fine": torch.tensor(1.0), "broken": torch.tensor(float("inf"))})
    model.note({"fine": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match="outer step 2: broken is inf"):
        model.distilled_set()


def test_a_diverged_student_leaves_no_checkpoint(tmp_path):
    student = Student("conv:width=4,depth=2,norm=none")
    kept = {"state_dict": {"weight": torch.tensor([float("nan")])}, "hyper_parameters": {}}
    with pytest.raises(UserError, match=r"the student has diverged .*: lower model\.lr"):
        student.on_save_checkpoint(kept)
