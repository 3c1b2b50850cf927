"""Checkpoints and sets on a full disk, in a folder that is gone or another run's: what was there stays whole."""

import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from helpers import TinyData
from pytorch_lightning import Callback

from lightning_dd import distil
from lightning_dd.cli import main
from lightning_dd.data.cache import cached_tensors
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe
from lightning_dd.jobs import Job, Ledger, run_jobs
from lightning_dd.parsing import user_error_in
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import load_torch
from lightning_dd.utils.trainer import WholeCheckpoints, check_checkpoint, make_trainer, whole_checkpoints


@contextmanager
def full_disk(free=6000):
    """Let no file grow beyond so many bytes: the system's answer differs from a full disk's in its words alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class At(Callback):
    """Do something before one outer step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            self.act()


def run(folder, *callbacks, steps=4, **settings):
    model = FRePo(architecture="conv:width=4,depth=2", real_batch_size=8, pool_size=2, lifetime=4, probe=Probe(steps=1))
    quick = {"accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 2}
    return distil(model, TinyData(), steps, folder, callbacks=callbacks, **quick | settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".ckpt", ".safetensors")}


def test_a_full_disk_ends_a_fit_in_one_line_and_leaves_the_files_of_before(tmp_path):
    run(tmp_path, logger=False)
    before = contents(tmp_path)
    assert {"last.ckpt", "last.safetensors"} <= before.keys()
    checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
    with full_disk(), pytest.raises(UserError, match=r"^cannot write '.*\.(ckpt|safetensors)': File too large"):
        run(tmp_path, steps=6, ckpt_path=checkpoint, logger=False)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_a_full_disk_costs_a_cache_a_warning_and_a_set_or_a_ledger_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path))
    made = {"a": torch.ones(10000)}
    distilled = run(tmp_path / "run")
    with full_disk(200):
        with pytest.warns(UserWarning, match=r"is not cached .cannot write .*File too large"):
            assert cached_tensors("kind", "key", lambda: made, {"a": (10000,)})["a"].equal(made["a"])
        with pytest.raises(UserError, match=r"^cannot write .*File too large"):
            distilled.save(tmp_path / "set.safetensors")
        with pytest.raises(UserError, match=r"^cannot write .*File too large"):
            run_jobs([Job("a", {}, 1)], lambda task, tick: {"row": "x" * 1000}, Ledger(tmp_path / "ledger"))
    assert not list((tmp_path / "ledger").iterdir())
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_removed_while_a_fit_runs_is_made_again(tmp_path):
    folder = tmp_path / "run"
    run(folder, At(3, lambda: shutil.rmtree(folder)), logger=False)
    assert {"last.ckpt", "last.safetensors"} <= contents(folder).keys()
    DistilledSet.load(folder / "last.safetensors")
    check_checkpoint(folder / "checkpoints" / "last.ckpt")


def test_a_full_disk_is_one_line_whatever_meets_it_first(tmp_path, capsys):
    options = [
        *("fit", "--config=mnist5k/frepo", "--trainer.accelerator=cpu", "--trainer.max_steps=2"),
        *("--trainer.enable_progress_bar=false", "--model.real_batch_size=8", "--model.architecture=conv:width=4"),
    ]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for free in (100, 2000, 20_000):  # the configuration, the settings, TensorBoard's curves
        with full_disk(free):
            assert main(options) == 2
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        said = capsys.readouterr().err
        assert said.endswith("lightning-dd: error: File too large\n")
        assert "Traceback" not in said  # of TensorBoard's thread
    wrapped = ValueError("you tried to log 0.01")  # as TensorBoard's logger says it
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert str(user_error_in(wrapped)) == "No space left on device"
    assert user_error_in(ValueError("other")) is None
    assert not contents(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("there", [False, True])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before_or_none(tmp_path, monkeypatch, there):
    path, writer = tmp_path / "last.ckpt", WholeCheckpoints()
    if there:
        writer.save_checkpoint({"global_step": 1}, path)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "fsync", lambda file: os.kill(os.getpid(), signal.SIGKILL))
        writer.save_checkpoint({"global_step": 2}, path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.exists() == there
    if there:
        assert torch.load(path, weights_only=True) == {"global_step": 1}


def test_checkpoints_are_written_whole_unless_a_plugin_says_how(tmp_path):
    class Own(WholeCheckpoints):
        pass

    own = Own()
    assert [type(plugin) for plugin in whole_checkpoints(None)] == [WholeCheckpoints]
    assert whole_checkpoints(own) == whole_checkpoints([own]) == [own]
    trainer = make_trainer(accelerator="cpu", logger=False, plugins=whole_checkpoints(None))
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpoints)


def test_a_broken_checkpoint_is_named_and_the_newest_whole_one_offered(tmp_path):
    good, newest, broken = (tmp_path / f"{name}.ckpt" for name in ("good", "newest", "last"))
    torch.save({"global_step": 1}, good)
    newest.write_bytes(good.read_bytes()[:50])
    broken.touch()
    with pytest.raises(UserError, match=r"last\.ckpt': not a file of .*; the newest whole one .* '.*good\.ckpt'"):
        check_checkpoint(broken)
    good.unlink()
    with pytest.raises(UserError, match=r"truncated \([^;]*$"):
        check_checkpoint(broken)


def test_a_second_fit_in_one_folder_is_refused_until_the_first_has_ended(tmp_path):
    refused = []

    def second():
        with pytest.raises(UserError, match=r"another run is writing to '.*run': wait for it, or name") as error:
            run(tmp_path / "run", logger=False)
        refused.append(error.value)
        run(tmp_path / "other", steps=2)

    first = run(tmp_path / "run", At(3, second))
    assert len(refused) == 1
    assert DistilledSet.load(tmp_path / "run" / "last.safetensors").images.equal(first.images)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", At(2, lambda: 1 / 0))
    run(tmp_path / "run", steps=2)  # a run that failed holds nothing


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_fit_holds_nothing(tmp_path):
    child = os.fork()
    if child == 0:
        run(tmp_path, At(2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    run(tmp_path, steps=2)


@pytest.mark.parametrize("text", [b"written", bytes.fromhex("0000803f")])  # of its pickle, and of its tensor
def test_a_flipped_bit_in_a_checkpoint_is_no_other_number(tmp_path, text):
    torch.save({"note": "written", "tensor": torch.ones(100)}, tmp_path / "last.ckpt")
    whole = (tmp_path / "last.ckpt").read_bytes()
    place = whole.index(text)
    (tmp_path / "last.ckpt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"the checksum of 'last/data.*' differs"):
        load_torch(tmp_path / "last.ckpt", "checkpoint")
