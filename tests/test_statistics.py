"""Nested means and intervals, and paired tests, against independent computations."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lightning_dd.evaluators.matrix import DISTILLED, RANDOM_REAL, Row
from lightning_dd.evaluators.report import compare, markdown
from lightning_dd.statistics import gain_interval, nested_score, paired_difference


def interval(values):
    """The interval of a mean, as of its gain over nothing."""
    return gain_interval(values, {"nothing": [0.0]})


def test_one_set_is_described_by_its_students():
    values = [0.5, 0.6, 0.9]
    score = nested_score({"a": values})
    assert (score.mean, score.std, score.count, score.sets) == (
        pytest.approx(np.mean(values)),
        pytest.approx(np.std(values, ddof=1)),
        3,
        1,
    )
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert interval({"a": values}) == pytest.approx(tuple(expected), abs=0.02)


def test_several_sets_are_described_by_the_spread_of_their_means():
    score = nested_score({"a": [0.5, 0.7], "b": [0.8, 1.0], "c": [0.3]})
    means = [0.6, 0.9, 0.3]
    assert score.mean == pytest.approx(np.mean(means))
    assert score.std == pytest.approx(np.std(means, ddof=1))
    assert (score.count, score.sets) == (5, 3)


def test_the_interval_resamples_sets_and_students():
    # Students agree within a set, so all the spread is between sets: the interval is that of the three means ...
    between = interval({"a": [0.5] * 9, "b": [0.7] * 9, "c": [0.9] * 9})
    assert between == pytest.approx((0.5, 0.9), abs=0.07)
    # ... and not that of 27 students.
    pooled = interval({"all": [0.5] * 9 + [0.7] * 9 + [0.9] * 9})
    assert np.ptp(pooled) < 0.5 * np.ptp(between)
    generator = np.random.default_rng(0)
    sets = [generator.normal(0.5, 0.1, size=4) for _ in range(5)]
    ours = interval({index: list(group) for index, group in enumerate(sets)})
    slow = []
    for _ in range(4000):
        drawn = [sets[index] for index in generator.integers(5, size=5)]
        slow.append(np.mean([generator.choice(group, size=4).mean() for group in drawn]))
    assert ours == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.012)


def test_one_value_has_no_spread():
    assert nested_score({"a": [0.4]}).std == 0.0
    assert str(nested_score({"a": [0.4]})) == "40.0"
    rows = [row("a", None, 0, 0, 0.4), replace(row("a", None, 0, 0, 0.3), source=RANDOM_REAL)]
    table = markdown(rows)
    assert "| 40.0 |" in table
    assert "| +10.0 |" in table
    assert "in %, of one student;" in table
    assert "bootstrap" not in table
    assert interval({"a": [0.4]}) == pytest.approx((0.4, 0.4))


def test_the_gain_of_equal_groups_includes_zero_and_of_distant_ones_does_not():
    values = [0.5, 0.52, 0.55, 0.49]
    low, high = gain_interval({"a": values}, {"b": values})
    assert low < 0 < high
    low, high = gain_interval({"a": values}, {"b": [0.2, 0.25]})
    assert 0.2 < low < high < 0.4


def test_the_paired_test_is_students():
    left, right = {0: 0.50, 1: 0.61, 2: 0.55, 9: 0.1}, {0: 0.48, 1: 0.57, 2: 0.54, 5: 0.9}
    ours = paired_difference(left, right)
    reference = stats.ttest_rel([0.50, 0.61, 0.55], [0.48, 0.57, 0.54])
    interval = reference.confidence_interval(0.95)
    assert ours.pairs == 3
    assert ours.p == pytest.approx(reference.pvalue)
    assert (ours.low, ours.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    with pytest.raises(ValueError, match="share no key"):
        paired_difference({0: 0.5}, {1: 0.5})
    assert str(paired_difference({0: 0.5}, {0: 0.4})) == "+10.0"


def row(name, group, seed, student, accuracy, architecture="vit", seen=False):
    return Row(name, architecture, seen, DISTILLED, student, accuracy, None, None, 1, 1, "X", group, seed)


def test_groups_are_paired_by_distillation_and_single_sets_by_student():
    rows = [
        row(f"{group}{seed}", group, seed, student, 0.5 + 0.1 * seed + shift + 0.01 * student)
        for group, shift in (("plain", 0.0), ("meta", 0.05))
        for seed in range(3)
        for student in range(2)
    ]
    found = compare(rows)["meta"]["unseen"]
    assert (found.pairs, found.mean) == (3, pytest.approx(0.05))
    single = [
        row(name, "", 0, student, base + 0.1 * student)
        for name, base in (("a", 0.2), ("b", 0.3))
        for student in range(4)
    ]
    assert compare(single)["b"]["unseen"].pairs == 4
    assert compare(single[:4]) == {}


def test_seen_is_what_either_of_two_compared_sets_was_distilled_with():
    own = {"a": "conv", "b": "convnet", "c": None}
    rows = [
        row(name, "", 0, student, accuracy, architecture, seen=own[name] == architecture)
        for name in own
        for architecture, accuracy in (("conv", 0.3), ("convnet", 0.6 if name == "c" else 0.4), ("vit", 0.2))
        for student in range(2)
    ]
    found = compare(rows)
    assert found["b"]["unseen"].mean == pytest.approx(0)  # the ViT alone
    assert found["c"]["seen"].mean == pytest.approx(0)  # the first set's
    assert found["c"]["unseen"].mean == pytest.approx((0.2 + 0) / 2)
