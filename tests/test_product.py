"""Every distiller x parameterisation x labels x MetaDD, on tiny data: a new distiller is tested by being exported."""

import itertools

import pytest
import torch
from helpers import TinyData, tiny_settings, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

import lightning_dd.distillers
from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import Distiller
from lightning_dd.synthetic import Latents, Pixels, TeacherLabels
from lightning_dd.utils.errors import UserError

NETWORK = "convnet:width=4,depth=2"
EXPORTED = [getattr(lightning_dd.distillers, name) for name in lightning_dd.distillers.__all__]
METHODS = [cls for cls in EXPORTED if issubclass(cls, Distiller) and not cls.__abstractmethods__]
PRODUCT = [
    pytest.param(cls, parameterisation, labels, metadd, id=f"{cls.__name__}-{parameterisation}-{labels}-{metadd}")
    for cls in METHODS
    for parameterisation, metadd in itertools.product(("pixels", "latents"), ("plain", "metadd"))
    for labels in (*cls.label_kinds, "soft")
]


@pytest.fixture(autouse=True)
def quick_stages(monkeypatch):
    """In place of training: networks as they are, said to be good."""

    def untrained(architecture, network, *args):
        return 1.0

    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", untrained)


def build(cls, parameterisation="pixels", labels="hard", **changes):
    network = NETWORK + (",norm=batch" if cls.__name__ == "SRe2L" else "")
    space = {"pixels": Pixels(), "latents": Latents(width=4, steps=2)}[parameterisation]
    labels = TeacherLabels(epochs=1) if labels == "soft" else labels
    settings = {"ipc": 2, "architecture": network, "labels": labels, "parameterisation": space}
    return cls(**(settings | tiny_settings(cls) | changes))


def callbacks(metadd):
    extra = [MetaDD(["convnet:width=4,depth=2", "conv:width=4,depth=2"], every=1)] if metadd == "metadd" else []
    return [PoolAlternation(), *extra]


@pytest.mark.parametrize(("cls", "parameterisation", "labels", "metadd"), PRODUCT)
def test_every_combination_runs_or_is_refused_in_one_line(cls, parameterisation, labels, metadd, tmp_path):
    assert issubclass(cls, Distiller)
    data = TinyData(val_fraction=0.25)
    trainer = tiny_trainer(tmp_path, 2, callbacks=callbacks(metadd))
    if not cls.learns and (parameterisation == "latents" or metadd == "metadd"):
        with pytest.raises(UserError, match="selects"):
            trainer.fit(build(cls, parameterisation, labels), data)
        return
    model = build(cls, parameterisation, labels)
    start = tiny_trainer(tmp_path, 0, callbacks=callbacks("plain"))
    first = build(cls, parameterisation, labels)
    start.fit(first, TinyData(val_fraction=0.25))
    trainer.fit(model, data)
    assert trainer.global_step == 2
    distilled = model.distilled_set()
    assert distilled.images.shape == (6, 1, 8, 8)
    assert torch.isfinite(distilled.images).all()
    assert torch.equal(distilled.images, first.distilled_set().images) != cls.learns
    loaded = DistilledSet.load(distilled.save(tmp_path / "set.safetensors"))
    assert loaded.label_kind == labels
    assert torch.equal(loaded.images, distilled.images)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_two_processes_hold_one_synthetic_set(cls, tmp_path):
    class KeepRank(Callback):
        def on_train_end(self, trainer, pl_module):
            state = {name: value.clone() for name, value in pl_module.synthetic.state_dict().items()}
            torch.save(state, tmp_path / f"rank{trainer.global_rank}.pt")

    trainer = tiny_trainer(tmp_path, 3, callbacks=[PoolAlternation(), KeepRank()], devices=2, strategy="ddp_fork")
    trainer.fit(build(cls, labels=cls.label_kinds[0]), TinyData(val_fraction=0.25))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_a_resumed_run_equals_the_run_never_interrupted(cls, tmp_path):
    def fit(folder, steps, model, **kwargs):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = tiny_trainer(folder, steps, callbacks=[PoolAlternation(), keep], enable_checkpointing=True)
        trainer.fit(model, TinyData(val_fraction=0.25), **kwargs)

    straight, resumed = build(cls, labels=cls.label_kinds[0]), build(cls, labels=cls.label_kinds[0])
    fit(tmp_path / "a", 5, straight)
    fit(tmp_path / "b", 5, resumed, ckpt_path=str(tmp_path / "a" / "step=2.ckpt"), weights_only=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
