"""Means, deviations, intervals and paired tests of accuracies that come in nested seeds.

A score varies with the distillation (its seed: initial images, networks, batches) and, within one distilled set, with
the student. Resampling students alone would call two sets of one method different, so intervals resample both levels.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Nested = Mapping[Hashable, Sequence[float]]
"""From a distilled set to the accuracies in [0, 1] of its students."""

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """Accuracy over nested seeds, in [0, 1]."""

    mean: float
    """Mean over sets of the mean over students."""
    std: float
    """Sample standard deviation: over the sets' means, or over students where there is one set; 0 for one value."""
    count: int
    """Number of students."""
    sets: int = 1
    """Number of distilled sets."""

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.std:.1f}" if self.count > 1 else "")


@dataclass(frozen=True)
class Difference:
    """Paired difference of two groups of students, in accuracy."""

    mean: float
    low: float
    """Lower end of the 95 % interval (Student's t over the pairs)."""
    high: float
    p: float
    """Two-sided p-value of the paired t-test; NaN for fewer than two pairs."""
    pairs: int

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{100 * self.mean:+.1f}"
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def nested_score(values: Nested) -> Score:
    """Summarise the accuracies of the students, at least one, of each of one or several distilled sets.

    Example:
        >>> str(nested_score({"a": [0.5, 0.7]})), str(nested_score({"a": [0.5, 0.7], "b": [0.8]}))
        ('60.0 ± 14.1', '70.0 ± 14.1')
    """
    groups = [np.asarray(group, dtype=float) for group in values.values()]
    means = np.array([group.mean() for group in groups])
    spread = means if len(groups) > 1 else groups[0]
    std = float(spread.std(ddof=1)) if len(spread) > 1 else 0.0
    return Score(float(means.mean()), std, count=sum(map(len, groups)), sets=len(groups))


def gain_interval(left: Nested, right: Nested) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of ``mean(left) - mean(right)`` for independent groups."""
    sides = [
        _resampled_means([np.asarray(group, dtype=float) for group in side.values()], seed)
        for seed, side in enumerate((left, right))
    ]
    low, high = np.quantile(sides[0] - sides[1], [0.025, 0.975])
    return float(low), float(high)


def paired_difference(left: Mapping[Hashable, float], right: Mapping[Hashable, float]) -> Difference:
    """Compare two groups of accuracies on the keys they share (a distillation seed, say), at least one: left - right.

    Example:
        >>> str(paired_difference({0: 0.50, 1: 0.60}, {0: 0.48, 1: 0.57}))
        '+2.5 (-3.9 to +8.9)'
    """
    keys = [key for key in left if key in right]
    if not keys:
        raise ValueError("the groups share no key to be paired by")
    differences = np.array([left[key] - right[key] for key in keys])
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Difference(mean, float("nan"), float("nan"), float("nan"), count)
    if not differences.std():
        return Difference(mean, mean, mean, float(mean == 0), count)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, float(low), float(high), float(test.pvalue), count)


def _resampled_means(groups: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Draw sets with replacement, and students with replacement within each: ``(resamples,)`` means."""
    generator = np.random.default_rng(seed)
    means = np.stack(
        [group[generator.integers(len(group), size=(_RESAMPLES, len(group)))].mean(1) for group in groups], axis=1
    )
    if len(groups) == 1:
        return means[:, 0]
    # A set drawn twice within a resample shares its students' draw there, which a fresh one would not; for each place
    # its own resample row is taken, so that places stay independent.
    drawn = generator.integers(len(groups), size=(_RESAMPLES, len(groups)))
    rows = generator.permuted(np.broadcast_to(np.arange(_RESAMPLES)[:, None], drawn.shape), axis=0)
    resampled: np.ndarray = means[rows, drawn].mean(1)
    return resampled
