"""Students, the evaluation DataModule, the matrix and its report."""

import csv
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import TinyData, make_distilled, tiny_trainer
from pytorch_lightning.utilities import rank_zero_only
from toy_jobs import Launched

import lightning_dd
from lightning_dd import jobs
from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS, MNIST5k
from lightning_dd.data.parts import DataChoice
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.distilled import DistilledData
from lightning_dd.distilled.datamodule import real_data_of
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.views import SyntheticBatches
from lightning_dd.evaluators import evaluate
from lightning_dd.evaluators.evaluate import evaluate_files
from lightning_dd.evaluators.matrix import DISTILLED, RANDOM_REAL, SOURCES, Cell, Hardware, Row, random_real
from lightning_dd.evaluators.report import markdown, summarise
from lightning_dd.students import Student
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.board import Board
from lightning_dd.utils.errors import UserError

SMALL = "conv:width=4,depth=2,norm=none"


@pytest.fixture(autouse=True)
def _register_tiny_data(monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)


def row(architecture="conv", source=DISTILLED, seed=0, accuracy=0.5, seen=False, best=None):
    return Row("set", architecture, seen, source, seed, accuracy, best, None, 10, 1, "FRePo")


class Darker(TinyData):
    """The same classes and shapes, other pixels."""

    def read(self, *, train):
        raw = super().read(train=train)
        return raw._replace(images=raw.images // 2)


# ---- students ----------------------------------------------------------------------------------------------------


def train_mnist(distilled, steps=60):
    student = Student("conv:width=8,norm=none", lr=3e-3, warmup=5)
    data = DistilledData.from_set(distilled, MNIST5k())
    trainer = tiny_trainer(".", steps, callbacks=[])
    trainer.fit(student, data)
    return trainer.test(student, data, verbose=False)[0]["test/accuracy"]


def test_a_student_learns_and_one_on_shuffled_labels_scores_chance():
    distilled = make_distilled(ipc=10, data=MNIST5k)
    order = torch.randperm(len(distilled), generator=torch.Generator().manual_seed(0))
    shuffled = make_distilled(ipc=10, data=MNIST5k, labels=distilled.labels[order])
    assert train_mnist(distilled) > 0.5
    assert train_mnist(shuffled) < 0.2


@pytest.mark.parametrize("kind", ["learned", "centred", "hard"])
def test_every_label_kind_trains(kind, tmp_path):
    data = DistilledData.from_set(make_distilled(label_kind=kind), TinyData())
    student = Student(SMALL, lr=1e-2, warmup=0, augment="none")
    trainer = tiny_trainer(tmp_path, 40, callbacks=[])
    trainer.fit(student, data)
    assert trainer.test(student, data, verbose=False)[0]["test/accuracy"] > 0.6
    probabilities = torch.cat(trainer.predict(student, data))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(probabilities)))


