"""The public shelf: imported when asked for, and the two functions that do what the command line does."""

import subprocess
import sys

import pytest
import torch
from helpers import TinyData, tiny_settings

import lightning_dd
from lightning_dd import DistilledSet, distil, evaluate
from lightning_dd.distillers import DM, Random
from lightning_dd.utils.errors import UserError

NETWORK = "convnet:width=4,depth=2"
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def tiny(cls=DM, **changes):
    return cls(**({"ipc": 1, "architecture": NETWORK} | tiny_settings(cls) | changes))


def test_the_package_is_imported_without_anything_heavy_and_gives_all_it_lists():
    script = (
        "import sys, lightning_dd\n"
        "heavy = {'torch', 'numpy', 'pytorch_lightning', 'jsonargparse', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from lightning_dd import *\n"
        "from lightning_dd.distillers import FRePo\n"
        "assert issubclass(FRePo, PoolDistiller) and issubclass(PoolDistiller, Distiller)\n"
        "assert set(lightning_dd.__all__) < set(dir(lightning_dd))"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_dd.nothing


def test_distil_writes_what_the_command_line_does_and_evaluate_takes_sets_and_files(tmp_path):
    data = {"data": "helpers.TinyData", "accelerator": "cpu"}
    made = distil(tiny(), TinyData(val_fraction=0.25), 4, tmp_path / "run", **QUIET)
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"last.safetensors", "best.safetensors", "checkpoints", "final.png"} <= written
    assert made.images.equal(DistilledSet.load(tmp_path / "run" / "last.safetensors").images)
    assert made.training["outer_step"] == 4
    rows = evaluate(made, [NETWORK], tmp_path / "report", seeds=1, steps=1, **data)
    again = evaluate([tmp_path / "run" / "last.safetensors"], [NETWORK], "again", seeds=1, steps=1, **data)
    assert [row.source for row in rows] == [row.source for row in again]
    assert [row.accuracy for row in rows] == [row.accuracy for row in again]
    assert {row.set for row in rows} == {"dm-0"}
    assert (tmp_path / "report" / "results.md").is_file()


def test_an_interrupted_distillation_continues_exactly(tmp_path):
    straight = distil(tiny(), TinyData(val_fraction=0.25), 4, tmp_path / "straight", val_check_interval=2, **QUIET)
    distil(tiny(), TinyData(val_fraction=0.25), 2, tmp_path / "part", val_check_interval=2, **QUIET)
    checkpoint = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    resumed = distil(
        tiny(), TinyData(val_fraction=0.25), 4, tmp_path / "part", val_check_interval=2, ckpt_path=checkpoint, **QUIET
    )
    assert torch.equal(resumed.images, straight.images)


def test_a_selection_needs_no_number_of_steps_and_a_mistake_is_a_user_error(tmp_path):
    assert len(distil(tiny(Random), TinyData(val_fraction=0.25), output=tmp_path, **QUIET)) == 3
    with pytest.raises(UserError, match="largest possible ipc"):
        distil(tiny(ipc=100), TinyData(), 1, tmp_path, **QUIET)
