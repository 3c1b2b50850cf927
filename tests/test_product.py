"""Every distiller x parameterisation x labels x networks x MetaDD, on tiny data: an exported distiller is tested."""

import pytest
import torch
from helpers import TinyData, tiny_settings, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

import lightning_dd.distillers
from lightning_dd.callbacks import MetaDD
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import Distiller
from lightning_dd.pretrained import Teacher
from lightning_dd.synthetic import Latents, MultiFormation, Pixels, Pyramid, TeacherLabels
from lightning_dd.utils.errors import UserError

NETWORKS = ("convnet:width=4,depth=2,norm=batch", "conv:width=4,depth=2,norm=batch")
EXPORTED = [getattr(lightning_dd.distillers, name) for name in lightning_dd.distillers.__all__]
METHODS = [cls for cls in EXPORTED if issubclass(cls, Distiller) and not cls.__abstractmethods__]
AXES = {
    "parameterisation": ("pixels", "latents", "multiformation", "pyramid"),
    "labels": ("learned", "centred", "hard", "logits", "soft", "committee"),
    "networks": ("one", "several"),
    "invariance": ("plain", "metadd"),
}


@pytest.fixture(autouse=True)
def quick_stages(monkeypatch):
    """In place of training: networks as they are, said to be good."""

    def untrained(architecture, network, *args):
        return 1.0

    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", untrained)
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)


def build(cls, parameterisation="pixels", labels="hard", networks="one", **changes):
    names = [name.replace(",norm=batch", ",norm=none") if cls.__name__ == "MTT" else name for name in NETWORKS]
    spaces = {"pixels": Pixels(), "latents": Latents(width=4, steps=2), "multiformation": MultiFormation()}
    spaces["pyramid"] = Pyramid()
    of_teachers = {"soft": TeacherLabels(epochs=1), "committee": TeacherLabels(Teacher(list(NETWORKS)), epochs=0)}
    settings = tiny_settings(cls) | {
        "ipc": 2,
        "parameterisation": spaces[parameterisation],
        "labels": of_teachers.get(labels, labels),
    }
    if "teacher" in settings:
        settings["teacher"] = Teacher(steps=2)  # of the distiller's own architectures
    settings["architecture"] = names[0] if networks == "one" else {names[0]: 3, names[1]: 1}
    return cls(**(settings | changes))


class KeepStart(Callback):
    def on_train_start(self, trainer, pl_module):
        self.images = pl_module.distilled_set(views=False).images


@pytest.mark.parametrize("invariance", AXES["invariance"])
@pytest.mark.parametrize("networks", AXES["networks"])
@pytest.mark.parametrize("labels", AXES["labels"])
@pytest.mark.parametrize("parameterisation", AXES["parameterisation"])
@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_every_combination_runs_or_is_refused_in_one_line(
    cls, parameterisation, labels, networks, invariance, tmp_path
):
    start = KeepStart()
    metadd = [MetaDD(["convnet:width=4,depth=2", "conv:width=4,depth=2"], every=1)] if invariance == "metadd" else []
    trainer = tiny_trainer(tmp_path, 2, callbacks=[start, *metadd])
    of_a_teacher = labels in ("soft", "committee")
    refused = None
    if labels not in cls.label_kinds and not of_a_teacher:
        refused = f"^labels of {cls.__name__} must be one of .*, got '{labels}'$"
    elif not cls.learns and (parameterisation == "latents" or invariance == "metadd"):
        refused = f"{cls.__name__} selects real images"
    if refused:
        with pytest.raises(UserError, match=refused):
            trainer.fit(build(cls, parameterisation, labels, networks), TinyData(val_fraction=0.25))
        return
    model = build(cls, parameterisation, labels, networks)
    trainer.fit(model, TinyData(val_fraction=0.25))
    assert trainer.global_step == 2
    distilled = model.distilled_set()
    assert distilled.images.shape == (24 if parameterisation == "multiformation" else 6, 1, 8, 8)
    assert distilled.ipc == 2
    assert torch.isfinite(distilled.images).all()
    assert torch.equal(distilled.images, start.images) != cls.learns
    assert (distilled.views is not None) == (labels == "soft")
    loaded = DistilledSet.load(distilled.save(tmp_path / "set.safetensors"))
    assert loaded.label_kind == ("soft" if of_a_teacher or labels == "logits" else labels)
    assert torch.equal(loaded.images, distilled.images)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_two_processes_hold_one_synthetic_set(cls, tmp_path):
    class KeepRank(Callback):
        def on_train_end(self, trainer, pl_module):
            state = {name: value.clone() for name, value in pl_module.synthetic.state_dict().items()}
            torch.save(state, tmp_path / f"rank{trainer.global_rank}.pt")

    trainer = tiny_trainer(tmp_path, 3, callbacks=[KeepRank()], devices=2, strategy="ddp_fork")
    trainer.fit(build(cls, labels=cls.label_kinds[0]), TinyData(val_fraction=0.25))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("parameterisation", ["pixels", "multiformation", "pyramid"])
def test_a_resumed_run_equals_the_run_never_interrupted(cls, parameterisation, tmp_path):
    def fit(folder, steps, model, **kwargs):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = tiny_trainer(folder, steps, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(model, TinyData(val_fraction=0.25), **kwargs)

    straight, resumed = (build(cls, parameterisation, cls.label_kinds[0]) for _ in range(2))
    fit(tmp_path / "a", 5, straight)
    fit(tmp_path / "b", 5, resumed, ckpt_path=str(tmp_path / "a" / "step=2.ckpt"), weights_only=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
