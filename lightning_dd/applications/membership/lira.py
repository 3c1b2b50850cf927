"""LiRA, the likelihood-ratio attack of Carlini et al. (2022, arXiv 2112.03570): numpy and scipy alone.

Shadow models are trained like the victim, each on a random half of a pool. For every sample of the pool this gives
the answers of models that learned from it (IN) and of models that did not (OUT); the attack asks which of two normal
distributions the victim's answer comes from.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm

from lightning_dd.applications.membership.attacks import Array
from lightning_dd.utils.errors import UserError

MODES = ("online", "offline")
_SMALLEST_STD = 1e-6
_FEW = 64
"""Below so many shadow models the paper pools the variances of all samples."""


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
    others = np.where(true, -np.inf, wide)
    own = np.where(true, wide, 0.0).sum(-1)
    result: Array = own - logsumexp(others, axis=-1)
    return result


def lira(
    victim: Array,
    shadows: Array,
    inside: NDArray[np.bool_],
    mode: str = "online",
    pooled_variance: bool | None = None,
) -> Array:
    """Return a membership score per sample, larger meaning "member".

    ``online`` is the log-likelihood ratio ``log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out)``. ``offline`` looks at
    OUT models alone: ``(phi - mu_out) / s_out``, monotone in the paper's one-sided probability.

    Args:
        victim: phi of the victim ``(N,)``, see :func:`scaled_confidence`.
        shadows: phi of S shadow models ``(S, N)``.
        inside: ``(S, N)``, whether the shadow model learned from the sample.
        mode: ``online`` or ``offline``.
        pooled_variance: one variance within samples for IN and one for OUT, instead of one per sample; ``None`` pools
            below 64 shadow models, as the paper advises.

    Raises:
        UserError: shapes disagree, the mode is unknown, or a sample has too few IN or OUT models.
    """
    if mode not in MODES:
        raise UserError(f"LiRA's mode must be one of {', '.join(MODES)}, got '{mode}'")
    if shadows.shape != inside.shape or shadows.shape[1:] != victim.shape:
        raise UserError(f"LiRA: shapes disagree: victim {victim.shape}, shadows {shadows.shape}, inside {inside.shape}")
    pooled = len(shadows) < _FEW if pooled_variance is None else pooled_variance
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
