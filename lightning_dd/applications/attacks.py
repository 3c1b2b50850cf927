"""Membership-inference attacks on the outputs of any classifier: numpy, scipy and scikit-learn alone.

An attacker is shown what a victim answers for a sample and guesses whether the victim learned from it. Attacks are
judged by the ROC curve of their scores: by its area (0.5 means that nothing leaks), and by the true-positive rate at a
very low false-positive rate, which Carlini et al. (2022, arXiv 2112.03570) show to be the honest measure: an attack
that is right about a few people and silent on the others has an area near 0.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from lightning_dd.utils.errors import UserError, unknown_name

Array = NDArray[Any]

GRIDS: dict[str, dict[str, list[Any]]] = {
    "logistic": {"C": [0.01, 1.0, 100.0]},
    "mlp": {"hidden_layer_sizes": [(16,), (64,)], "alpha": [1e-4]},
    "forest": {"min_samples_leaf": [5, 25]},
    "neighbours": {"n_neighbors": [5, 25, 100]},
}
"""Settings tried for each learned attacker; everything else is fixed in :func:`_estimator`."""
MODES = ("online", "offline")
_SMALLEST_STD = 1e-6
_FEW = 64
"""Below so many shadow models LiRA's paper pools the variances of all samples."""


@dataclass(frozen=True)
class AttackResult:
    """How well membership scores tell members from non-members."""

    auc: float
    """Area under the ROC curve, ties counted half."""
    tpr_at: dict[float, float | None]
    """Largest true-positive rate at a false-positive rate of at most the key; ``None`` below the resolution."""
    members: int
    non_members: int


def judge(member_scores: Array, non_member_scores: Array, fprs: Sequence[float] = (0.001, 0.01)) -> AttackResult:
    """Judge membership scores, larger meaning "member", by their ROC curve.

    A rate below ``1 / non-members`` cannot be measured: one false positive is more than it allows.

    Args:
        member_scores: ``(M,)``.
        non_member_scores: ``(N,)``.
        fprs: false-positive rates in (0, 1).

    Example:
        >>> judge(np.array([3.0, 2.0]), np.array([1.0, 2.0]), fprs=(0.5, 0.1))
        AttackResult(auc=0.875, tpr_at={0.5: 1.0, 0.1: None}, members=2, non_members=2)
    """
    truth = np.repeat([1, 0], [len(member_scores), len(non_member_scores)])
    scores = np.concatenate([member_scores, non_member_scores])
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    tpr_at = {
        rate: float(tpr[fpr <= rate + 1e-12].max()) if rate * len(non_member_scores) >= 1 - 1e-9 else None
        for rate in fprs
    }
    return AttackResult(float(roc_auc_score(truth, scores)), tpr_at, len(member_scores), len(non_member_scores))


def threshold_attack(member_losses: Array, non_member_losses: Array) -> AttackResult:
    """Call samples of low loss members (Yeom et al. 2018, arXiv 1709.01604); losses are ``(M,)`` and ``(N,)``."""
    return judge(-member_losses, -non_member_losses)


