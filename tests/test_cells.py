"""The published cells: each is a command that exists, what depends on ipc follows it, and a run says what it is."""

import re

import pytest
import yaml
from helpers import TinyData, accepted_settings, make_distilled

from lightning_dd import MetaDD, api, data, distil, distillers, published_cell
from lightning_dd import cells as room
from lightning_dd.api import nearest_cell
from lightning_dd.cells import cells, follow_ipc, nearest
from lightning_dd.cli import main
from lightning_dd.lightning_cli import Cli
from lightning_dd.parsing import FOLDER, configurations, with_paths
from lightning_dd.utils.arguments import plain_values, public_settings
from lightning_dd.utils.errors import UserError


def file_of(cell):
    return yaml.safe_load((FOLDER / f"{cell.config}.yaml").read_text())


def first_lines(arguments, monkeypatch, capsys):
    """What a run says before anything is built."""

    class Stopped(Cli):
        def instantiate_classes(self):
            raise SystemExit(0)

    with pytest.raises(SystemExit):
        Stopped(["fit", *arguments])
    return capsys.readouterr().out.splitlines()


def test_every_cell_names_a_configuration_a_figure_its_sources_and_settings_that_exist():
    assert len({cell.name for cell in cells()}) == len(cells()) > 100
    for cell in cells():
        assert cell.config in configurations()
        assert cell.source
        assert cell.settings
        assert re.fullmatch(r"[\d.]+( ± [\d.]+)?", cell.accuracy), cell
        assert "--protocol" in cell.evaluate
        method, source = room._classes(cell.config)
        accepted = {
            "model": accepted_settings(getattr(distillers, method)),
            "data": accepted_settings(getattr(data, source)),
            "trainer": {"max_steps"},
        }
        for name in (*cell.options, *cell.given):
            where, _, setting = name.partition(".")
            assert setting.partition(".")[0] in accepted[where], f"{cell.name}: {name}"


def test_a_file_says_its_own_cell_in_full():
    for cell in cells():
        if file_of(cell)["model"]["init_args"]["ipc"] == cell.ipc:
            assert not cell.options, cell.name


def test_what_depends_on_ipc_follows_it_and_options_and_layers_win(tmp_path):
    words = follow_ipc(with_paths(["fit", "--config", "cifar10/mtt", "--model.ipc", "50", "--model.syn_steps=7"]))
    assert words[2:-3] == [
        "--model.init_args.lr=1000.0",
        "--model.init_args.syn_steps=30",
        "--model.init_args.max_start_epoch=40",
        "--model.init_args.step_size=0.001",
        "--model.init_args.step_size_lr=1e-05",
        "--data.init_args.preprocessing=standardise",
        "--data.init_args.std=[0.2023, 0.1994, 0.201]",
    ]
    layer = tmp_path / "ten.yaml"
    layer.write_text("model: {init_args: {ipc: 10}}")
    words = with_paths(["fit", "--config=cifar100/frepo", f"--config={layer}"])
    assert follow_ipc(words) == [*words[:2], "--model.init_args.flip=false", words[2]]
    for unchanged in (["fit", "--config", "cifar10/mtt"], ["fit", "--config", "mnist5k/mtt", "--model.ipc", "10"]):
        assert follow_ipc(with_paths(unchanged)) == with_paths(unchanged)
    own = tmp_path / "mine.yaml"  # of a user: nothing is changed in it
    own.write_text((FOLDER / "cifar10" / "mtt.yaml").read_text())
    assert follow_ipc(["fit", f"--config={own}", "--model.ipc", "50"])[2:] == ["--model.ipc", "50"]


def test_an_ipc_that_is_not_published_takes_the_next_larger_one():
    found = [cell for cell in cells() if cell.config == "cifar10/mtt"]
    assert [nearest(found, ipc)[0].ipc for ipc in (1, 2, 10, 30, 200)] == [1, 10, 10, 50, 50]


def test_a_run_says_which_cell_it_is(monkeypatch, capsys):
    whole = ["--config", "cifar10/mtt", "--model.ipc", "50", "--data.val_fraction", "0", "--seed_everything", "3"]
    lines = first_lines(whole, monkeypatch, capsys)
    assert "published cell cifar10/mtt ipc 50: 71.6 ± 0.2 % in arXiv 2203.11932" in lines[0]
    assert lines[0].endswith("ours: not run")
    assert "for this ipc model.lr 1000, model.syn_steps 30" in lines[1]
    assert lines[2] == "  differs: nothing"


