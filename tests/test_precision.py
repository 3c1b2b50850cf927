"""``precision: auto``: who decides, that the run is otherwise the same, and that a continued run keeps it."""

from typing import ClassVar

import pytest
import torch
import yaml
from helpers import TinyData, tiny_settings

from lightning_dd import distil
from lightning_dd.callbacks import OuterTerm
from lightning_dd.distillers import FRePo, Random
from lightning_dd.lightning_cli import run_lightning
from lightning_dd.utils import precision
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.precision import chosen_precision

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "val_check_interval": 2}


def tiny(cls=FRePo):
    return cls(ipc=1, architecture="conv:width=4,depth=2", **tiny_settings(cls))


def measured(monkeypatch, full, half):
    """Let steps take so long; return the precisions that are measured."""
    asked = []
    times = {"32-true": full, "bf16-mixed": half}
    monkeypatch.setattr(precision, "_step_time", lambda name, *args: asked.append(name) or times[name])
    return asked


@pytest.mark.parametrize(("half", "expected"), [(0.89, "bf16-mixed"), (0.91, "32-true"), (2.0, "32-true")])
def test_half_precision_is_taken_where_it_is_faster_by_a_margin(half, expected, monkeypatch):
    asked = measured(monkeypatch, 1.0, half)
    assert chosen_precision({"precision": "auto"}, tiny(), TinyData()) == expected
    assert asked == ["32-true", "bf16-mixed"]
    assert chosen_precision({"precision": "16-mixed"}, tiny(), TinyData()) == "16-mixed"
    assert chosen_precision({"precision": "auto"}, tiny(Random), TinyData()) == "32-true"  # it takes no steps
    assert len(asked) == 2


class Pull(OuterTerm):
    """Pulls images to 0, and notes which of its objects did so in which precision."""

    seen: ClassVar[set] = set()

    def add(self, trainer, distiller, images, labels, loss):
        self.seen.add((trainer.precision, id(self)))
        return loss, {"pull": images.square().mean()}


def test_steps_are_measured_with_what_acts_on_them_and_the_run_begins_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "MARGIN", 0.0)  # whatever the clock says
    made, callbacks = {}, {name: Pull() for name in ("auto", "32-true")}
    for name, callback in callbacks.items():
        data = TinyData(val_fraction=0.25)
        made[name] = distil(tiny(), data, 2, tmp_path / name, callbacks=[callback], precision=name, **QUIET)
    others = [name for name, own in Pull.seen if own not in map(id, callbacks.values())]
    assert sorted(others) == ["32-true", "bf16-mixed"]
    assert torch.equal(made["auto"].images, made["32-true"].images)
    assert made["auto"].run["trainer"]["precision"] == "32-true"


def test_a_continued_run_keeps_what_was_chosen_and_the_saved_configuration_names_it(tmp_path, monkeypatch):
    measured(monkeypatch, 1.0, 0.5)
    distil(tiny(), TinyData(val_fraction=0.25), 2, tmp_path, precision="auto", **QUIET)
    asked = measured(monkeypatch, 1.0, 2.0)
    logger = {"class_path": "Board", "init_args": {"save_dir": str(tmp_path), "name": "cli", "version": ""}}
    words = [
        "fit",
        "--model=FRePo",
        *(f"--model.{name}={value}" for name, value in tiny_settings(FRePo).items() if name != "probe"),
        "--model.architecture=conv:width=4,depth=2",
        '--model.probe={"steps": 1}',
        "--data=helpers.TinyData",
        "--data.val_fraction=0.25",
        *(f"--trainer.{name}={value}" for name, value in QUIET.items()),
        f"--trainer.logger={yaml.safe_dump(logger, default_flow_style=True)}",
        "--trainer.max_steps=4",
        "--trainer.precision=auto",
    ]
    run_lightning([*words, f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"])
    assert not asked
    assert yaml.safe_load((tmp_path / "cli" / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"


def test_what_several_processes_or_an_unknown_run_would_choose_is_asked_for():
    with pytest.raises(UserError, match="auto is for one process: with several, name 32-true or bf16-mixed"):
        chosen_precision({"precision": "auto", "devices": 2}, tiny(), TinyData())
    with pytest.raises(UserError, match="'last' does not say which was chosen; name 32-true or bf16-mixed"):
        chosen_precision({"precision": "auto"}, tiny(), TinyData(), checkpoint="last")