def learned_attack(
    kind: str, members: Array, non_members: Array, seed: int = 0, folds: int = 5, rows: int | None = None
) -> AttackResult:
    """Let a classifier learn from some samples who is a member, and judge it on the others.

    This is the idea of Shokri et al. (2017, arXiv 1610.05820) in the strong form FRePo's experiment uses: the attacker
    knows some true members and non-members. As many samples are drawn from either side. Every one is scored by a
    classifier that has not seen it (stratified K-fold, predictions of all folds judged together, which reads a shade
    below 0.5 where there is nothing to find); in each fold the setting of :data:`GRIDS` is the one with the best area
    on a quarter of the fold's training part, and is then trained on all of that part.

    Args:
        kind: ``logistic``, ``mlp``, ``forest`` or ``neighbours``.
        members: what the attacker sees of each member ``(M, F)``: the victim's logits and its loss, say.
        non_members: likewise ``(N, F)``.
        seed: of the draw, the folds and the classifiers.
        folds: K, at least 2.
        rows: samples from either side, at most the smaller one's size; ``None`` takes that.

    Raises:
        UserError: the kind is unknown, there are too few samples, or a feature is not finite.
    """
    if kind not in GRIDS:
        raise unknown_name("learned attack", kind, GRIDS)
    size = min(len(members), len(non_members), *([] if rows is None else [rows]))
    if folds < 2 or size < 4 * folds:
        raise UserError(
            f"a learned attack needs folds >= 2 and 4 * folds members and non-members, got {folds} folds and "
            f"{size} of each"
        )
    random = np.random.default_rng(seed)
    chosen = [part[np.sort(random.permutation(len(part))[:size])] for part in (members, non_members)]
    features, truth = np.concatenate(chosen).astype(np.float64), np.repeat([1, 0], size)
    if not np.isfinite(features).all():
        raise UserError("a learned attack's features hold NaN or infinite values")
    fewest = 2 * size - -(-2 * size // folds)  # rows of the smallest training part
    search = GridSearchCV(
        Pipeline([("scale", StandardScaler()), ("model", _estimator(kind, seed, fewest))]),
        # No more neighbours than the inner training part has rows.
        {
            f"model__{name}": [value for value in values if name != "n_neighbors" or value <= 3 * fewest // 4]
            for name, values in GRIDS[kind].items()
        },
        scoring="roc_auc",
        cv=StratifiedShuffleSplit(1, test_size=0.25, random_state=seed),
    )
    outer = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scores = cross_val_predict(search, features, truth, cv=outer, method="predict_proba")[:, 1]
    return judge(scores[:size], scores[size:])


def _estimator(kind: str, seed: int, rows: int) -> Any:
    if kind == "logistic":
        return LogisticRegression(max_iter=1000)
    if kind == "mlp":
        stops = rows >= 40  # else the tenth it is stopped by would not hold both sides
        return MLPClassifier(learning_rate_init=3e-3, max_iter=200, early_stopping=stops, random_state=seed)
    if kind == "forest":
        return RandomForestClassifier(50, max_features="sqrt", random_state=seed)
    return KNeighborsClassifier()


def scaled_confidence(logits: Array, labels: Array) -> Array:
    """Return the logit-scaled confidence ``phi = log p_y - log sum_{y' != y} p_y'`` (stable), ``(..., N)``.

    With softmax probabilities this is the true class's logit minus the log-sum-exp of the others, and nearly normally
    distributed over models.

    Args:
        logits: ``(..., N, C)``, C at least 2.
        labels: ``(N,)`` true classes.

    Example:
        >>> float(scaled_confidence(np.array([[3.0, 1.0]]), np.array([0]))[0])
        2.0
    """
    wide = np.asarray(logits, dtype=np.float64)
    true = np.arange(wide.shape[-1]) == labels[:, None]
    result: Array = np.where(true, wide, 0.0).sum(-1) - logsumexp(np.where(true, -np.inf, wide), axis=-1)
    return result


def lira(victim: Array, shadows: Array, inside: NDArray[np.bool_], mode: str = "online") -> Array:
    """Return LiRA's membership score per sample, larger meaning "member" (Carlini et al. 2022, arXiv 2112.03570).

    Shadow models are trained like the victim on random halves of a pool, so for every sample there are some that
    learned from it (IN) and others that did not (OUT). ``online`` is the log-likelihood ratio
    ``log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out)``. ``offline`` looks at OUT models alone:
    ``(phi - mu_out) / s_out``, monotone in the paper's one-sided probability. With fewer than 64 shadow models there is
    one variance within samples for IN and one for OUT, as the paper advises, instead of one per sample.

    Args:
        victim: phi of the victim ``(N,)``, see :func:`scaled_confidence`.
        shadows: phi of S shadow models ``(S, N)``.
        inside: ``(S, N)``, whether the shadow model learned from the sample.
        mode: ``online`` or ``offline``.

    Raises:
        UserError: shapes disagree, the mode is unknown, or a sample has too few IN or OUT models.
    """
    if mode not in MODES:
        raise UserError(f"LiRA's mode must be one of {', '.join(MODES)}, got '{mode}'")
    if shadows.shape != inside.shape or shadows.shape[1:] != victim.shape:
        raise UserError(f"LiRA: shapes disagree: victim {victim.shape}, shadows {shadows.shape}, inside {inside.shape}")
    pooled = len(shadows) < _FEW
    mean_out, std_out = _normals(shadows, ~inside, pooled, "OUT")
    if mode == "offline":
        result: Array = (victim - mean_out) / std_out
        return result
    mean_in, std_in = _normals(shadows, inside, pooled, "IN")
    ratio: Array = norm.logpdf(victim, mean_in, std_in) - norm.logpdf(victim, mean_out, std_out)
    return ratio


def _normals(values: Array, chosen: NDArray[np.bool_], pooled: bool, side: str) -> tuple[Array, Array]:
    """Return mean and standard deviation ``(N,)`` of the chosen values of each column."""
    counts = chosen.sum(0)
    fewest = 1 if pooled else 2
    freedom = np.maximum(counts - 1, 0)
    if counts.min() < fewest or freedom.sum() == 0:
        raise UserError(
            f"LiRA: a sample has {counts.min()} {side} models of {len(values)}; train more shadow models (4 or more)"
        )
    mean = np.where(chosen, values, 0.0).sum(0) / counts
    squares = np.where(chosen, (values - mean) ** 2, 0.0).sum(0)
    variance = np.full(counts.shape, squares.sum() / freedom.sum()) if pooled else squares / freedom
    return mean, np.maximum(np.sqrt(variance), _SMALLEST_STD)
