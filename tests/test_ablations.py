"""The committed experiments on MetaDD say what they measure, and their recorded rows were made with just that."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import lightning_dd.distillers
from lightning_dd.callbacks import MetaDD
from lightning_dd.models import build_network

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from metadd_settings import metadd  # noqa: E402

FILES = sorted((BENCHMARKS / "ablations").glob("*.yaml"))


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def family(name):
    return name.partition(":")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_setting_can_be_built_and_no_architecture_is_both_seen_and_unseen(path):
    experiment = load(path)
    arguments = dict(experiment["distiller"])
    distiller = getattr(lightning_dd.distillers, arguments.pop("class"))(**arguments)
    unseen = {family(name) for name in experiment["students"]["unseen"]}
    assert unseen.isdisjoint(
        {family(distiller.hparams.architecture), family(arguments.get("teacher", {}).get("architecture", ""))}
    )
    for changes in experiment["settings"].values():
        callback = metadd({**experiment["metadd"], **changes})
        assert unseen.isdisjoint(map(family, callback.mixture.names))
        for name in callback.mixture.names:
            build_network(name, 10, (3, 32, 32), 0)
    assert set(experiment["confirm"]) <= set(experiment["settings"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_setting_called_default_is_metadds_own(path):
    experiment = load(path)
    chosen = {**experiment["metadd"], **experiment["settings"]["default"]}
    default = {name: chosen[name] for name in ("architectures", "train_steps")}
    assert metadd(chosen).state_dict()["settings"] == metadd(default).state_dict()["settings"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_setting_called_reviewed_is_the_preset(path):
    experiment = load(path)
    if "reviewed" not in experiment["settings"]:
        pytest.skip("this experiment is without it")
    preset = load(BENCHMARKS.parent / "configs" / "metadd_reviewed.yaml")["trainer"]["callbacks+"][0]["init_args"]
    chosen = {**experiment["metadd"], **experiment["settings"]["reviewed"]}
    parser = ArgumentParser()
    parser.add_class_arguments(MetaDD, "metadd")
    built = parser.instantiate_classes(parser.parse_object({"metadd": preset})).metadd
    assert metadd(chosen).state_dict()["settings"] == built.state_dict()["settings"]


def test_the_reviewed_form_is_what_the_reviews_state():
    settings = metadd(load(FILES[-1].parent / "frepo_mnist5k_ipc1.yaml")["settings"]["reviewed"])
    families = [family(name).rpartition("/")[2] for name in settings.mixture.names]
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_rows_were_made_with_the_settings_of_their_name(path):
    recorded = BENCHMARKS / "results" / f"metadd_{path.stem}.jsonl"
    if not recorded.is_file():
        pytest.skip("nothing is recorded of this experiment")
    experiment = load(path)
    rows = [json.loads(line) for line in recorded.read_text(encoding="utf-8").splitlines()]
    assert len({(row["setting"], row["seed"]) for row in rows}) == len(rows)
    for row in rows:
        wanted = None
        if row["setting"] != "base":
            wanted = {**experiment["metadd"], **experiment["settings"][row["setting"]]}
        assert row["settings"] == wanted, (row["setting"], row["seed"])
