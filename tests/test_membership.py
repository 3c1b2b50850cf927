"""Membership inference: every attack against an independent computation, and who gets to see which image."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TinyData, split_of
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler

from lightning_dd.applications import ATTACKS, Membership, victims
from lightning_dd.applications import attacks as attacks_module
from lightning_dd.applications.attacks import (
    GRIDS,
    judge,
    learned_attack,
    lira,
    scaled_confidence,
    threshold_attack,
)
from lightning_dd.applications.membership import run_membership
from lightning_dd.applications.membership_report import Row, markdown, score_of
from lightning_dd.applications.victims import (
    RANDOM,
    REAL,
    Network,
    distilled_file,
    job_of,
    part,
    real_rows,
    score_victim,
    training_set,
    true_losses,
)
from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS, RealRows
from lightning_dd.data.preprocess import Preprocessing, to_unit
from lightning_dd.distilled import DistilledSet
from lightning_dd.distilled.datamodule import real_data_of
from lightning_dd.distillers import FRePo
from lightning_dd.experiment import Method, distil_stage
from lightning_dd.jobs import ArrayLedger
from lightning_dd.losses.krr import initial_labels
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

SMALL = "conv:width=4,depth=2,norm=none"
RECIPE = Recipe(lr=1e-2, warmup=0, schedule="constant", batch_size=8, augment="none")


def random_answers(count, random, shift=0.0, classes=4):
    """Logits and, in the last column, cross-entropies."""
    labels = random.integers(0, classes, count)
    logits = random.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1 + shift
    losses = logsumexp(logits, axis=1) - logits[np.arange(count), labels]
    return np.column_stack([logits, losses])


# ---- the attacks -------------------------------------------------------------------------------------------------


def test_area_and_rates_equal_brute_force():
    random = np.random.default_rng(0)
    members, others = random.integers(0, 12, 60) - 2.0, random.integers(0, 12, 50) * 1.0  # many ties
    result = judge(-members, -others, fprs=(0.02, 0.1, 0.5))
    assert threshold_attack(members, others).auc == result.auc
    pairs = [1.0 if one < other else 0.5 if one == other else 0.0 for one in members for other in others]
    assert result.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    for rate, found in result.tpr_at.items():
        best = 0.0
        for threshold in [-np.inf, *members, *others]:  # "member" means: loss at most the threshold
            if (others <= threshold).mean() <= rate:
                best = max(best, (members <= threshold).mean())
        assert found == pytest.approx(best, abs=1e-12)


def test_a_rate_below_the_resolution_is_not_given():
    random = np.random.default_rng(0)
    assert judge(random.normal(size=10), random.normal(size=999)).tpr_at[0.001] is None
    assert judge(random.normal(size=10), random.normal(size=1000)).tpr_at[0.001] is not None


def test_a_victim_that_saw_neither_set_gives_nothing_away():
    random = np.random.default_rng(1)
    members, others = random_answers(20_000, random), random_answers(20_000, random)
    assert threshold_attack(members[:, -1], others[:, -1]).auc == pytest.approx(0.5, abs=0.02)
    phi, shadows = random.normal(size=20_000), random.normal(size=(8, 20_000))
    inside = np.arange(8)[:, None] % 2 == random.integers(0, 2, 20_000)
    ratio = lira(phi, shadows, inside)
    assert judge(ratio[:10_000], ratio[10_000:]).auc == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_learned_attack_finds_a_leak_and_only_a_leak(kind):
    random = np.random.default_rng(2)
    neither = learned_attack(kind, random_answers(700, random), random_answers(900, random), folds=2)
    assert neither.auc == pytest.approx(0.5, abs=0.05)
    assert neither.members == neither.non_members == 700  # the larger side is drawn down
    few = learned_attack(kind, random_answers(50, random), random_answers(50, random), folds=2, rows=20)
    assert few.members == few.non_members == 20
    leak = learned_attack(kind, random_answers(300, random, shift=3.0), random_answers(300, random), folds=2)
    assert leak.auc > 0.8


def test_the_logistic_attack_equals_a_loop_written_out():
    random = np.random.default_rng(3)
    members, others = random_answers(60, random, shift=1.0), random_answers(60, random)
    features = np.concatenate([members, others])
    truth = np.repeat([1, 0], 60)
    scores = np.zeros(120)
    for train, test in StratifiedKFold(3, shuffle=True, random_state=5).split(features, truth):
        ((inner, rest),) = StratifiedShuffleSplit(1, test_size=0.25, random_state=5).split(
            features[train], truth[train]
        )
        areas = {}
        for penalty in GRIDS["logistic"]["C"]:
            scale = StandardScaler().fit(features[train][inner])
            model = LogisticRegression(C=penalty, max_iter=1000).fit(
                scale.transform(features[train][inner]), truth[train][inner]
            )
            guess = model.predict_proba(scale.transform(features[train][rest]))[:, 1]
            areas[penalty] = roc_auc_score(truth[train][rest], guess)
        scale = StandardScaler().fit(features[train])
        chosen = LogisticRegression(C=max(areas, key=areas.get), max_iter=1000)
        chosen.fit(scale.transform(features[train]), truth[train])
        scores[test] = chosen.predict_proba(scale.transform(features[test]))[:, 1]
    result = learned_attack("logistic", members, others, seed=5, folds=3)
    assert result.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


@pytest.mark.parametrize("models", [6, 64])  # few share one variance, many have one a sample
def test_lira_equals_scipy_sample_by_sample(models):
    random = np.random.default_rng(4)
    shadows, victim = random.normal(size=(models, 5)) * 2, random.normal(size=5)
    inside = np.stack([random.permutation(np.arange(models) % 2 == 0) for _ in range(5)], axis=1)
    residuals = {True: [], False: []}
    for sample in range(5):
        for side in (True, False):
            values = shadows[inside[:, sample] == side, sample]
            residuals[side] += list(values - values.mean())
    pooled = {side: np.sqrt(np.square(values).sum() / (len(values) - 5)) for side, values in residuals.items()}
    online, offline = (lira(victim, shadows, inside, mode) for mode in ("online", "offline"))
    for sample in range(5):
        parts = {side: shadows[inside[:, sample] == side, sample] for side in (True, False)}
        stds = pooled if models == 6 else {side: values.std(ddof=1) for side, values in parts.items()}
        likely = {side: norm(values.mean(), stds[side]).pdf(victim[sample]) for side, values in parts.items()}
        assert np.exp(online[sample]) == pytest.approx(likely[True] / likely[False])
        below = norm(parts[False].mean(), stds[False]).cdf(victim[sample])
        assert norm.cdf(offline[sample]) == pytest.approx(below)


def test_the_scaled_confidence_is_the_log_odds_of_the_true_class():
    random = np.random.default_rng(5)
    logits, labels = random.normal(size=(2, 7, 4)), random.integers(0, 4, 7)
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    true = np.take_along_axis(odds, np.broadcast_to(labels[:, None], (2, 7, 1)), -1)[..., 0]
    np.testing.assert_allclose(scaled_confidence(logits, labels), np.log(true / (1 - true)), rtol=1e-9)
    assert np.isfinite(scaled_confidence(np.array([[1e4, 0.0]]), np.array([0]))).all()


def test_the_attacks_need_neither_torch_nor_lightning():
    for node in ast.walk(ast.parse(Path(attacks_module.__file__).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert not [found for found in names if found.split(".")[0] in ("torch", "pytorch_lightning")]


def test_every_attack_has_a_name_of_its_own():
    assert [name for name in ATTACKS if name in GRIDS] == list(GRIDS)
    assert set(ATTACKS) == {"threshold", *GRIDS, "lira"}


# ---- victims -----------------------------------------------------------------------------------------------------


def memorising_set(count, random):
    """Noise with random labels: whoever knows them has learned them by heart."""
    images = torch.randn(count, 1, 8, 8, generator=random)
    labels = torch.randint(0, 10, (count,), generator=random)
    return make_set(images, labels), labels


def make_set(images, labels, label_kind="centred"):
    return DistilledSet(
        images=images,
        labels=initial_labels(labels, 10, label_kind),
        classes=labels,
        label_kind=label_kind,
        class_names=tuple("0123456789"),
        preprocessing=Preprocessing(torch.zeros(1), torch.ones(1)),
    )


def test_a_memorising_victim_is_caught():
    random = torch.Generator().manual_seed(0)
    members, labels = memorising_set(40, random)
    others, other_labels = memorising_set(40, random)
    pool, truth = torch.cat([members.images, others.images]), torch.cat([labels, other_labels])
    logits, losses = score_victim(members, split_of(pool, truth), SMALL, RECIPE, (2, 300), 0, torch.device("cpu"))
    assert logits.shape == (2, 80, 10)
    assert (logits[1, :40].argmax(1) == labels.numpy()).mean() > 0.95
    assert threshold_attack(losses[1, :40], losses[1, 40:]).auc > 0.9
    answers = np.column_stack([logits[1], losses[1]])
    for kind in ("logistic", "forest"):
        assert learned_attack(kind, answers[:40], answers[40:], folds=4).auc > 0.9


def test_a_shorter_length_is_a_stop_on_the_way():
    random = torch.Generator().manual_seed(0)
    members, labels = memorising_set(12, random)
    args = (members, split_of(members.images, labels), SMALL, replace(RECIPE, augment="crop"))
    both = score_victim(*args, (3, 6), 7, torch.device("cpu"))
    alone = score_victim(*args, (3,), 7, torch.device("cpu"))
    np.testing.assert_array_equal(both[0][0], alone[0][0])
    assert (both[0][0] != both[0][1]).any()


@pytest.mark.parametrize("label_kind", ["centred", "hard"])
def test_the_loss_is_the_one_the_victim_was_trained_with(label_kind):
    logits, labels = torch.randn(2, 5, 3), torch.tensor([0, 1, 2, 0, 1])
    losses = true_losses(logits, labels, label_kind)
    for length in range(2):
        for row in range(5):
            if label_kind == "hard":
                expected = -torch.log_softmax(logits[length, row], 0)[labels[row]]
            else:
                target = (torch.eye(3)[labels[row]] - 1 / 3) / (3 / 10) ** 0.5
                expected = 0.5 * (logits[length, row] - target).square().sum()
            assert float(losses[length, row]) == pytest.approx(float(expected), rel=1e-5)


# ---- rows of a data set ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """TinyData as one of the project's data sets: 36 training images and 36 test images."""
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)


