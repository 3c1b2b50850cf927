"""Ctrl-C and SIGTERM: a checkpoint, one line with the command that continues, and an exit status that says so."""

import os
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import TinyData
from pytorch_lightning import Callback

from lightning_dd import distil
from lightning_dd.callbacks.interruption import Interruption
from lightning_dd.cli import main
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe

CONFIG = str(Path(__file__).parent.parent / "configs" / "mnist5k" / "frepo.yaml")
QUICK = [
    *("fit", "--config", CONFIG, "--trainer.accelerator=cpu", "--trainer.max_steps=6"),
    *("--trainer.val_check_interval=4", "--trainer.enable_progress_bar=false", "--model.init_args.probe.steps=1"),
    *("--model.init_args.architecture=conv:width=4", "--model.init_args.real_batch_size=8"),
]


class Send(Callback):
    """Send this process a signal in the middle of an outer step, or of a validation."""

    def __init__(self, number: int = int(signal.SIGTERM), step: int = 3, validating: bool = False, times: int = 1):
        self.number, self.step, self.validating, self.times = number, step, validating, times

    def send(self):
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.step and not self.validating:
            self.send()

    def on_validation_batch_start(self, trainer, *args):
        if trainer.global_step == self.step and self.validating:
            self.send()


def run(folder, *callbacks, steps=8, ckpt_path=None):
    model = FRePo(architecture="conv:width=4,depth=2", real_batch_size=8, pool_size=2, lifetime=4, probe=Probe(steps=1))
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 4}
    return distil(model, TinyData(), steps, folder, callbacks=callbacks, ckpt_path=ckpt_path, **settings)


def stopped(folder, *callbacks):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stop:
        run(folder, *callbacks)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (folder / "last.safetensors").exists()
    return stop.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("step", "validating"), [(3, False), (4, False), (4, True)])
def test_a_run_told_to_stop_continues_bit_for_bit(tmp_path, capsys, number, code, step, validating):
    straight = run(tmp_path / "straight")
    assert stopped(tmp_path / "told", Send(number, step, validating)) == code
    last = tmp_path / "told" / "checkpoints" / "last.ckpt"
    what = "stopped at once" if validating else f"stopped after step {step}"
    assert f"lightning-dd: {what}; continue with ckpt_path='{last}'\n" in capsys.readouterr().err
    assert torch.load(last, weights_only=True)["global_step"] == step
    resumed = run(tmp_path / "told", ckpt_path=str(last))
    assert torch.equal(straight.images, resumed.images)
    assert torch.equal(straight.labels, resumed.labels)
    assert straight.training == resumed.training


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_stopped_before_a_validation_has_the_best_set_of_the_run_never_stopped(tmp_path, step):
    class RightOnce(Callback):
        """All validation images are right at the step that the run is stopped at, and wrong at others."""

        def on_validation_batch_end(self, trainer, model, *args):
            classes = torch.arange(3)
            model.accuracy.reset()
            model.accuracy.update(classes.roll(int(trainer.global_step != step)), classes)

    straight, told = tmp_path / "straight", tmp_path / "told"
    run(straight, RightOnce())
    assert stopped(told, Send(step=step), RightOnce()) == 143
    assert not (told / "best.safetensors").exists() or step == 8
    run(told, RightOnce(), ckpt_path=str(told / "checkpoints" / "last.ckpt"))
    sets = [DistilledSet.load(folder / "best.safetensors") for folder in (straight, told)]
    assert torch.equal(sets[0].images, sets[1].images)
    assert [each.training["outer_step"] for each in sets] == [step] * 2
    assert {path.name for path in told.glob("*.png")} == {"initial.png", "final.png", "labels.png"}


def test_a_second_signal_ends_the_run_at_once(tmp_path, capsys):
    assert stopped(tmp_path / "first", Send(step=3, times=2)) == 143
    assert "lightning-dd: stopped at once; there is no checkpoint yet\n" in capsys.readouterr().err
    assert stopped(tmp_path / "later", Send(step=7, times=2)) == 143
    assert "stopped at once; continue with ckpt_path=" in capsys.readouterr().err


def test_who_ignores_ctrl_c_goes_on_ignoring_it(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        run(tmp_path, Send(signal.SIGINT), steps=4)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_left_alone_beside_the_main_thread(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path,), kwargs={"steps": 2})
    thread.start()
    thread.join()
    assert (tmp_path / "last.safetensors").is_file()


def test_the_command_that_a_stopped_fit_names_continues_it(capsys):
    straight = [*QUICK, "--trainer.logger.name=straight"]
    assert main(straight) == 0
    capsys.readouterr()
    told = [*QUICK, "--trainer.callbacks+=test_interruption.Send", "--trainer.callbacks.step=2"]
    with pytest.raises(SystemExit) as stop:
        main(told)
    assert stop.value.code == 143
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-dd:")]
    said, _, command = line.partition("; continue with: ")
    assert said == "lightning-dd: stopped after step 2"
    words = shlex.split(command)
    assert words[0] == "lightning-dd"
    assert [*words[1:-1]] == told
    assert words[-1].endswith("version_0/checkpoints/last.ckpt")
    assert main(words[1:]) == 0
    one, two = (
        DistilledSet.load(next(Path("runs", name).rglob("last.safetensors"))) for name in ("straight", "mnist5k-frepo")
    )
    assert one.images.equal(two.images)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_told_to_stop_elsewhere_is_one_line(number, code, capsys, monkeypatch):
    def work(arguments):
        try:
            signal.raise_signal(number)  # in this thread, and at once
        except KeyboardInterrupt:
            if arguments == ["fit"]:
                sys.exit(1)  # as Lightning's Trainer does
            raise

    monkeypatch.setattr("lightning_dd.cli._dispatch", work)
    before = signal.getsignal(signal.SIGTERM)
    for arguments in (["fit"], ["evaluate"]):
        assert main(arguments) == code
        assert capsys.readouterr().err == (
            "lightning-dd: stopped; run the same command again: what is finished is kept\n"
        )
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_without_checkpoints_leaves_signals_to_lightning(tmp_path):
    model = FRePo(architecture="conv:width=4,depth=2", real_batch_size=8, probe=Probe(steps=1))
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False}
    callbacks = [Send(step=1)]
    with pytest.raises(SystemExit):
        distil(model, TinyData(), 4, tmp_path, callbacks=callbacks, **settings)
    assert not any(isinstance(callback, Interruption) for callback in callbacks)
