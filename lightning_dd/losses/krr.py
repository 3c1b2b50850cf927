"""Kernel ridge regression on network features, FRePo's objective (Zhou et al. 2022, arXiv 2206.00719), and its labels.

Everything here runs outside autocast. The Gram matrix of the synthetic set and the solve are in float64: its
condition number grows without bound as rows become near duplicates, and at float32 the ridge (1e-6 of the mean
diagonal) is below the rounding error of the product itself.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dd.utils.errors import UserError

RIDGE = 1e-6
"""FRePo's ridge, relative to the mean diagonal of the kernel."""
LABEL_KINDS = ("learned", "centred", "hard")
"""Labels of a synthetic set: ``learned`` and ``centred`` are regression targets around 0, ``hard`` ones one-hot."""

_ESCALATIONS = 5


class SolveError(UserError):
    """The kernel could not be factorised even with a much larger ridge: features are NaN, infinite or all zero."""


class KRRPrediction(NamedTuple):
    """What kernel ridge regression says of the targets."""

    values: Tensor
    """``(T, C)`` float32 predictions."""
    condition: Tensor
    """Scalar: a lower bound on the condition number of the regularised kernel, without graph."""
    ridge: float
    """The relative ridge that was used: larger than asked for if the factorisation needed it."""


def krr_predict(support: Tensor, support_labels: Tensor, query: Tensor, ridge: float = RIDGE) -> KRRPrediction:
    """Predict ``query`` labels by ridge regression on the support features.

    ``K_qs (K_ss + ridge * tr(K_ss)/n * I)^-1 y_s`` with linear kernels ``K_ab = F_a F_b^T``: no bias feature, no
    centring. The ridge term stays in the graph, as in the paper's code. If the Cholesky factorisation fails the
    ridge is raised tenfold, up to five times. Looking at its outcome is the one device synchronisation per call.

    Args:
        support: synthetic features ``(n, p)``, any float type.
        support_labels: their labels ``(n, C)``.
        query: real features ``(T, p)``.
        ridge: regulariser relative to the mean diagonal.

    Raises:
        SolveError: no ridge tried made the kernel positive definite.

    Example:
        >>> features = torch.eye(2)
        >>> krr_predict(features, torch.tensor([[1.0], [2.0]]), features).values.round(decimals=3)
        tensor([[1.],
                [2.]])
    """
    with torch.autocast(support.device.type, enabled=False):
        wide = support.double()
        weights, condition, used = _Weights.apply(wide, support_labels.double(), ridge)
        # (F_q F_s^T) a = F_q (F_s^T a): the second form never builds the T x n kernel.
        values = query.float() @ (wide.T @ weights).float()
    return KRRPrediction(values, condition, used)