def keys(images):
    return {image.numpy().tobytes() for image in images}


def test_chunks_are_disjoint_and_halves_split_the_pool(tiny):
    parts = [RealRows("TinyData", rows=12, chunk=chunk, held_out=6, val_fraction=0) for chunk in (0, 1)]
    held_out = keys(parts[0].read(train=False).images)
    seen = [keys(part.read(train=True).images) for part in parts]
    assert len(seen[0]) == len(seen[1]) == 12
    assert len(held_out) == 6
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & held_out
    assert keys(parts[1].read(train=False).images) == held_out
    for pair in (0, 1):
        first, second = (
            keys(
                RealRows("TinyData", rows=12, held_out=6, half=2 * pair + side, val_fraction=0).read(train=True).images
            )
            for side in (0, 1)
        )
        assert len(first) == len(second) == 9
        assert first | second == seen[0] | held_out
    with pytest.raises(UserError, match="too few for chunk 2 of 12 rows and 6 held-out ones"):
        RealRows("TinyData", rows=12, chunk=2, held_out=6).setup("fit")


def test_the_mask_names_the_images_that_are_trained_on(tiny):
    for half in (None, 3):
        part = RealRows("TinyData", rows=24, half=half, val_fraction=0.25)
        part.setup("fit")
        pool = part.pool()
        inside = part.trained_on(pool.labels)
        assert keys(part.preprocessing(to_unit(pool.images[inside]))) == keys(part.train.everything().images)