def test_a_run_says_what_differs(tmp_path, monkeypatch, capsys):
    own = tmp_path / "mine.yaml"
    own.write_text((FOLDER / "cifar10" / "mtt.yaml").read_text())
    lines = first_lines(["--config", str(own), "--model.ipc=50"], monkeypatch, capsys)
    assert "model.syn_steps 50 (published 30)" in lines[2]
    assert "data.val_fraction 0.1 (published 0)" in lines[2]
    changed = ["--model.architecture=conv:width=32", "--trainer.max_steps=9", "--trainer.precision=bf16-mixed"]
    layers = ["--config", "metadd", "--config", "latents"]
    lines = first_lines(["--config", "cifar10/frepo", *changed, *layers], monkeypatch, capsys)
    assert set(lines[2].removeprefix("  differs: ").removesuffix(")").split("), ")) == {
        "trainer.max_steps 9 (published 500000",
        "trainer.precision bf16-mixed (published default",
        "model.architecture conv:width=32 (published conv:width=128",
        "data.val_fraction 0.1 (published 0",
        "model.parameterisation Latents (published default",
        "trainer.callbacks MetaDD added (published default",
    }
    seeds = ["--model.teacher.seed=2", "--seed_everything=2", "--data.val_fraction=0"]
    assert first_lines(["--config", "cifar10/rded", *seeds], monkeypatch, capsys)[2] == "  differs: nothing"
    lines = first_lines(["--config", "cifar10/dc", "--model.ipc=3"], monkeypatch, capsys)
    assert lines[0] == "no published cell has ipc 3: nearest is cifar10/dc ipc 10"
    lines = first_lines(["--config", "imagenet10/glad_mtt", "--data.classes=woof"], monkeypatch, capsys)
    assert "imagenet10/glad_mtt ipc 1 woof: 16.0" in lines[0]  # and not MTT's own cell of these classes
    assert first_lines(["--config", "mnist5k/frepo"], monkeypatch, capsys) == []


def test_cells_are_listed_with_their_commands(capsys):
    assert main(["list", "cells", "cifar10/mtt ipc 5"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("cifar10/mtt ipc 50 ")
    assert "lightning-dd fit --config cifar10/mtt --model.ipc 50 --data.val_fraction 0  # 71.6 ± 0.2 % in arXiv" in line
    assert line.endswith("ours: not run")


def test_every_cell_is_built_in_python_with_the_settings_of_the_command():
    for cell in cells():
        given = {name.rpartition(".")[2]: value for name, value in cell.given.items()}
        model, real, steps = published_cell(cell.config, cell.ipc, **given)
        assert (model.ipc, real.val_fraction) == (cell.ipc, 0.0), cell.name
        for name, value in cell.options.items():
            room, _, setting = name.partition(".")
            owner = {"model": model.hparams, "data": real.init_args, "trainer": {"max_steps": steps}}[room]
            assert owner[setting] == value, cell.name
    with pytest.raises(UserError, match="no published cell cifar10/mtt ipc 5: cifar10/mtt ipc 1, cifar10/mtt ipc 10"):
        published_cell("cifar10/mtt", 5)


def test_info_says_which_cell_a_set_is_nearest_to_and_what_differs(capsys, tmp_path):
    model, real, _ = published_cell("cifar10/dm", 10)
    trainer = {"max_steps": 60, "precision": "32-true", "num_nodes": 1, "accumulate_grad_batches": 1, "devices": 1}
    trainer["callbacks+"] = [{"class_path": "lightning_dd.callbacks.metadd.MetaDD", "init_args": {}}]
    method = {"class_path": "lightning_dd.distillers.dm.DM", "init_args": plain_values(public_settings(model.hparams))}
    run = {"seed_everything": 3, "trainer": trainer, "model": method, "data": plain_values(real)}
    file = make_distilled(ipc=10, run=run).save(tmp_path / "set.safetensors")
    assert main(["info", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("published cell cifar10/dm ipc 10: 48.9")
    assert lines[2] == (
        "  differs: trainer.max_steps 60 (published 20000), trainer.callbacks MetaDD added (published default)"
    )
    run["model"]["init_args"]["augment"] = "a\nb\x1b"  # from somebody else
    file = make_distilled(ipc=10, run=run).save(tmp_path / "set.safetensors")
    assert main(["info", str(file)]) == 0
    assert "a\\nb\\x1b (published" in capsys.readouterr().out.splitlines()[-1]
    for unusable in ({}, {**run, "data": None}, {**run, "model": {"class_path": "antigravity.Boom"}}):
        assert nearest_cell(make_distilled(run=unusable)) == ""


class Begun(Exception):
    """Raised in place of a fit."""


def said_by_distil(monkeypatch, capsys, model, real, steps, **more):
    def stop(*_, **__):
        raise Begun

    monkeypatch.setattr(api, "make_trainer", stop)
    with pytest.raises(Begun):
        distil(model, real, steps, **more)
    return capsys.readouterr().out.splitlines()


def test_a_run_in_python_says_which_cell_it_is_and_what_its_defaults_change(monkeypatch, capsys, tmp_path):
    place = {"output": tmp_path, "accelerator": "cpu"}
    lines = said_by_distil(monkeypatch, capsys, *published_cell("cifar10/mtt", 50), **place)
    assert lines[0].startswith("published cell cifar10/mtt ipc 50: 71.6")
    assert lines[2] == "  differs: nothing"
    plain = distillers.MTT(ipc=50), data.CIFAR10(val_fraction=0.0), 5000
    lines = said_by_distil(
        monkeypatch, capsys, *plain, callbacks=[MetaDD(["resnet18", "vgg11"])], precision="bf16-mixed", **place
    )
    for part in ("max_start_epoch ", "trainer.precision bf16-mixed (pub", "trainer.callbacks MetaDD added (published"):
        assert part in lines[2]
    assert said_by_distil(monkeypatch, capsys, distillers.MTT(), TinyData(), 4, **place) == []
