"""What gradient matching and distribution matching minimise. Everything here is computed in at least float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-6


def gradient_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over layers and output units of one minus the cosine of two gradients.

    DC's distance (Zhao et al. 2021, arXiv 2006.05929):
    ``sum_l sum_i 1 - <a_li, b_li> / (|a_li| |b_li| + 1e-6)``, where row ``i`` of layer ``l`` holds the gradient of all
    weights into output unit ``i``. Biases and the scales of normalisation layers (one axis) count nothing.

    Args:
        synthetic: gradients by the parameters of a network, of any shapes, with graph.
        real: gradients by the same parameters.

    Returns:
        A scalar.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> gradient_distance([a, torch.ones(2)], [b, torch.zeros(2)])
        tensor(1.0000)
    """
    terms = []
    for own, target in zip(synthetic, real, strict=True):
        if own.ndim < 2:
            continue
        with torch.autocast(own.device.type, enabled=False):
            a, b = _wide(own).flatten(1), _wide(target).flatten(1)
            norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
            terms.append((1 - (a * b).sum(1) / (norms + _EPSILON)).sum())
    return torch.stack(terms).sum()


def class_mean_distance(synthetic: Tensor, real: Tensor, num_classes: int) -> Tensor:
    """Sum over classes of the squared distance of mean features (DM, Zhao & Bilen 2023, arXiv 2110.04181).

    ``sum_c | mean_b f(x_cb) - mean_j f(s_cj) |^2``

    Args:
        synthetic: features ``(num_classes * n, p)`` in blocks of one size by class.
        real: features ``(num_classes * B, p)``, likewise.
        num_classes: number of classes.

    Returns:
        A scalar.

    Example:
        >>> class_mean_distance(torch.tensor([[1.0], [5.0]]), torch.tensor([[0.0], [2.0], [2.0], [2.0]]), 2)
        tensor(9.)
    """
    with torch.autocast(synthetic.device.type, enabled=False):
        own, target = (_wide(part).reshape(num_classes, -1, part.shape[1]).mean(1) for part in (synthetic, real))
        return (own - target).square().sum()


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