def test_one_seed_gives_one_student(tmp_path):
    weights = []
    for seed in (0, 0, 1):
        student = Student("alexnet:width=8", seed=seed)
        data = DistilledData.from_set(make_distilled(data=MNIST5k), MNIST5k(), seed=seed)
        tiny_trainer(tmp_path, 3, callbacks=[]).fit(student, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_resumed_student_equals_the_one_never_interrupted(ema, tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    def run(folder, ckpt_path=None):
        student = Student(SMALL, ema=ema, seed=1)
        data = DistilledData.from_set(make_distilled(ipc=4), TinyData(), batch_size=5)
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = tiny_trainer(folder, 9, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(student, data, ckpt_path=ckpt_path)
        return student

    straight = run(tmp_path / "a")
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "step=4.ckpt"))
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    loaded = Student.load_from_checkpoint(tmp_path / "a" / "step=8.ckpt", weights_only=True)
    assert loaded.network.num_classes == 3
    other, data = Student("convnet:width=4,depth=2", ema=ema), DistilledData.from_set(make_distilled(), TinyData())
    with pytest.raises(UserError, match="architecture is"):
        tiny_trainer(tmp_path, 9, callbacks=[]).fit(other, data, ckpt_path=str(tmp_path / "a" / "step=4.ckpt"))


def test_batches_shuffle_cover_and_continue():
    images, labels = torch.arange(7.0).view(7, 1, 1, 1), torch.eye(7)
    whole = [rows.flatten().tolist() for rows, _ in SyntheticBatches(images, labels, 3, 6, seed=0)]
    later = [rows.flatten().tolist() for rows, _ in SyntheticBatches(images, labels, 3, 2, seed=0, start=4)]
    assert later == whole[4:]
    assert len({*whole[0], *whole[1]}) == 6
    shares = [next(iter(SyntheticBatches(images, labels, 3, 1, 0, rank=rank, world_size=2)))[0] for rank in (0, 1)]
    assert len(torch.cat(shares).unique()) == 6


def test_steps_follow_the_papers_table_and_numbers_are_checked():
    assert [Recipe().steps_for(n, 10) for n in (10, 100, 150, 500, 1000, 9999)] == [
        1000,
        2000,
        20000,
        5000,
        10000,
        40000,
    ]
    for bad in ({"steps": 0}, {"lr": 0}, {"warmup": -1}, {"final_lr": 2}, {"batch_size": 0}, {"ema": 1.0}):
        with pytest.raises(UserError, match=f"recipe.{next(iter(bad))}"):
            Recipe(**bad)


# ---- data --------------------------------------------------------------------------------------------------------


def test_real_images_go_through_the_files_own_preprocessing():
    distilled = make_distilled(preprocessing=Preprocessing([0.25], [2.0]))
    data = DistilledData.from_set(distilled)
    data.setup("test")
    raw = TinyData().read(train=False).images.float() / 255
    torch.testing.assert_close(data.real.test.everything().images, (raw - 0.25) / 2)


def test_a_file_that_disagrees_with_its_data_is_refused():
    with pytest.raises(UserError, match="num_classes disagree: the distilled set has 3, MNIST5k has 10"):
        DistilledData.from_set(make_distilled(), MNIST5k()).setup("fit")
    with pytest.raises(UserError, match="image shapes disagree"):
        DistilledData.from_set(make_distilled(images=torch.zeros(3, 1, 4, 4)), TinyData()).setup("fit")
    with pytest.raises(UserError, match="class names or their order disagree"):
        DistilledData.from_set(make_distilled(class_names=("x", "y", "z")), TinyData()).setup("fit")
    with pytest.raises(UserError, match=r"made from 'os\.system', which is none of"):
        real_data_of(replace(make_distilled(), data={"name": "os.system", "spec": {}, "fingerprint": "unseen"}))


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("MNIST", {"root": "somewhere"}, r"names root='somewhere', which is not opened for a file: say which"),
        ("MNIST", {"part": "ClassSubset", "source": "MNIST", "classes": [0], "preprocessing_file": "a"}, "names prepr"),
        ("MNIST", {"part": "ClassSubset", "source": "MNIST", "classes": [0], "source_args": {"root": "a"}}, "root='a'"),
        ("HuggingFace", {"path": "someone/anything"}, "names path='someone/anything'"),
        ("ParquetImages", {"train_files": ["../secret"], "test_files": []}, r"names train_files='\.\./secret'"),
        (
            "MNIST",
            {"part": "ClassSubset", "source": "antigravity.Boom", "classes": [0]},
            "nothing is imported for a file",
        ),
        ("MNIST", {"val_fraction": [0.1]}, "cannot be rebuilt"),
    ],
)
def test_a_file_opens_no_path_imports_nothing_and_asks_no_hub(name, spec, message, tmp_path):
    stranger = replace(make_distilled(), data={"name": name, "spec": spec, "fingerprint": "a stranger's"})
    with pytest.raises(UserError, match=message):
        real_data_of(stranger)
    assert "antigravity" not in sys.modules
    assert not list(tmp_path.iterdir())


