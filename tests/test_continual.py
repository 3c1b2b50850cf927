"""Class-incremental learning: class subsets, the union of distilled sets, forgetting, the run and its resumption."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TinyData, make_distilled
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dd.applications import Continual, continual
from lightning_dd.applications.continual import (
    Course,
    Lesson,
    class_order,
    fill_memory,
    rows_of,
    run_continual,
    score_student,
    split_classes,
)
from lightning_dd.applications.continual_report import curves, forgetting, markdown
from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS, ClassSubset, RawSplit
from lightning_dd.data.parts import load_preprocessing, save_preprocessing
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distilled import DistilledSet
from lightning_dd.distilled.datamodule import check_match, real_data_of, real_set
from lightning_dd.distilled.union import embed_labels, union
from lightning_dd.distilled.views import draw_views
from lightning_dd.experiment import Method
from lightning_dd.losses.krr import initial_labels
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

STUDENT = "conv:width=4,depth=2,norm=none"


class FourKinds(TinyData):
    classes = 4


class Poisoned(FourKinds):
    """The same, with noise in place of the images of all classes but 1 and 3."""

    def read(self, *, train: bool) -> RawSplit:
        images, labels, names = super().read(train=train)
        noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(9)).to(torch.uint8)
        kept = ((labels == 1) | (labels == 3)).view(-1, 1, 1, 1)
        return RawSplit(torch.where(kept, images, noise), labels, names)


@pytest.fixture(autouse=True)
def _register(monkeypatch):
    monkeypatch.setitem(DATA_SETS, "FourKinds", FourKinds)


def config(method, steps=1, pool=False, **settings):
    """The smallest configuration of a distiller."""
    callbacks = [{"class_path": "ExportDistilledSet"}]
    return {
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "callbacks": [*callbacks, *([{"class_path": "PoolAlternation"}] if pool else [])],
        },
        "model": {"class_path": method, "init_args": {"architecture": "conv:width=4,depth=2", **settings}},
        "data": {"class_path": "MNIST5k"},
    }


@pytest.fixture
def methods(tmp_path):
    """FRePo and random images, as the verb takes them."""
    folder = tmp_path / "configs"
    folder.mkdir()
    frepo = config("FRePo", 3, pool=True, pool_size=1, real_batch_size=8, flip=False)
    for name, content in (("frepo", frepo), ("random", config("Random"))):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {"frepo": [str(folder / "frepo.yaml"), "--trainer.max_steps=2"], "random": [str(folder / "random.yaml")]}


def experiment(methods, output, **changes):
    settings = {
        "data": "FourKinds",
        "steps": 2,
        "ipc": 1,
        "orders": 1,
        "architectures": [STUDENT],
        "student_steps": 2,
        "lr": 1e-2,
        "joint_steps": 2,
        "joint_lr": 1e-2,
        "joint_batch_size": 8,
        "accelerator": "cpu",
    }
    return Continual(methods=methods, output=str(output), **(settings | changes))


def course(order=0, folder=Path("x"), methods=None, **data_args):
    return Course(experiment(methods or {"a": "mnist5k/random"}, folder, data_args=data_args), order, 4)


# ---- class subsets -----------------------------------------------------------------------------------------------


def test_a_subset_renumbers_its_classes_in_their_order_and_leaves_the_others_out():
    data = ClassSubset("FourKinds", [3, 1])
    data.setup("test")
    assert data.facts.class_names == ("class3", "class1")
    assert data.facts.name == "FourKinds"
    whole = FourKinds().read(train=False)
    pixels = data.preprocessing.inverse(data.test.everything().images).mul(255).round().to(torch.uint8)
    for new, old in enumerate((3, 1)):
        assert torch.equal(pixels[data.test.labels == new], whole.images[whole.labels == old])
    assert len(data.test.labels) == 2 * FourKinds.per_class


def test_no_pixel_of_another_class_reaches_a_subset(monkeypatch):
    parts = []
    for cls in (FourKinds, Poisoned):
        monkeypatch.setitem(DATA_SETS, "FourKinds", cls)
        parts.append(ClassSubset("FourKinds", [3, 1], {"preprocessing": "zca"}))
        parts[-1].setup("test")
    clean, poisoned = parts
    assert clean.facts == poisoned.facts
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(clean, split).everything().images, getattr(poisoned, split).everything().images)


def test_a_subset_takes_its_sources_settings_and_statistics():
    from lightning_dd.data import MNIST5k

    data = ClassSubset("MNIST5k", [5], {"val_fraction": 0.5, "split_seed": 3, "eval_batch_size": 7})
    assert (data.val_fraction, data.split_seed, data.eval_batch_size) == (0.5, 3, 7)
    assert data.statistics == (MNIST5k.channel_mean, MNIST5k.channel_std)
    chosen = {"preprocessing": "zca", "mean": [0.1], "std": [0.4], "zca_ridge": 0.2}
    data = ClassSubset("MNIST5k", [5], chosen)
    assert (data.statistics, data.zca_ridge) == (([0.1], [0.4]), 0.2)


def test_a_subsets_preprocessing_can_be_given(tmp_path):
    first = ClassSubset("FourKinds", [3, 1], {"preprocessing": "zca"})
    first.setup("fit")
    path = save_preprocessing(first.preprocessing, tmp_path / "map.safetensors")
    later = ClassSubset("FourKinds", [0, 2], {"preprocessing": "zca"}, str(path))
    later.setup("fit")
    assert torch.equal(later.preprocessing.zca_whiten, first.preprocessing.zca_whiten)
    assert later.facts.preprocessing.startswith("zca")
    (tmp_path / "bad").write_text("no map")
    with pytest.raises(UserError, match="missing, or not one of lightning_dd"):
        load_preprocessing(tmp_path / "bad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("FourKinds", []), "at least one"),
        (("FourKinds", [1, 1]), "different labels"),
        (("FourKinds", [-1]), "different labels"),
        (("FourKind", [1]), "did you mean 'FourKinds'"),
        (("FourKinds", [1], {"sides": 3}), "arguments do not fit data set 'FourKinds'"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ClassSubset(*arguments)


def test_a_class_the_source_lacks_is_refused():
    with pytest.raises(UserError, match="classes must be below 4 for FourKinds, got 4"):
        ClassSubset("FourKinds", [0, 4]).setup("fit")


# ---- orders and methods ------------------------------------------------------------------------------------------


def test_a_class_order_depends_on_its_seed_alone():
    assert class_order(100, 1) == [int(label) for label in np.random.RandomState(1).permutation(100)]
    np.random.seed(5)
    torch.manual_seed(5)
    assert class_order(100, 1) == class_order(100, 1) != class_order(100, 2)
    assert sorted(class_order(100, 3)) == list(range(100))
    first, again = (course(1) for _ in range(2))
    assert first.seed("distil", 0) == again.seed("distil", 0) != first.seed("distil", 1)


@pytest.mark.parametrize("steps", [0, 3, 10])
def test_steps_must_divide_the_classes(steps):
    with pytest.raises(UserError, match="parts of at least 2 classes: 1, 2, 5; got"):
        split_classes(range(10), steps)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": ["none.yaml"]}, r"methods.a: unknown configuration 'none.yaml'"),
        ({"a/b": ["none.yaml"]}, "letters, digits"),
        ({"a": []}, r"methods.a must be configuration files with options of fit, got \[\]"),
        ({"a": ["set.safetensors"]}, "methods.a must be configuration files with options of fit, got"),
        ({}, "name at least one, as .* and none 'joint'"),
        ({"joint": ["mnist5k/random"]}, "name at least one, as .* and none 'joint'"),
    ],
)
def test_methods_that_cannot_be_are_refused(methods, message):
    with pytest.raises(UserError, match=message):
        experiment(methods, "out")


def test_a_method_may_name_a_configuration_that_comes_with_the_package():
    method = Method.parse("a", ["configs/mnist5k/random.yaml", "--model.init_args.ipc=2"])
    assert Path(method.configs[0]).is_file()
    assert method == Method.parse("a", ["mnist5k/random", "--model.init_args.ipc=2"])


# ---- the union ---------------------------------------------------------------------------------------------------


def part(classes, label_kind="hard", ipc=2, **changes):
    """A set as if distilled from some classes of FourKinds."""
    real = ClassSubset("FourKinds", classes, {"preprocessing": "standardise"})
    real.use_preprocessing(make_distilled().preprocessing)
    real.setup("fit")
    kind = "hard" if label_kind == "soft" else label_kind
    rows = draw_per_class(real.train.labels, ipc, len(classes), torch.Generator().manual_seed(0))
    drawn = real.train.take(rows)
    return replace(real_set(real, drawn.images, drawn.labels, kind, "Test"), label_kind=label_kind, **changes)


@pytest.mark.parametrize("kind", ["hard", "centred", "learned"])
def test_start_labels_of_the_steps_unite_to_the_start_labels_of_all_classes(kind):
    whole = union([part([3, 1], kind), part([0, 2], kind)])
    assert whole.class_names == ("class3", "class1", "class0", "class2")
    assert whole.classes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(whole.labels, initial_labels(whole.classes, 4, kind))
    assert whole.ipc == 2
    assert torch.equal(whole.images[4:], part([0, 2], kind).images)


def test_learned_labels_keep_their_differences_and_call_foreign_classes_average_wrong_ones():
    generator = torch.Generator().manual_seed(0)
    classes, start, total = torch.arange(3).repeat_interleave(4), 2, 7
    labels = initial_labels(classes, 3, "learned") + 0.3 * torch.randn(12, 3, generator=generator)
    rows = embed_labels(labels, classes, "learned", start, total)
    own = rows[:, start : start + 3]
    # The rows differ within the step as they did, up to one common factor.
    ratio = (own - own[:, :1])[:, 1:] / (labels - labels[:, :1])[:, 1:]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-4, atol=1e-4)
    # The mean gap is that of FRePo's labels for all classes, and sums are kept at zero as theirs.
    right = own.gather(1, classes[:, None]).squeeze(1)
    wrong = (own.sum(1) - right) / 2
    assert float((right - wrong).mean()) == pytest.approx(1 / math.sqrt(total / 10), rel=1e-5)
    centred = labels - labels.mean(1, keepdim=True)
    rows = embed_labels(centred, classes, "learned", start, total)
    torch.testing.assert_close(rows.sum(1), torch.zeros(12), rtol=0, atol=1e-5)
    # On average a wrong class of the step is worth as much as a class it never saw.
    own, foreign = rows[:, start : start + 3], rows[:, [0, 1, 5, 6]]
    wrong = (own.sum(1) - own.gather(1, classes[:, None]).squeeze(1)) / 2
    assert float(wrong.mean()) == pytest.approx(float(foreign.mean()), abs=1e-6)
    torch.testing.assert_close(foreign, torch.full_like(foreign, -1 / total / math.sqrt(total / 10)))


def test_learned_labels_of_any_amplitude_weigh_the_same():
    classes = torch.tensor([0, 1, 1])
    labels = torch.tensor([[0.9, -0.7], [-0.4, 0.6], [-0.5, 0.2]])
    one, other = (embed_labels(scale * labels, classes, "learned", 0, 4) for scale in (1.0, 0.01))
    torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match="do not tell their classes apart"):
        embed_labels(-labels, classes, "learned", 0, 4)


def test_soft_labels_keep_their_softmax_and_give_foreign_classes_none():
    labels, temperature = torch.tensor([[4.0, -3.0], [0.5, 9.0]]), 20.0
    rows = embed_labels(labels, torch.tensor([0, 1]), "soft", 1, 4, temperature)
    chances = torch.softmax(rows / temperature, 1)
    torch.testing.assert_close(chances[:, 1:3], torch.softmax(labels / temperature, 1))
    assert float(chances[:, [0, 3]].max()) < 1e-12


def soft_part(classes, seed, epochs=3):
    views = draw_views(epochs, (1, 8, 8), 4, 2, torch.Generator().manual_seed(seed))
    views.logits.copy_(torch.randn(views.logits.shape, generator=torch.Generator().manual_seed(seed)))
    return part(classes, "soft", labels=torch.randn(4, 2), temperature=20.0, views=views)


def test_stored_views_of_the_union_are_those_of_its_parts():
    parts = [soft_part([3, 1], 1), soft_part([0, 2], 2)]
    whole = union(parts)
    for index, own in enumerate(parts):
        rows = torch.arange(4)
        images, logits = own.views.replay(own.images, 2, rows)
        united_images, united_logits = whole.views.replay(whole.images, 2, rows + 4 * index)
        assert torch.equal(images, united_images)
        torch.testing.assert_close(
            torch.softmax(united_logits / 20, 1)[:, 2 * index : 2 * index + 2], torch.softmax(logits / 20, 1)
        )
        order = whole.views.order[2].long()  # each set's own, with both sets in every batch
        assert torch.equal(order[order // 4 == index] - 4 * index, own.views.order[2].long())
        assert (order[:4] // 4 == index).sum() == (order[4:] // 4 == index).sum() == 2
    with pytest.raises(UserError, match="different numbers of stored views"):
        union([soft_part([3, 1], 1), soft_part([0, 2], 2, epochs=4)])


def test_the_union_is_a_file_that_rebuilds_its_real_data(tmp_path):
    path = union([part([3, 1]), part([0, 2])]).save(tmp_path / "memory.safetensors")
    loaded = DistilledSet.load(path)
    real = real_data_of(loaded)
    assert isinstance(real, ClassSubset)
    assert real.classes == [3, 1, 0, 2]
    real.setup("fit")
    check_match(loaded, real)


def zca_of(part):
    from lightning_dd.data.preprocess import Preprocessing

    return Preprocessing(part.preprocessing.mean + 0.1, part.preprocessing.std)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: part([1, 2]), "two sets hold the class 'class1'"),
        (lambda: part([0, 2], "centred"), "different forms of labels: hard and centred"),
        (lambda: part([0, 2], ipc=1), "different images per class: 2 and 1"),
        (lambda: part([0, 2], preprocessing=zca_of(part([0, 2]))), "different preprocessing"),
        (lambda: part([0, 2], images=torch.zeros(4, 1, 4, 4)), r"different image shapes: \(1, 8, 8\) and \(1, 4, 4\)"),
        (lambda: part([0, 2], data={"name": "x", "spec": {"classes": [0, 2]}}), "different data"),
        (lambda: part([0, 2], data={}), "remember their classes"),
    ],
)
def test_sets_that_do_not_belong_together_are_refused(other, message):
    with pytest.raises(UserError, match=message):
        union([part([3, 1]), other()])


def test_a_union_of_nothing_is_refused():
    with pytest.raises(UserError, match="at least one"):
        union([])


# ---- forgetting and the report -----------------------------------------------------------------------------------


def test_forgetting_equals_a_slow_count():
    generator = np.random.default_rng(0)
    matrix = [list(generator.random(2 * (step + 1))) for step in range(5)]
    expected = []
    for step, row in enumerate(matrix):
        losses = []
        for label in range(2 * step):
            best = -1.0
            for earlier in range(step):
                if label < len(matrix[earlier]) and matrix[earlier][label] > best:
                    best = matrix[earlier][label]
            losses.append(best - row[label])
        expected.append(sum(losses) / len(losses) if losses else 0.0)
    assert forgetting(matrix) == pytest.approx(expected)
    assert forgetting([[0.5], [0.9, 0.1]])[1] == pytest.approx(-0.4)  # old classes may gain


def scores(accuracies):
    """The scores of two steps; accuracies by step and student."""
    return {
        Lesson("x", step, STUDENT, number): {
            "images": 2 * (step + 1),
            "class_names": ["a", "b", "c", "d"][: 2 * (step + 1)],
            "accuracy": value,
            "class_accuracy": [value] * 2 * (step + 1),
        }
        for step, students in enumerate(accuracies)
        for number, value in enumerate(students)
    }


def test_the_table_is_the_mean_and_deviation_over_orders():
    rows = rows_of(0, scores([[1.0, 0.8], [0.5, 0.7]])) + rows_of(1, scores([[0.7, 0.7], [0.8, 0.8]]))
    assert [row.accuracy for row in rows] == pytest.approx([0.9, 0.6, 0.7, 0.8])
    assert [row.forgetting for row in rows] == pytest.approx([0.0, 0.3, 0.0, -0.1])
    assert rows[1].class_accuracy == pytest.approx({"a": 0.6, "b": 0.6, "c": 0.6, "d": 0.6})
    (curve,) = curves(rows)
    assert curve.accuracy[1].mean == pytest.approx(0.7)
    assert curve.accuracy[1].std == pytest.approx(0.02**0.5)
    assert curve.average.mean == pytest.approx(0.75)
    assert "| x | 80.0 ± 14.1 | 70.0 ± 14.1 | 75.0 ± 0.0 | 10.0 ± 28.3 |" in markdown(rows)


def test_a_student_is_scored_class_by_class(monkeypatch):
    def untrained(network, *args):  # answers the first class, whatever it is shown
        network.classify = lambda features: torch.eye(2)[0].expand(len(features), 2)
        return network

    monkeypatch.setattr(continual, "train_student", untrained)
    data, memory = ClassSubset("FourKinds", [3, 1]), part([3, 1])
    found = score_student(STUDENT, memory, data, Recipe(steps=1), 0, torch.device("cpu"))
    assert found == {"accuracy": 0.5, "class_accuracy": [1.0, 0.0]}


# ---- the run -----------------------------------------------------------------------------------------------------


def results(folder):
    return (folder / "results.json").read_text(), (folder / "results.md").read_text()


def test_a_run_writes_every_steps_files_one_line_each_and_a_report(methods, tmp_path, capsys):
    rows = run_continual(experiment(methods, tmp_path / "run", orders=2))
    out = capsys.readouterr().out
    assert len(rows) == 3 * 2 * 2  # methods and the upper line x orders x steps
    assert out.count("step 1: 2 classes") == out.count("step 2: 4 classes") == 6
    assert {row.method for row in rows} == {"frepo", "random", "joint"}
    assert [row.images for row in rows if row.method == "frepo"] == [2, 4, 2, 4]
    assert [row.images for row in rows if row.method == "joint"][:2] == [
        21,
        43,
    ]  # a tenth is for validation, rounded up
    order = class_order(4, 1)
    step = DistilledSet.load(tmp_path / "run/order1/frepo/step2/last.safetensors")
    memory = DistilledSet.load(tmp_path / "run/order1/frepo/step2/memory.safetensors")
    assert step.class_names == tuple(f"class{label}" for label in order[2:])
    assert memory.class_names == tuple(f"class{label}" for label in order)
    assert torch.equal(memory.images[2:], step.images)
    assert step.training["outer_step"] == 2  # the option wins over the file
    saved = json.loads((tmp_path / "run/results.json").read_text())
    assert list(saved[-1]["class_accuracy"]) == list(memory.class_names)
    with (tmp_path / "run/results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    assert (tmp_path / "run/results.png").read_bytes().startswith(b"\x89PNG")
    for name in ("frepo", "random", "joint"):
        events = EventAccumulator(str(tmp_path / "run/tensorboard" / name)).Reload()
        assert [item.step for item in events.Scalars("continual/accuracy")] == [2, 4]
        own = [row.accuracy for row in rows if (row.method, row.classes) == (name, 4)]
        assert events.Scalars("continual/accuracy")[-1].value == pytest.approx(sum(own) / 2)


def test_interrupted_after_anything_and_resumed_the_table_is_the_same(methods, tmp_path, monkeypatch):
    run_continual(experiment(methods, tmp_path / "straight"))
    real_distil, real_score = continual.distil_stage, continual.score_student
    left = 0

    def once(function, is_new):
        def wrapped(*args, **kwargs):
            nonlocal left
            if not is_new(*args):
                return function(*args, **kwargs)
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return function(*args, **kwargs)

        return wrapped

    new_stage = once(real_distil, lambda configs, data, output, overrides: not (output / "last.safetensors").is_file())
    monkeypatch.setattr(continual, "distil_stage", new_stage)
    monkeypatch.setattr(continual, "score_student", once(real_score, lambda *args: True))
    interruptions = 0
    while not (tmp_path / "broken" / "results.json").is_file():
        left = 1  # one distillation or one student, then the power fails
        try:
            run_continual(experiment(methods, tmp_path / "broken"))
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 2 * 2 + 3 * 2 - 1  # stages and students, but for the last
    assert results(tmp_path / "broken") == results(tmp_path / "straight")
    left = 0  # nothing is left to do
    run_continual(experiment(methods, tmp_path / "broken"))
    assert results(tmp_path / "broken") == results(tmp_path / "straight")


def test_a_later_class_leaves_no_trace_in_an_earlier_step(methods, tmp_path, monkeypatch):
    order = next(seed for seed in range(50) if set(class_order(4, seed)[:2]) == {1, 3})
    sets = []
    for cls in (FourKinds, Poisoned):
        monkeypatch.setitem(DATA_SETS, "FourKinds", cls)
        own = course(order, tmp_path / cls.__name__, methods, preprocessing="zca")
        fill_memory(own, own.experiment.distillers["frepo"], 0)
        sets.append(DistilledSet.load(own.folder / "frepo/step1/last.safetensors"))
    assert torch.equal(sets[0].images, sets[1].images)
    assert torch.equal(sets[0].labels, sets[1].labels)
    assert torch.equal(sets[0].preprocessing.zca_whiten, sets[1].preprocessing.zca_whiten)


def test_all_steps_of_a_course_share_the_first_ones_whitening(methods, tmp_path):
    first_order = course(0, tmp_path, methods, preprocessing="zca")
    for step in range(2):
        fill_memory(first_order, first_order.experiment.distillers["random"], step)
    memory = DistilledSet.load(first_order.memory_file("random", 1))
    first = ClassSubset("FourKinds", class_order(4, 0)[:2], {"preprocessing": "zca"})
    first.setup("fit")
    assert torch.equal(memory.preprocessing.zca_whiten, first.preprocessing.zca_whiten)
    assert torch.equal(first_order.joint_set(1).preprocessing.zca_whiten, first.preprocessing.zca_whiten)


def test_other_students_are_trained_on_the_same_distilled_sets_and_another_budget_is_refused(methods, tmp_path):
    folder = tmp_path / "run"
    run_continual(experiment(methods, folder, joint=False))
    stages = {path: path.stat().st_mtime_ns for path in folder.rglob("last.safetensors")}
    rows = run_continual(experiment(methods, folder, joint=False, students=2))
    assert all(len(row.students) == 2 for row in rows)
    assert stages == {path: path.stat().st_mtime_ns for path in folder.rglob("last.safetensors")}
    with pytest.raises(UserError, match="other settings"):
        run_continual(experiment(methods, folder, ipc=2))


@pytest.mark.slow
def test_students_are_the_same_in_one_process_and_in_two(methods, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    own = {"data": "test_continual.FourKinds", "students": 2}
    for workers in (1, 2):
        run_continual(experiment(methods, tmp_path / str(workers), workers=workers, **own))
    assert results(tmp_path / "1") == results(tmp_path / "2")


def test_a_damaged_score_is_trained_again(methods, tmp_path):
    only = experiment({"random": methods["random"]}, tmp_path / "run")
    run_continual(only)
    before = results(tmp_path / "run")
    for path in (tmp_path / "run").rglob("students/*.json"):
        path.write_text(path.read_text()[:20])
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    run_continual(only)
    assert results(tmp_path / "run") == before


def test_the_upper_line_beats_a_memory_of_noise(methods, tmp_path):
    noise = {"noise": [methods["frepo"][0], "--trainer.max_steps=1", "--model.init_args.init=noise"]}
    recipe = {"student_steps": 40, "joint_steps": 40, "batch_size": 32, "joint_batch_size": 32, "augment": "none"}
    rows = run_continual(experiment(noise, tmp_path / "run", **recipe))
    last = {row.method: row.accuracy for row in rows if row.classes == 4}
    assert last["joint"] > 0.8
    assert last["noise"] < last["joint"] - 0.2


# ---- the command line --------------------------------------------------------------------------------------------


def arguments(methods, *more):
    return [
        "continual",
        f"--methods={json.dumps(methods)}",
        f"--architectures={STUDENT}",
        "--output=out",
        "--data=FourKinds",
        "--steps=2",
        "--orders=1",
        "--ipc=1",
        "--student_steps=1",
        "--joint_steps=1",
        "--accelerator=cpu",
        *more,
    ]


def status(words):
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def test_the_verb_runs_from_end_to_end(methods, capsys):
    assert main(arguments({"random": methods["random"]})) == 0
    out = capsys.readouterr().out
    assert (Path("out") / "results.md").read_text() in out
    assert "| joint |" in out
    assert "next: " not in out  # a stage has no next command of its own


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps=3"], "steps must divide the 4 classes into parts of at least 2 classes: 1, 2; got 3"),
        (["--steps=4"], "parts of at least 2 classes: 1, 2; got 4"),
        (["--ipc=99"], "ipc=99 is more than there are: class 'class0' has 10 images"),
        (["--data=FiveKinds"], "did you mean 'FourKinds'"),
        (["--data_args.sides=3"], "arguments do not fit data set 'FourKinds'"),
        (["--architectures=conv:depth=9"], "too small for depth 9"),
        (["--orders=0"], "orders must be at least 1, got 0"),
        (["--protocol=frepoo"], "unknown protocol 'frepoo'"),
        (['--methods={"a": ["none.yaml"]}'], "methods.a: unknown configuration 'none.yaml'"),
        (["--joint_steps=0"], "steps must be at least 1"),
    ],
)
def test_a_mistake_gives_one_line_and_nothing_is_distilled(more, message, methods, capsys):
    assert status(arguments(methods, *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(Path().rglob("last.safetensors"))


def test_a_mistake_in_a_methods_options_gives_one_line(methods, capsys):
    wrong = {"random": [*methods["random"], "--model.init_args.pool_sise=3"]}
    assert status(arguments(wrong)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "pool_sise" in lines[0]
