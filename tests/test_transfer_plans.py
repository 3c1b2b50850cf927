"""The plans of trials say what they measure, every trial of them can be built, and their tables are of whole pairs."""

import re
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import lightning_dd.distillers
from lightning_dd.callbacks import MetaDD
from lightning_dd.models import build_network
from lightning_dd.models.factory import NetworkMixture

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import transfer  # noqa: E402
from plans import read_plan  # noqa: E402
from transfer_figures import by_budget, changes  # noqa: E402
from transfer_tables import change, level, table  # noqa: E402

PLANS = sorted((BENCHMARKS / "transfer").glob("*.yaml"))


def family(name):
    return re.match("[a-z]+", name.rpartition("/")[2])[0]  # resnet of resnet10t:...


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_trial_can_be_built_and_no_family_is_both_seen_and_unseen(path):
    plan = read_plan(path)
    for stage in plan["stages"]:
        unseen = {family(name) for name in stage["students"] if name != "own"}
        for trial, students in transfer.trials(plan, {**stage, "seeds": 0}):
            arguments = dict(trial.distiller)
            distiller = getattr(lightning_dd.distillers, arguments.pop("class"))(**arguments, seed=0)
            assert len(students) == len(stage["students"])
            if trial.setting != "families":
                names = NetworkMixture.parse(distiller.architectures).names
                assert unseen.isdisjoint(map(family, names))
            if trial.metadd is not None:
                assert unseen.isdisjoint(map(family, transfer.metadd(trial.metadd).mixture.names))
        for name in stage["students"]:
            assert name == "own" or build_network(name, 10, (3, 32, 32), 0) is not None


def test_what_chooses_looks_at_validation_and_at_other_families_than_what_tests():
    choosing, testing = (
        read_plan(BENCHMARKS / "transfer" / "metadd.yaml"),
        read_plan(BENCHMARKS / "transfer" / "cifar10_ipc10.yaml"),
    )
    assert {stage["split"] for stage in choosing["stages"]} == {"val"}
    first, second = ({family(n) for stage in p["stages"] for n in stage["students"]} for p in (choosing, testing))
    assert first.isdisjoint(second - {"own"})


def test_jobs_are_done_once_in_the_plans_order_each_set_before_its_students():
    plan = read_plan(BENCHMARKS / "transfer" / "cifar10_ipc10.yaml")
    jobs = transfer.jobs(plan, Path("nowhere"))
    assert len({str(job.identity) for job in jobs}) == len(jobs)
    assert [job.cost for job in jobs] == list(range(len(jobs), 0, -1))
    made = set()
    for job in jobs:
        key = str(transfer.identity(job.task.trial))
        assert job.task.architecture is None or key in made
        made.add(key)


def test_a_base_may_say_more_of_a_setting():
    plan = read_plan(BENCHMARKS / "transfer" / "cifar10_ipc10.yaml")
    plan["bases"]["dm"]["settings"] = {"metadd": {"metadd": {"weight": 0.25}}}
    stage = {"bases": ["dm", "dsa"], "settings": ["base", "metadd"], "seeds": "3-4", "students": ["own"]}
    found = [(t.base, t.setting, t.seed, t.metadd and t.metadd["weight"]) for t, _ in transfer.trials(plan, stage)]
    assert found[:2] == [("dm", "base", 3, None), ("dsa", "base", 3, None)]
    assert found[2:4] == [("dm", "metadd", 3, 0.25), ("dsa", "metadd", 3, 1.0)]
    assert [seed for _, _, seed, _ in found] == [3] * 4 + [4] * 4


def test_the_table_compares_seeds_that_are_whole_in_pairs():
    def row(setting, seed, architecture, accuracy):
        return {"base": "dm", "setting": setting, "seed": seed, "architecture": architecture, "accuracy": accuracy}

    rows = [row("base", s, a, 0.25) for s in range(3) for a in ("mine", "vgg", "swin")]
    rows += [row("metadd", s, a, 0.25 + 0.01 * (s + 1)) for s in range(3) for a in ("mine", "vgg", "swin")]
    rows = [*rows[:-1], row("metadd", 5, "mine", 0.9)]  # a student is missing of seed 2, and a base of seed 5
    text = table(rows, {"dm": "mine"})
    assert "| dm | base | 3 | 25.0 ± 0.0 |" in text
    assert "|  | metadd | 2 | +1.5 | +1.5 | +1.5 | +1.5 |" in text
    pairs = [({"a": 2.0, "b": 4.0}, {"a": 1.0, "b": 1.0}), ({"a": 3.0, "b": 3.0}, {"a": 1.0, "b": 1.0})]
    assert change(pairs, ["a", "b"]) == "+2.0"
    assert change([*pairs, ({"a": 4.0, "b": 4.0}, {"a": 1.0, "b": 1.0})], ["b"]) == "+2.7 ± 1.4"
    assert level([{"a": 1.0, "b": 3.0}], ["a", "b"]) == "2.0"


def test_the_reviewed_form_is_what_the_reviews_state():
    preset = read_plan(BENCHMARKS.parent / "configs" / "metadd_reviewed.yaml")["trainer"]["callbacks+"][0]["init_args"]
    parser = ArgumentParser()
    parser.add_class_arguments(MetaDD, "metadd")
    settings = parser.instantiate_classes(parser.parse_object({"metadd": preset})).metadd
    families = [name.partition(":")[0].rpartition("/")[2] for name in settings.mixture.names]
    assert len(families) == 4
    assert families[:2] == ["googlenet", "resnet34"]
    assert families[3].startswith("vit_")
    assert [settings.looks[name].cam for name in settings.mixture.names if name in settings.looks] == ["attention"]
    assert list(settings.looks) == [settings.mixture.names[3]]
    options = settings.options
    assert options.consensus == "distiller"
    assert min(options.variance, options.cross_entropy, options.kl, options.positivity) > 0
    assert (settings.every, settings.rows, settings.per_step, settings.scale) == (1, None, None, "absolute")
    assert options.threshold == 0.5


def test_a_figure_has_the_settings_of_its_table_with_their_means():
    def row(setting, seed, architecture, accuracy, steps=250):
        named = {"base": "dm", "setting": setting, "seed": seed, "architecture": architecture}
        return named | {"accuracy": accuracy, "steps": steps}

    scored = [
        row(setting, seed, architecture, 0.3 + 0.01 * seed + gain)
        for setting, gain in (("base", 0.0), ("better", 0.05))
        for seed in range(3)
        for architecture in ("own", "vgg", "swin")
    ]
    scored.append(row("alone", 7, "vgg", 0.9))  # not a pair
    axes = changes(scored, {"dm": "own"}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dm better"]
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in ("o", "D")]
    assert marks == pytest.approx([5.0, 5.0])

    plan = {"settings": {"base": {}, "soft": {"labels": {}}}}
    scored = [row(setting, 0, "vgg", 0.3, steps) for setting in plan["settings"] for steps in (250, 1000)]
    lines = by_budget(scored, plan, {"own"}).axes[0].lines
    assert [(line.get_label(), line.get_linestyle()) for line in lines] == [("dm, hard", "-"), ("dm, soft", "--")]
    assert [list(line.get_xdata()) for line in lines] == [[250, 1000]] * 2
