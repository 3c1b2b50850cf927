"""Membership-inference attacks on the outputs of any classifier: numpy and scikit-learn alone.

An attacker is shown what a victim answers for a sample and guesses whether the victim learned from it. All attacks
return a membership score per sample, judged by the ROC curve over members and non-members: its area (0.5 means that
nothing leaks), and the true-positive rate at a very low false-positive rate, which Carlini et al. (2022,
arXiv 2112.03570) show to be the honest measure: an attack that is right about a few people and silent on the others
has an area near 0.5.

The learned attackers follow the idea of Shokri et al. (2017, arXiv 1610.05820) in the strong form FRePo's experiment
uses: the attacker knows some true members and non-members and is tested on others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from lightning_dd.utils.errors import UserError, unknown_name

Array = NDArray[Any]

FPRS = (0.001, 0.01)
"""False-positive rates at which the true-positive rate is reported."""
GRIDS: dict[str, dict[str, list[Any]]] = {
    "logistic": {"C": [0.01, 1.0, 100.0]},
    "mlp": {"hidden_layer_sizes": [(16,), (64,)], "alpha": [1e-4]},
    "forest": {"min_samples_leaf": [5, 25]},
    "neighbours": {"n_neighbors": [5, 25, 100]},
}
"""Settings tried for each learned attacker; everything else is fixed in :func:`_estimator`."""


@dataclass(frozen=True)
class Scores:
    """What a victim answers for N samples.

    Args:
        logits: ``(N, C)``.
        losses: ``(N,)``, the victim's own loss of each sample.
        labels: ``(N,)`` true classes.

    Raises:
        UserError: shapes disagree, nothing is there, or a value is not finite.
    """

    logits: Array
    losses: Array
    labels: Array

    def __post_init__(self) -> None:
        rows = len(self.losses)
        if self.logits.ndim != 2 or rows == 0 or len(self.logits) != rows or self.labels.shape != (rows,):
            raise UserError(
                f"scores: expected logits (N, C), losses (N,) and labels (N,) with N > 0, got "
                f"{self.logits.shape}, {self.losses.shape} and {self.labels.shape}"
            )
        if not (np.isfinite(self.logits).all() and np.isfinite(self.losses).all()):
            raise UserError("scores: logits or losses hold NaN or infinite values")

    @classmethod
    def from_logits(cls, logits: Array, labels: Array) -> "Scores":
        """Take the cross-entropy as the loss: for victims that are classifiers of any kind.

        Example:
            >>> Scores.from_logits(np.zeros((1, 2)), np.array([0])).losses.round(3)
            array([0.693])
        """
        return cls(logits, logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels], labels)

    def __len__(self) -> int:
        return len(self.losses)

    def features(self) -> Array:
        """What a learned attacker sees: the logits and the loss, ``(N, C + 1)``."""
        return np.column_stack([self.logits, self.losses]).astype(np.float64)

    def take(self, rows: Array) -> "Scores":
        """Return some of the samples, by index or mask."""
        return Scores(self.logits[rows], self.losses[rows], self.labels[rows])


@dataclass(frozen=True)
class AttackResult:
    """How well membership scores tell members from non-members."""

    auc: float
    """Area under the ROC curve, ties counted half."""
    tpr_at: dict[float, float | None]
    """Largest true-positive rate at a false-positive rate of at most the key; ``None`` below the resolution."""
    members: int
    non_members: int

    @property
    def resolution(self) -> float:
        """Smallest false-positive rate above 0 that so many non-members can show."""
        return 1 / self.non_members


def judge(member_scores: Array, non_member_scores: Array, fprs: Sequence[float] = FPRS) -> AttackResult:
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


def threshold_attack(member_losses: Array, non_member_losses: Array, fprs: Sequence[float] = FPRS) -> AttackResult:
    """Call samples of low loss members (Yeom et al. 2018, arXiv 1709.01604); there is nothing to learn.

    Args:
        member_losses: ``(M,)``.
        non_member_losses: ``(N,)``.
        fprs: see :func:`judge`.
    """
    return judge(-member_losses, -non_member_losses, fprs)


def learned_attack(
    kind: str,
    members: Scores,
    non_members: Scores,
    seed: int = 0,
    folds: int = 5,
    fprs: Sequence[float] = FPRS,
    rows: int | None = None,
) -> AttackResult:
    """Let a classifier learn from some samples who is a member, and judge it on the others.

    As many samples are drawn from either side. Every one is scored by a classifier that has not seen it (stratified
    K-fold, predictions of all folds judged together, which reads a shade below 0.5 where there is nothing to find); in
    each fold the setting of :data:`GRIDS` is the one with the best area on a quarter of the fold's training part, and
    is then trained on all of that part.

    Args:
        kind: ``logistic``, ``mlp``, ``forest`` or ``neighbours``.
        members: what the victim answers for members.
        non_members: and for others.
        seed: of the draw, the folds and the classifiers.
        folds: K, at least 2.
        fprs: see :func:`judge`.
        rows: samples from either side, at most the smaller one's size; ``None`` takes that.

    Raises:
        UserError: the kind is unknown or there are too few samples.
    """
    if kind not in GRIDS:
        raise unknown_name("learned attack", kind, GRIDS)
    size = min(len(members), len(non_members))
    size = size if rows is None else min(rows, size)
    if folds < 2 or size < 4 * folds:
        raise UserError(
            f"a learned attack needs folds >= 2 and 4 * folds members and non-members, got {folds} folds and "
            f"{size} of each"
        )
    random = np.random.default_rng(seed)
    chosen = [part.take(np.sort(random.permutation(len(part))[:size])) for part in (members, non_members)]
    features = np.concatenate([part.features() for part in chosen])
    truth = np.repeat([1, 0], size)
    scores = np.empty(2 * size)
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, truth):
        search = GridSearchCV(
            Pipeline([("scale", StandardScaler()), ("model", _estimator(kind, seed, len(train)))]),
            {f"model__{name}": values for name, values in _grid(kind, len(train)).items()},
            scoring="roc_auc",
            cv=StratifiedShuffleSplit(1, test_size=0.25, random_state=seed),
        )
        search.fit(features[train], truth[train])
        scores[test] = search.predict_proba(features[test])[:, 1]
    return judge(scores[:size], scores[size:], fprs)


def _estimator(kind: str, seed: int, rows: int) -> Any:
    if kind == "logistic":
        return LogisticRegression(max_iter=1000)
    if kind == "mlp":
        stops = rows >= 40  # else the tenth it is stopped by would not hold both sides
        return MLPClassifier(learning_rate_init=3e-3, max_iter=200, early_stopping=stops, random_state=seed)
    if kind == "forest":
        return RandomForestClassifier(50, max_features="sqrt", random_state=seed)
    return KNeighborsClassifier()


def _grid(kind: str, rows: int) -> dict[str, list[Any]]:
    """The kind's grid, without more neighbours than the inner training part has rows."""
    grid = GRIDS[kind]
    if kind == "neighbours":
        most = (3 * rows) // 4
        return {"n_neighbors": [count for count in grid["n_neighbors"] if count <= most]}
    return grid
