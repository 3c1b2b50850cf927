"""Greedy choices of representative rows in a feature space."""

import torch
from torch import Tensor


def herding(features: Tensor, count: int) -> Tensor:
    """Choose rows whose mean follows the mean of all (Welling 2009; iCaRL, Rebuffi et al. 2017).

    The k-th choice is the row phi that minimises ``|| mean - (sum of chosen + phi) / k ||``; no row is chosen twice.

    Args:
        features: ``(N, p)``.
        count: at most N.

    Returns:
        ``(count,)`` int64, in the order of choice.

    Example:
        >>> herding(torch.tensor([[0.0], [1.0], [5.0]]), 2)
        tensor([1, 2])
    """
    wide = features.double()
    mean = wide.mean(0)
    total = torch.zeros_like(mean)
    taken = torch.zeros(len(wide), dtype=torch.bool, device=wide.device)
    chosen = []
    for size in range(1, count + 1):
        distance = (mean - (total + wide) / size).square().sum(1).masked_fill(taken, torch.inf)
        best = distance.argmin()
        chosen.append(best)
        taken[best] = True
        total = total + wide[best]
    return torch.stack(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """Choose rows farthest first: each next one is the farthest from those chosen (Gonzalez 1985).

    The first is the row nearest the mean. What is taken and returned has the shapes of :func:`herding`.

    Example:
        >>> k_center(torch.tensor([[0.0], [1.0], [5.0]]), 2)
        tensor([1, 2])
    """
    wide = features.double()
    chosen = [(wide - wide.mean(0)).square().sum(1).argmin()]
    nearest = (wide - wide[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chosen.append(nearest.argmax())
        nearest = torch.minimum(nearest, (wide - wide[chosen[-1]]).square().sum(1))
    return torch.stack(chosen)