def test_the_machine_remembers_how_data_was_found_and_a_file_does_not_say():
    distilled = make_distilled()
    assert type(real_data_of(distilled)) is TinyData  # a class of nobody's list, named by the note alone
    assert "helpers" not in json.dumps(distilled.data)
    given = real_data_of(distilled, DataChoice("helpers.TinyData", {"val_fraction": 0.25}))
    assert given.val_fraction == 0.25
    with pytest.raises(UserError, match="unknown data set 'NoData'"):
        real_data_of(distilled, DataChoice("NoData"))


@pytest.mark.parametrize(("of_the_set", "of_the_data"), [(True, True), (True, False), (False, True)])
def test_neither_the_set_nor_its_data_is_mirrored_against_its_word(of_the_set, of_the_data, tmp_path):
    distilled = make_distilled(ipc=2)
    distilled.data["mirror"] = of_the_set
    choice = DataChoice("helpers.TinyData", {"mirror": of_the_data})
    allowed = of_the_set and of_the_data
    assert real_data_of(distilled, choice).mirror is allowed
    data, student = DistilledData.from_set(distilled, TinyData(mirror=of_the_data)), Student(SMALL)
    tiny_trainer(tmp_path, 1, callbacks=[]).fit(student, data)
    names = {operation.__name__ for operation in student.one_step.augmentation.operations}
    assert ("flip" in names) is allowed
    file = str(distilled.save(tmp_path / "set.safetensors"))
    here = evaluate.Bench({"set": file}, {"": Recipe(steps=2)}, tmp_path, choice, Hardware())
    for name in (DISTILLED, RANDOM_REAL):
        student_set = DistilledData.from_set(SOURCES[name](here.sets["set"], here.reals["set"], 0), here.reals["set"])
        assert student_set.real.mirror is allowed


def test_random_real_draws_anew_for_each_seed_in_the_same_form():
    distilled = make_distilled(ipc=2)
    real = TinyData()
    real.setup("fit")
    first, second = random_real(distilled, real, 0), random_real(distilled, real, 1)
    assert not torch.equal(first.images, second.images)
    assert torch.equal(first.images, random_real(distilled, real, 0).images)
    assert first.images.shape == distilled.images.shape
    assert first.label_kind == distilled.label_kind
    torch.testing.assert_close(first.labels, distilled.labels)
    for image, label in zip(first.images, first.classes, strict=True):
        match = (real.train.everything().images == image).flatten(1).all(1).nonzero().flatten()
        assert real.train.labels[match[0]] == label


# ---- the matrix and its report -----------------------------------------------------------------------------------