class _Weights(torch.autograd.Function):
    """``a = (F F^T + ridge * tr(F F^T)/n * I)^-1 y``, with its gradient in closed form.

    With ``b`` the solution for the gradient in place of ``y``, the gradient of the regularised kernel is ``-b a^T``:
    never built, as its rank is the number of classes. Through Cholesky's own gradient the backward pass of 4,000 rows
    takes thirty times as long.
    """

    @staticmethod
    def forward(ctx: Any, support: Tensor, labels: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
        """Return the weights ``(n, C)``, the condition number's lower bound and the relative ridge that was used."""
        factor, used = _factorise(support, ridge)
        weights = torch.cholesky_solve(labels, factor)
        diagonal = factor.diagonal()
        condition = (diagonal.max() / diagonal.min()) ** 2
        ctx.save_for_backward(support, weights, factor)
        ctx.mark_non_differentiable(condition)
        ctx.relative = used / len(support)
        return weights, condition, used

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of the features ``(n, p)`` and of the labels ``(n, C)``."""
        support, weights, factor = ctx.saved_tensors
        solved = torch.cholesky_solve(gradient, factor)
        to_support = solved @ (weights.T @ support)
        to_support += weights @ (solved.T @ support)
        to_support += 2 * ctx.relative * (solved * weights).sum() * support
        return -to_support, solved, None


def _factorise(support: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return the regularised kernel's Cholesky factor and the relative ridge that was used; float64."""
    gram = support @ support.T
    diagonal = gram.diagonal()
    plain = diagonal.clone()
    mean = plain.mean()
    for escalation in range(_ESCALATIONS + 1):
        used = ridge * 10**escalation
        torch.add(plain, used * mean, out=diagonal)  # in place: a sum with an identity takes three more kernels
        factor, info = torch.linalg.cholesky_ex(gram)
        if not int(info):
            return factor, used
    raise SolveError(
        f"the {len(gram)} x {len(gram)} synthetic kernel is not positive definite even with a ridge of "
        f"{used:g} x its mean diagonal ({float(mean):g}): "
        "the features are NaN, infinite or all zero; a smaller learning rate may help"
    )


def averaged_kernel(features: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return features whose kernel is the mean of several networks' kernels, each divided by its mean diagonal.

    ``K = 1/k sum_i K_i / (tr(K_i,ss) / n)``, which lets networks of unlike scale and width have one say each. It is the
    kernel of their features side by side, each network's divided by the root mean squared norm of its support rows.
    The features of a single network are returned as they are: the ridge is relative, so no prediction changes.

    Args:
        features: of every network the support's ``(n, p_i)`` and the query's ``(T, p_i)``.

    Returns:
        ``(n, sum p_i)`` and ``(T, sum p_i)``.

    Example:
        >>> small, large = torch.tensor([[1.0]]), torch.tensor([[0.0, 100.0]])
        >>> averaged_kernel([(small, small), (large, 2 * large)])
        (tensor([[0.7071, 0.0000, 0.7071]]), tensor([[0.7071, 0.0000, 1.4142]]))
    """
    if len(features) == 1:
        return features[0]
    supports, queries = [], []
    for support, query in features:
        own = support.float()
        scale = (len(features) * own.square().sum(1).mean()).clamp(min=1e-30).rsqrt()
        supports.append(own * scale)
        queries.append(query.float() * scale)
    return torch.cat(supports, dim=1), torch.cat(queries, dim=1)


def half_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of ``1/2 sum_c (prediction_c - target_c)^2``; both ``(N, C)``.

    Example:
        >>> half_squared_error(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]))
        tensor(1.)
    """
    return 0.5 * (prediction.float() - target.float()).square().sum(-1).mean()


def scaled_cross_entropy(prediction: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``softmax(scale * prediction)``; scalar.

    Ridge regression aims at targets that differ by 1, so its predictions as logits are far too flat: their scale is a
    temperature, to be learned with the set. After CLP-DD (arXiv 2605.07194), which finds that the squared error
    as the outer loss falls far behind.

    Args:
        prediction: ``(N, C)``.
        classes: ``(N,)`` int64.
        scale: positive scalar.

    Example:
        >>> scaled_cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor(100.0))
        tensor(0.)
    """
    return torch.nn.functional.cross_entropy(scale * prediction.float(), classes)


def label_margin_loss(labels: Tensor) -> Tensor:
    """Push each learned label to lead by at least ``1/C``: mean of ``-min(top1 - top2, 1/C)``.

    The gradient of a row vanishes once its margin exceeds ``1/C``.

    Args:
        labels: learned labels ``(n, C)``, C >= 2.

    Example:
        >>> label_margin_loss(torch.tensor([[0.9, 0.1], [0.6, 0.5]]))
        tensor(-0.3000)
    """
    return -label_margin(labels).clamp(max=1 / labels.shape[-1]).mean()


def label_margin(labels: Tensor) -> Tensor:
    """Gap between the largest and second largest entry of each row, ``(n,)``."""
    top = labels.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def centred_one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """Regression targets ``onehot - 1/C``, ``(N, C)`` float32, from class indices ``(N,)``.

    Example:
        >>> centred_one_hot(torch.tensor([1]), 2)
        tensor([[-0.5000,  0.5000]])
    """
    return torch.nn.functional.one_hot(classes, num_classes).float() - 1 / num_classes


def initial_labels(classes: Tensor, num_classes: int, label_kind: str) -> Tensor:
    """Return label rows ``(n, num_classes)`` of a kind for class indices ``(n,)``.

    ``learned`` and ``centred`` labels start from FRePo's ``(onehot - 1/C) / sqrt(C/10)`` (Zhou et al. 2022), ``hard``
    ones are one-hot.

    Example:
        >>> initial_labels(torch.tensor([0]), 2, "hard")
        tensor([[1., 0.]])
    """
    if label_kind == "hard":
        one_hot: Tensor = torch.eye(num_classes, device=classes.device)[classes]
        return one_hot
    return centred_one_hot(classes, num_classes) / math.sqrt(num_classes / 10)