def test_a_part_keeps_its_sources_name_and_statistics_and_is_rebuilt_from_its_file(tiny):
    part = RealRows("MNIST5k", rows=50, chunk=1, held_out=20, val_fraction=0, source_args={"split_seed": 3})
    part.setup()
    assert part.facts.name == "MNIST5k"
    assert part.preprocessing.mean.tolist() == pytest.approx([0.1307])
    file = make_set(torch.zeros(3, 1, 8, 8), torch.arange(3))
    file.data = {"name": part.facts.name, "spec": part.spec(), "fingerprint": part.facts.fingerprint}
    file.preprocessing = part.preprocessing
    rebuilt = real_data_of(file)
    rebuilt.setup()
    assert rebuilt.facts == part.facts
    assert torch.equal(rebuilt.test.everything().images, part.test.everything().images)


# ---- a stage -----------------------------------------------------------------------------------------------------

CONFIG = {
    "trainer": {
        "max_steps": 6,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "callbacks": [
            {"class_path": "PoolAlternation"},
            {"class_path": "ExportDistilledSet"},
            {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_last": True}},
        ],
    },
    "model": {
        "class_path": "FRePo",
        "init_args": {
            "architecture": "conv:width=4,depth=2",
            "real_batch_size": 8,
            "pool_size": 2,
            "probe": {"steps": 1},
        },
    },
    "data": {"class_path": "MNIST5k"},
}
PART = {"class_path": "RealRows", "init_args": {"source": "TinyData", "rows": 18, "val_fraction": 0.0}}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "frepo.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def test_an_interrupted_stage_continues_and_a_finished_one_is_left_alone(tiny, config, tmp_path, monkeypatch):
    straight = DistilledSet.load(distil_stage([config], PART, tmp_path / "straight"))
    outer_loss, calls = FRePo.outer_loss, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of power")
        return outer_loss(self, *args)

    monkeypatch.setattr(FRePo, "outer_loss", failing)
    with pytest.raises(RuntimeError, match="out of power"):
        distil_stage([config], PART, tmp_path / "cut")
    path = distil_stage([config], PART, tmp_path / "cut")
    assert len(calls) == 5 + 2  # from the checkpoint of step 4
    assert torch.equal(DistilledSet.load(path).images, straight.images)
    assert distil_stage([config], PART, tmp_path / "cut") == path
    assert len(calls) == 7
    with pytest.raises(UserError, match="of other settings"):
        distil_stage([config], PART, tmp_path / "cut", ["--model.init_args.ipc=2"])


def test_a_stage_names_what_is_missing(tiny, config, tmp_path):
    with pytest.raises(UserError, match=r"unknown configuration 'none.yaml'"):
        distil_stage(["none.yaml"], PART, tmp_path / "out")
    with pytest.raises(UserError, match="at least one configuration file"):
        distil_stage([], PART, tmp_path / "out")
    with pytest.raises(UserError, match="must hold ExportDistilledSet"):
        distil_stage(
            [config], PART, tmp_path / "out", ["--trainer.callbacks=[PoolAlternation]", "--trainer.max_steps=1"]
        )


# ---- the experiment ----------------------------------------------------------------------------------------------


def experiment(config, output, **changes):
    settings = {
        "output": str(output),
        "data": "TinyData",
        "members": 18,
        "methods": {"frepo": [config]},
        "lengths": [2, 5],
        "architecture": SMALL,
        "lr": 1e-2,
        "batch_size": 8,
        "augment": "none",
        "real_batch_size": 8,
        "victims": 2,
        "attacks": ["threshold", "neighbours", "lira"],
        "folds": 2,
        "shadows": 4,
        "accelerator": "cpu",
        "workers": 1,  # others would not know the data of this test
    }
    return Membership(**(settings | changes))


def test_an_experiment_cut_short_and_run_again_gives_the_same_table(tiny, config, tmp_path, monkeypatch, capsys):
    rows = run_membership(experiment(config, tmp_path / "out"))
    sources = [REAL, f"{RANDOM}, ipc 1", "frepo"]
    assert list(dict.fromkeys(row.source for row in rows)) == [*sources[:2], f"{sources[1]} (own images)", "frepo"]
    # sources x victims x lengths x attacks; LiRA for real sources only, with a stated reason; and three own images
    assert len(rows) == 3 * 2 * 2 * 2 + 2 * 2 * 2 + 2 * 2
    assert {row.source for row in rows if row.attack == "lira"} == set(sources[:2])
    assert {row.images for row in rows} == {18, 3}
    assert {(row.members, row.non_members) for row in rows} == {(18, 36), (18, 18), (3, 36)}
    out = tmp_path / "out"
    table = (out / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert "No LiRA for frepo: every shadow model needs a distillation of its own" in table
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in out.glob("results.*") if path.suffix != ".png"}
    assert len(before) == 3
    calls = []
    monkeypatch.setattr(victims, "score_victim", lambda *args: calls.append(1) or score_victim(*args))
    networks, finished = (sorted((out / name).iterdir()) for name in ("networks", "attacks"))
    assert len(networks) == 3 * 2 + 2 * 4
    for path in [*networks[::3], *finished[::2]]:
        path.unlink()
    networks[1].write_bytes(b"half a file")
    assert run_membership(experiment(config, out)) == rows
    assert len(calls) == len(networks[::3]) + 1
    assert all((out / name).read_bytes() == content for name, content in before.items())
    run_membership(experiment(config, out))
    assert len(calls) == len(networks[::3]) + 1


def test_victims_learn_from_the_learned_images_and_the_distiller_from_members_alone(
    tiny, config, tmp_path, monkeypatch
):
    shown = []

    def spy(self, train):
        data = self.trainer.datamodule
        assert data.val is None
        assert data.test is None
        shown.append((data.train.everything().images, train.everything().images))
        original(self, train)

    original = FRePo.initialise
    monkeypatch.setattr(FRePo, "initialise", spy)
    trained = []

    def score(train, *args):
        trained.append(train)
        return score_victim(train, *args)

    monkeypatch.setattr(victims, "score_victim", score)
    this = experiment(config, tmp_path / "out", attacks=["threshold"], victims=1)
    run_membership(this)
    data = part(this, 0)
    data.setup()
    members, held_out = keys(data.train.everything().images), keys(data.test.everything().images)
    assert len(members) == 18
    assert not members & held_out
    ((fitted, handed),) = shown
    assert keys(fitted) == keys(handed) == members
    file = distilled_file(this, "frepo", 0)
    learned = DistilledSet.load(file)
    real, random, frepo = trained
    assert keys(real.images) == members
    assert keys(random.images) < members
    rows = real_rows(this, Network(f"{RANDOM}, ipc 1", 0, 0))
    assert keys(data.preprocessing(to_unit(data.pool().images[rows]))) == keys(random.images)
    assert torch.equal(frepo.images, learned.images)
    assert torch.equal(frepo.labels, learned.labels)
    assert not keys(frepo.images) & members  # they started as real images, and are not measured as such
    # Another set in the file is another victim, not a remembered one.
    old = job_of(this, Network("frepo", 0, 0)).identity
    learned.images = learned.images + 1
    learned.save(file)
    assert job_of(this, Network("frepo", 0, 0)).identity != old
    run_membership(this)
    assert torch.equal(trained[-1].images, learned.images)


def test_shadow_models_of_a_method_distil_their_own_half(tiny, config, tmp_path):
    this = experiment(config, tmp_path, attacks=["lira"], shadows=0, distil_shadows=4, victims=1, lengths=[2])
    rows = run_membership(this)
    assert [row.source for row in rows] == ["frepo"]
    fingerprints = set()
    for half in range(4):
        shadow = DistilledSet.load(distilled_file(this, "frepo", 0, half))
        data = part(this, 0, half)
        data.setup("fit")
        assert shadow.data["fingerprint"] == data.facts.fingerprint
        fingerprints.add(data.facts.fingerprint)
        network = Network("frepo", 0, half, shadow=True)
        answers = ArrayLedger(tmp_path / "networks").need(job_of(this, network).identity)
        assert int(answers["inside"].sum()) == 27
        assert torch.equal(training_set(this, network).images, shadow.images)
    assert len(fingerprints) == 4


def test_a_file_stands_for_its_own_members_only(tiny, config, tmp_path):
    file = str(distil_stage([config], PART, tmp_path / "stage"))
    ready = {
        "methods": {"mine": file},
        "attacks": ["threshold"],
        "victims": 1,
    }
    rows = run_membership(experiment(config, tmp_path / "a", **ready))
    assert "mine" in {row.source for row in rows}
    late = ready | {"members": 15, "methods": {"first": [str(config)], "mine": file}}
    with pytest.raises(UserError, match="was not distilled from these members"):
        run_membership(experiment(config, tmp_path / "b", **late))
    assert not list((tmp_path / "b").rglob("*.safetensors"))  # before another method is distilled


@pytest.mark.parametrize("mirror", [True, False])
def test_a_victim_of_real_images_mirrors_them_only_where_the_data_may_be(mirror, tiny, config, tmp_path):
    this = experiment(config, tmp_path, data_args={"mirror": mirror})
    for source in (REAL, f"{RANDOM}, ipc 1"):
        assert training_set(this, Network(source, 0, 0)).mirror == mirror


@pytest.mark.slow
def test_networks_are_the_same_in_one_process_and_in_two(config, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    own = {"data": "helpers.TinyData", "attacks": ["threshold"]}
    one, two = (run_membership(experiment(config, tmp_path / str(count), workers=count, **own)) for count in (1, 2))
    assert one == two


# ---- report ------------------------------------------------------------------------------------------------------


def row(source="frepo", seed=0, victim=0, auc=0.5, attack="threshold", others=100, rate=None):
    return Row(source, seed, victim, 10, 5, 0.8, 0.9, attack, auc, None, rate, 50, others)


def test_means_are_over_seeds_of_means_over_victims():
    rows = [row(seed=0, victim=0, auc=0.4), row(seed=0, victim=1, auc=0.6), row(seed=1, auc=0.8)]
    both = score_of(rows, "auc")
    assert both.mean == pytest.approx(0.65)
    assert both.std == pytest.approx(0.3 / 2**0.5)
    one = score_of(rows[:2], "auc")
    assert (one.mean, one.std) == (pytest.approx(0.5), pytest.approx(0.02**0.5))


def test_the_table_says_what_cannot_be_measured():
    text = markdown([row(rate=0.25), row(attack="lira", auc=0.75, rate=0.5)])
    assert "| frepo | 10 | 5 | 80.0 | 90.0 | 0.500 | 0.750 |" in text
    assert "| frepo | 0.1 % | - | - |" in text
    assert "| frepo | 1 % | 25.0 | 50.0 |" in text
    assert "0.1 % cannot be measured" in text
    assert "0.1 % is 1 false positive" in markdown([row(others=1000)])


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [5, 2]}, "lengths must be increasing"),
        ({"lengths": []}, "lengths must be increasing"),
        ({"victims": 0}, "victims must be at least 1"),
        ({"attacks": ["threshhold"]}, "unknown attack 'threshhold'; did you mean 'threshold'"),
        ({"shadows": 3}, "shadows must be 0 or an even number from 4, got 3"),
        ({"distil_shadows": 2}, "distil_shadows must be 0 or an even number"),
        ({"members": 40}, "TinyData has 36 training images: too few"),
        ({"members": 4}, "folds must be at least 2 with 4 . folds members.*got 2 folds for 4"),
        ({"data": "TinyDat"}, "unknown data set 'TinyDat'; did you mean 'TinyData'"),
        ({"architecture": "conv:depth=9"}, "too small for depth 9"),
        ({"augment": "flop"}, "unknown augmentation 'flop'"),
        ({"methods": {"a": ["a.safetensors", "b.safetensors"]}}, "2 distilled sets for 1 seeds"),
        ({"methods": {"a": "none.safetensors"}}, "no such file"),
        ({"methods": {"a": ["none.yaml"]}}, "methods.a: unknown configuration 'none.yaml'"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_mistakes_are_one_line(tiny, config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        run_membership(experiment(config, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [[], ["--model.ipc=1"], ["a.yaml", "b.safetensors"], ["b.safetensors", "--x=1"]])
def test_a_method_is_files_of_one_kind(words):
    with pytest.raises(UserError, match=r"methods\.mine must be .* or distilled-set files, got"):
        Method.parse("mine", words, finished=True)


def test_a_method_cannot_have_the_name_of_a_source_of_victims():
    with pytest.raises(UserError, match="a name is letters, digits, _ and -, got 'real members'"):
        Method.parse(REAL, ["a.safetensors"], finished=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: learned_attack("forrest", s, s), "unknown learned attack 'forrest'; did you mean 'forest'"),
        (lambda s: learned_attack("mlp", s, s, folds=9), "4 . folds members"),
        (lambda s: learned_attack("mlp", s, s * np.nan), "NaN or infinite"),
        (lambda s: lira(np.zeros(3), np.zeros((4, 3)), np.zeros((4, 3), bool), "on"), "online, offline"),
        (lambda s: lira(np.zeros(3), np.zeros((4, 2)), np.zeros((4, 2), bool)), "shapes disagree"),
        (lambda s: lira(np.zeros(3), np.zeros((4, 3)), np.zeros((4, 3), bool)), "0 IN models of 4"),
    ],
)
def test_attacks_say_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call(random_answers(30, np.random.default_rng(0)))


def test_the_verb(tiny, config, tmp_path, capsys):
    settings = {
        "data": "TinyData",
        "members": 18,
        "methods": {"frepo": [config, "--trainer.max_steps=2"]},
        "lengths": [2],
        "victims": 1,
        "architecture": SMALL,
        "attacks": ["threshold"],
        "accelerator": "cpu",
    }
    path = tmp_path / "membership.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["membership", "--config", str(path), "--output=report", "--real_augment=none"]) == 0
    saved = json.loads(Path("report/results.json").read_text())
    assert {record["source"] for record in saved} == {
        REAL,
        f"{RANDOM}, ipc 1",
        f"{RANDOM}, ipc 1 (own images)",
        "frepo",
    }
    assert DistilledSet.load("report/distilled/frepo-0/last.safetensors").training["outer_step"] == 2
    capsys.readouterr()
    assert main(["membership", "--config", str(path), "--output=report", "--lengths=[3, 2]"]) == 2
    assert capsys.readouterr().err.startswith("lightning-dd: error: lengths must be increasing")