def test_evaluate_writes_one_table_in_four_forms(tmp_path, capsys):
    files = []
    for name in ("a", "b"):
        files.append(str(make_distilled(ipc=2).save(tmp_path / f"{name}.safetensors")))
    architectures = [SMALL, "convnet:width=4,depth=2"]
    rows = evaluate_files(files, architectures, str(tmp_path / "report"), 2, Recipe(steps=3))
    saved = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(rows) == len(saved) == 2 * 2 * 2 * 2  # sets x architectures x sources x seeds
    assert {r["source"] for r in saved} == {DISTILLED, RANDOM_REAL}
    assert {(r["architecture"], r["seen"]) for r in saved} == {(SMALL, True), ("convnet:width=4,depth=2", False)}
    assert all(0 <= r["accuracy"] <= 1 and 0 <= r["accuracy_best"] <= 1 for r in saved)
    with (tmp_path / "report" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 16
    table = (tmp_path / "report" / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert (tmp_path / "report" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "report" / "tensorboard").rglob("events.out.tfevents*"))
    made_with = json.loads((tmp_path / "report" / "provenance.json").read_text())
    assert made_with["sets"]["a"]["blake2b"] == hashlib.blake2b(Path(files[0]).read_bytes()).hexdigest()
    assert made_with["sets"]["b"]["fingerprint"] == make_distilled().data["fingerprint"]
    assert made_with["recipes"]["given"]["steps"] == 3
    assert "--architectures" in made_with["command"]
    assert str(tmp_path) not in made_with["command"]
    with (tmp_path / "report" / "classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert len(classes) == 16 * 3
    own = [float(line["accuracy"]) for line in classes if line["set"] == "a"]
    assert sum(own[:3]) / 3 == pytest.approx(rows[0].accuracy, abs=1e-4)  # classes of equal size
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert page.words.count("class2") == 2 * (2 + 1)  # under two images, and in the table of classes, of each set
    tex = (tmp_path / "report" / "results.tex").read_text()
    assert tex.count(r"\\") == 1 + 2  # a heading, and an architecture a line: the two sets are alike
    assert r"$\pm$" in tex


class Page(HTMLParser):
    """What a page loads, and the words on it."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_of_a_report_loads_nothing_and_runs_nothing(tmp_path):
    names = ("<script>alert(1)</script>", "class1", "class2")
    made = make_distilled(ipc=2, class_names=names)
    (tmp_path / "results.png").write_bytes(b"")
    rows = [replace(row(source=source), set="<b>set</b>") for source in (DISTILLED, RANDOM_REAL)]
    evaluate.write_pages(tmp_path, rows, {"<b>set</b>": made}, {"command": "<i>"}, {"<b>set</b>": "x"})
    page = Page((tmp_path / "report.html").read_text())
    assert page.loaded
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert not {"script", "b", "i", "link", "iframe"} & set(page.tags)
    assert page.tags.count("figure") == 6
    assert names[0] in page.words
    assert "50.0" in page.words  # of one student: no deviation


def test_the_page_shows_the_curves_of_a_run_where_the_set_lies_in_its_folder(tmp_path):
    board = Board(tmp_path / "run", name="", version="")
    for step in range(3):
        board.log_metrics({"val/accuracy": step / 10, "outer/loss": 1.0 - step, "epoch": 0.0}, step)
    board.finalize("success")
    (tmp_path / "results.png").write_bytes(b"")
    for file, curves in (("run/last.safetensors", 1), ("run/mine.safetensors", 0), ("last.safetensors", 0)):
        evaluate.write_pages(
            tmp_path, [row(), row(source=RANDOM_REAL)], {"set": make_distilled()}, {}, {"set": tmp_path / file}
        )
        text = (tmp_path / "report.html").read_text()
        assert text.count("curves of the run") == curves, file


def test_a_moving_average_changes_the_tested_weights(tmp_path):
    file = str(make_distilled(ipc=2, data=MNIST5k).save(tmp_path / "set.safetensors"))
    scores = []
    for ema in (0.0, 0.9):
        recipe = Recipe(steps=30, lr=1e-2, ema=ema)
        rows = evaluate_files([file], ["conv:width=4,norm=none"], str(tmp_path / f"r{ema}"), 1, recipe)
        scores.append([row.accuracy for row in rows])
    assert scores[0] != scores[1]


def test_the_summary_is_the_mean_the_sample_deviation_and_the_gap():
    rows = [
        row("conv", accuracy=0.8, seen=True, seed=0, best=0.85),
        row("conv", accuracy=0.6, seen=True, seed=1, best=0.65),
        row("conv", RANDOM_REAL, accuracy=0.5, seen=True),
        row("vit", accuracy=0.4),
        row("vit", RANDOM_REAL, accuracy=0.3),
    ]
    seen, unseen = summarise(rows)
    assert (seen.architecture, unseen.architecture) == ("conv", "vit")
    assert seen.distilled.mean == pytest.approx(0.7)
    assert seen.distilled.std == pytest.approx(0.02**0.5)
    assert seen.best.mean == pytest.approx(0.75)
    assert unseen.gap == pytest.approx(-0.3)
    text = markdown(rows)
    assert "70.0 ± 14.1" in text
    assert "| +20.0 (+10.0 to +30.0) | - |" in text  # resampling 0.6 and 0.8 gives 0.6, 0.7 or 0.8
    assert "| +10.0 | -30.0 |" in text  # one pair has no interval


# ---- nothing is trained twice ------------------------------------------------------------------------------------


def count_students(monkeypatch, stop_after=None):
    trained, run_cell = [], evaluate.run_cell

    def counted(cell, *args):
        if stop_after is not None and len(trained) == stop_after:
            raise KeyboardInterrupt
        trained.append(cell)
        return run_cell(cell, *args)

    monkeypatch.setattr(evaluate, "run_cell", counted)
    return trained


def accuracies(rows):
    return [(row.set, row.architecture, row.source, row.seed, row.accuracy, row.accuracy_best) for row in rows]


def test_an_interrupted_evaluation_trains_only_what_is_missing(tmp_path, monkeypatch):
    file = str(make_distilled(ipc=2).save(tmp_path / "set.safetensors"))
    arguments = ([file], [SMALL], str(tmp_path / "a"), 3, Recipe(steps=2))
    with monkeypatch.context() as patch:
        count_students(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            evaluate_files(*arguments)
    assert not (tmp_path / "a" / "results.json").exists()
    trained = count_students(monkeypatch)
    resumed = evaluate_files(*arguments)
    assert len(trained) == 4
    straight = evaluate_files([file], [SMALL], str(tmp_path / "b"), 3, Recipe(steps=2))
    assert accuracies(resumed) == accuracies(straight)
    trained.clear()
    evaluate_files([file], [SMALL], str(tmp_path / "a"), 3, Recipe(steps=3))
    assert len(trained) == 6  # another recipe makes other students


def test_a_damaged_record_is_made_again(tmp_path, monkeypatch):
    file = str(make_distilled(ipc=2).save(tmp_path / "set.safetensors"))
    arguments = ([file], [SMALL], str(tmp_path / "a"), 1, Recipe(steps=2))
    first = evaluate_files(*arguments)
    next((tmp_path / "a" / "cells").iterdir()).write_text("{")
    trained = count_students(monkeypatch)
    assert accuracies(evaluate_files(*arguments)) == accuracies(first)
    assert len(trained) == 1


def test_sets_of_one_size_share_their_random_real_students(tmp_path, monkeypatch):
    files = []
    for name, shift in (("a", 0.0), ("b", 0.5)):
        made = make_distilled(ipc=2)
        made.images += shift
        files.append(str(made.save(tmp_path / f"{name}.safetensors")))
    trained = count_students(monkeypatch)
    rows = evaluate_files(files, [SMALL], str(tmp_path / "r"), 2, Recipe(steps=2))
    assert len(rows) == 8
    assert len(trained) == 6
    assert {row.set for row in rows if row.source == RANDOM_REAL} == {"a", "b"}


@pytest.mark.slow
def test_workers_give_what_one_process_gives(tmp_path, monkeypatch):
    file = str(make_distilled(ipc=1, data=MNIST5k).save(tmp_path / "set.safetensors"))
    arguments = ["conv:width=4,norm=none"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    many = evaluate_files([file], arguments, str(tmp_path / "many"), 2, Recipe(steps=3), workers=2)
    one = evaluate_files([file], arguments, str(tmp_path / "one"), 2, Recipe(steps=3))
    assert accuracies(many) == accuracies(one)


class KilledInAWorker(TinyData):
    def setup(self, stage=None):
        if jobs.place() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        super().setup(stage)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(tmp_path):
    file = str(make_distilled(ipc=2).save(tmp_path / "set.safetensors"))
    choice = DataChoice("test_evaluate.KilledInAWorker")
    with pytest.raises(
        UserError, match=r"worker process of 'conv.* [01]' was killed, perhaps for want of memory"
    ) as error:
        evaluate_files([file], [SMALL], str(tmp_path / "a"), 2, Recipe(steps=2), choice, workers=2)
    assert "\n" not in str(error.value)


def test_processes_of_a_launcher_share_the_students_and_one_writes_the_report(tmp_path, monkeypatch):
    file = str(make_distilled(ipc=2).save(tmp_path / "set.safetensors"))
    arguments = ([file], [SMALL], str(tmp_path / "a"), 2, Recipe(steps=2))
    trained = count_students(monkeypatch)
    shares = {}

    def wait(asked, ledger):  # in place of waiting, the other process does its work
        assert not (tmp_path / "a" / "results.json").exists()
        shares["first"] = len(trained)
        monkeypatch.setattr(jobs, "launcher", lambda: Launched(1))
        monkeypatch.setattr(rank_zero_only, "rank", 1)  # as RANK makes it in that process
        monkeypatch.setattr(jobs, "wait_for", lambda asked, ledger: None)
        assert evaluate_files(*arguments) == []
        shares["both"] = len(trained)

    monkeypatch.setattr(jobs, "launcher", lambda: Launched(0))
    monkeypatch.setattr(jobs, "wait_for", wait)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    rows = evaluate_files(*arguments)
    assert len(rows) == 4
    assert shares == {"first": 2, "both": 4}
    assert len(trained) == len(set(trained)) == 4


def test_a_worker_with_a_gpu_of_its_own_keeps_the_students_identity(tmp_path, monkeypatch):
    """The device a worker was given says nothing of the result, so another run finds the student again."""
    file = str(make_distilled(ipc=2).save(tmp_path / "set.safetensors"))
    seen = []

    def run_cell(cell, distilled, real, recipe, hardware, *args):
        seen.append(hardware.devices)
        return row(accuracy=0.25)

    monkeypatch.setattr(evaluate, "run_cell", run_cell)
    monkeypatch.setattr(jobs, "_PLACE", 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (tmp_path / "a").mkdir()
    here = evaluate.Bench({"set": file}, {"": Recipe(steps=2)}, tmp_path / "a", DataChoice(), Hardware())
    cell = Cell("set", SMALL, DISTILLED, 0)
    assert here.train([cell], 1)
    assert seen == [[1]]
    monkeypatch.undo()
    again = pickle.loads(pickle.dumps(here))
    assert again.row(cell).accuracy == 0.25


def test_students_are_tested_on_the_data_the_user_names(tmp_path):
    """A set of data that nothing knows any more, scored on a class by its path with arguments."""
    distilled = replace(make_distilled(ipc=2), data={"name": "Gone", "spec": {}, "fingerprint": "unseen"})
    file = str(distilled.save(tmp_path / "set.safetensors"))
    arguments = ([file], [SMALL], str(tmp_path / "a"), 1, Recipe(steps=2))
    with pytest.raises(UserError, match="made from 'Gone', which is none of"):
        evaluate_files(*arguments)
    rows = evaluate_files(*arguments, DataChoice("helpers.TinyData", {"val_fraction": 0.0}))
    assert {row.accuracy_best for row in rows} == {None}  # no validation split
    with pytest.raises(UserError, match=r"class names or their order disagree|num_classes disagree"):
        evaluate_files(*arguments, DataChoice("MNIST5k"))


def test_fit_and_test_take_the_real_data_by_name_or_path(tmp_path, capsys):
    distilled = replace(make_distilled(ipc=2), data={"name": "Gone", "spec": {}, "fingerprint": "unseen"})
    file = str(distilled.save(tmp_path / "set.safetensors"))
    asked = ["--data=DistilledData", f"--data.file={file}", "--model=Student", f"--model.architecture={SMALL}"]
    asked += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_steps=2"]
    assert main(["fit", *asked]) == 2
    assert "say which real data to score on" in capsys.readouterr().err
    real = ["--data.real=helpers.TinyData", "--data.real.val_fraction=0.25"]
    assert main(["fit", *asked, *real, "--trainer.default_root_dir=run"]) == 0
    assert main(["test", *asked, *real, f"--ckpt_path={next(Path('run').rglob('last.ckpt'))}"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_other_data_of_the_same_classes_is_said_at_once_and_in_the_report(tmp_path):
    file = str(make_distilled(ipc=2).save(tmp_path / "mine.safetensors"))
    with pytest.warns(
        UserWarning, match="'mine' is scored on other data than the set was made from: .* of Darker here"
    ):
        evaluate_files([file], [SMALL], str(tmp_path / "a"), 1, Recipe(steps=2), DataChoice("test_evaluate.Darker"))
    said = "**Scored on other data than the set was made from:** mine."
    assert said in (tmp_path / "a" / "results.md").read_text()
    evaluate_files([file], [SMALL], str(tmp_path / "b"), 1, Recipe(steps=2), DataChoice("test_evaluate.TinyData"))
    assert said not in (tmp_path / "b" / "results.md").read_text()
    asked = ["fit", "--data=DistilledData", f"--data.file={file}", "--model=Student", f"--model.architecture={SMALL}"]
    asked += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_steps=1"]
    with pytest.warns(UserWarning, match="scored on other data"):
        assert main([*asked, "--data.real=test_evaluate.Darker"]) == 0


def test_other_test_images_are_another_result(tmp_path, monkeypatch):
    file = str(make_distilled(ipc=2).save(tmp_path / "set.safetensors"))
    arguments = ([file], [SMALL], str(tmp_path / "a"), 1, Recipe(steps=2))
    trained = count_students(monkeypatch)
    for choice in (DataChoice(), DataChoice("helpers.TinyData"), DataChoice("helpers.TinyData"), DataChoice()):
        evaluate_files(*arguments, choice)
    assert len(trained) == 2 + 2


def test_sets_of_one_method_are_one_line_with_a_spread_over_distillations(tmp_path):
    files = []
    for seed in (0, 1):
        made = make_distilled(ipc=2, training={"seed": seed})
        made.images += seed
        files.append(str(made.save(tmp_path / f"seed{seed}.safetensors")))
    other = make_distilled(ipc=2, training={"seed": 0}, method="Other")
    files.append(str(other.save(tmp_path / "other.safetensors")))
    added = make_distilled(ipc=2, training={"seed": 0}, run={"trainer": {"callbacks+": [{"class_path": "MetaDD"}]}})
    files.append(str(added.save(tmp_path / "metadd.safetensors")))
    rows = evaluate_files(files, [SMALL, "convnet:width=4,depth=2"], str(tmp_path / "r"), 2, Recipe(steps=2))
    lines = summarise(rows)
    assert [(line.set, line.distilled.sets, line.distilled.count) for line in lines[::2]] == [
        ("seed0 x2", 2, 4),
        ("other", 1, 2),
        ("metadd", 1, 2),
    ]
    assert "Paired difference to `seed0 x2`" in markdown(rows)


def test_sets_of_runs_are_called_after_what_they_hold_or_as_the_user_says(tmp_path):
    for run, method in (("one", "DM"), ("two", "FRePo"), ("three", "FRePo")):
        made = make_distilled(ipc=2, training={"seed": 3}, method=method)
        made.save(tmp_path / run / "best.safetensors")
        made.save(tmp_path / run / "last.safetensors")
    asked = [str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "three" / "last.safetensors")]
    found, _ = evaluate.check_asked(asked, [SMALL], "report", 1, 1)
    assert list(found) == ["DM-TinyData-ipc2-seed3", "FRePo-TinyData-ipc2-seed3", "three-FRePo-TinyData-ipc2-seed3"]
    assert found["DM-TinyData-ipc2-seed3"] == str(tmp_path / "one" / "best.safetensors")
    found, _ = evaluate.check_asked(asked, [SMALL], "report", 1, 1, ["a", "b", "c"])
    assert list(found) == ["a", "b", "c"]
    with pytest.raises(UserError, match="names must be 3 different ones, one for each file, got a, a"):
        evaluate.check_asked(asked, [SMALL], "report", 1, 1, ["a", "a"])
    with pytest.raises(UserError, match=r"holds neither best\.safetensors nor last\.safetensors"):
        evaluate.check_asked([str(tmp_path)], [SMALL], "report", 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"workers": "two"}, "workers must be at least 1, or 'auto', got two"),
        ({"architectures": []}, "at least one file and one architecture"),
        ({"architectures": ["conv:depth=9"]}, "too small for depth 9"),
        ({"architectures": ["convv"]}, "unknown architecture 'convv'"),
        ({"output": "blocked/report"}, "cannot write to folder"),
        ({"files": ["none.safetensors"]}, "no such file"),
    ],
)
def test_mistakes_are_found_before_the_first_student(changes, message, tmp_path):
    (tmp_path / "blocked").write_text("")
    file = str(make_distilled().save(tmp_path / "set.safetensors"))
    settings = {"files": [file], "architectures": [SMALL], "output": "report", "seeds": 1} | changes
    with pytest.raises(UserError, match=message):
        evaluate_files(recipe=Recipe(steps=1), **settings)
    assert not list(tmp_path.rglob("results.json"))


def test_the_verb_takes_a_number_of_workers_or_auto(tmp_path, monkeypatch, capsys):
    file = str(make_distilled(ipc=2, data=MNIST5k).save(tmp_path / "set.safetensors"))
    asked = []
    monkeypatch.setattr(evaluate, "run_jobs", lambda jobs, work, ledger, workers, **_: asked.append(workers))
    for workers in ("2", "auto"):
        arguments = ["evaluate", file, f"--architectures={SMALL}", "--output=out", f"--workers={workers}"]
        assert main(arguments) == 0
    assert asked == [2, "auto"]
    assert main([*arguments, "--workers=two"]) == 2
    assert "workers must be at least 1, or 'auto', got two" in capsys.readouterr().err


def test_the_file_alone_rebuilds_its_data(tmp_path):
    path = make_distilled(data=MNIST5k).save(tmp_path / "set.safetensors")
    real = real_data_of(DistilledSet.load(path))
    assert isinstance(real, MNIST5k)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_an_evaluation_told_to_stop_ends_within_seconds_and_keeps_its_rows(number, status, tmp_path):
    file = make_distilled(data=MNIST5k).save(tmp_path / "set.safetensors")
    words = ["evaluate", str(file), "--architectures", SMALL, "--steps=2000", "--seeds=3", "--workers=2"]
    command = [sys.executable, "-m", "lightning_dd", *words, "--accelerator=cpu", "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_dd.__file__).parent.parent)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    parent = subprocess.Popen(command, env=environment, start_new_session=True, text=True, **pipes)
    cells, end = tmp_path / "out" / "cells", time.monotonic() + 240
    while not (cells.is_dir() and list(cells.glob("*.json"))):
        assert time.monotonic() < end
        time.sleep(0.1)
    asked = time.monotonic()
    if number == "SIGINT":  # a terminal tells the workers, too
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.send_signal(signal.Signals[number])
    errors = parent.communicate(timeout=60)[1]
    assert time.monotonic() < asked + 5
    assert parent.returncode == status
    assert "Traceback" not in errors
    while time.monotonic() < asked + 5:
        left = subprocess.run(["ps", "-s", str(parent.pid), "-o", "pid="], capture_output=True, check=False).stdout
        if not left.strip():
            break
    assert not left.strip()
    rows = list(cells.iterdir())
    assert rows
    assert all(json.loads(row.read_text())["record"] for row in rows)
