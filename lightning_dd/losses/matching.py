"""What the methods minimise that match statistics of real data: gradients, mean features, batch normalisation's.

Everything here is computed in at least float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_dd.losses.gradients import wide

_EPSILON = 1e-6
_SMALLEST = 1e-12  # below a root, whose slope at 0 is infinite


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
            a, b = wide(own).flatten(1), wide(target).flatten(1)
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
        own, target = (wide(part).reshape(num_classes, -1, part.shape[1]).mean(1) for part in (synthetic, real))
        return (own - target).square().sum()


def class_mmd(synthetic: Tensor, real: Tensor, num_classes: int) -> Tensor:
    """Sum over classes of the squared maximum mean discrepancy of features (M3D, Zhang et al. 2024, arXiv 2312.15927).

    ``sum_c mean k(s, s') + mean k(x, x') - 2 mean k(s, x)`` with ``k(a, b) = exp(-|a - b|^2 / m_c)``, and as m_c the
    median of the squared distances between any two images of the class, real or synthetic; it has no graph. All
    moments of the features count, the farther ones less.

    Args:
        synthetic: features ``(num_classes * n, p)`` in blocks of one size by class.
        real: features ``(num_classes * B, p)``, likewise.
        num_classes: number of classes.

    Returns:
        A scalar from 0 to ``2 * num_classes``.

    Example:
        >>> class_mmd(torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0]]), 1)  # 1 + (1 + e^-4) / 2 - 2 e^-1
        tensor(0.7734)
    """
    with torch.autocast(synthetic.device.type, enabled=False):
        own, target = (wide(part).reshape(num_classes, -1, part.shape[1]) for part in (synthetic, real))
        both = torch.cat([own, target], 1)
        both = both - target.mean(1, keepdim=True)  # no distance changes, and fewer digits cancel
        norms = both.square().sum(2)
        squared = (norms[:, :, None] + norms[:, None] - 2 * both @ both.transpose(1, 2)).clamp(min=0)
        first, second = torch.triu_indices(both.shape[1], both.shape[1], 1, device=both.device)
        median = squared.detach()[:, first, second].median(1).values.clamp(min=_EPSILON)
        few, many = own.shape[1], target.shape[1]
        signs = torch.cat([own.new_full((few,), 1 / few), own.new_full((many,), -1 / many)])
        return torch.einsum("i,cij,j->", signs, torch.exp(-squared / median[:, None, None]), signs)


def class_characteristic_distance(
    synthetic: Tensor, real: Tensor, num_classes: int, frequencies: Tensor, amplitude: float = 0.5
) -> Tensor:
    """Sum over classes of the distance of characteristic functions (NCFM, Wang et al. 2025, arXiv 2502.20653).

    With ``phi(t) = mean exp(i <t, f>)`` over a class's features f of unit length, s synthetic and x real ones:
    ``sum_c mean_t sqrt(a (|phi_s| - |phi_x|)^2 + (1 - a) 2 (|phi_s| |phi_x| - Re phi_s conj(phi_x)))``. The first part
    compares amplitudes, how spread features are, the second phases, where they are. The paper also learns the
    frequencies, against the images; here they are given.

    Args:
        synthetic: features ``(num_classes * n, p)`` in blocks of one size by class.
        real: features ``(num_classes * B, p)``, likewise.
        num_classes: number of classes.
        frequencies: ``(K, p)``, as standard normal numbers.
        amplitude: share a of the amplitudes, in [0, 1].

    Returns:
        A scalar.

    Example:
        >>> features, t = torch.eye(2), torch.tensor([[3.0, 0.0]])  # exp(3 i) and 1
        >>> class_characteristic_distance(features[:1], features[1:], 1, t)  # sin(3 / 2) * sqrt(2)
        tensor(1.4107)
    """
    with torch.autocast(synthetic.device.type, enabled=False):
        parts = []
        for features in (synthetic, real):
            angles = F.normalize(wide(features), dim=1) @ wide(frequencies).T
            angles = angles.reshape(num_classes, -1, len(frequencies))
            parts.append((angles.cos().mean(1), angles.sin().mean(1)))
        (own_re, own_im), (re, im) = parts
        own, target = ((x.square() + y.square()).clamp(min=_SMALLEST).sqrt() for x, y in parts)
        amplitudes, phases = (own - target).square(), 2 * (own * target - own_re * re - own_im * im)
        return (amplitude * amplitudes + (1 - amplitude) * phases).clamp(min=_SMALLEST).sqrt().mean(1).sum()


def batch_norm_layers(network: nn.Module) -> list[_BatchNorm]:
    """Return the layers of batch normalisation that keep running statistics."""
    return [
        module for module in network.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@contextmanager
def batch_statistics(network: nn.Module, remember: bool = True) -> Iterator[bool]:
    """Within the block, let batch normalisation use the statistics of its batch.

    Args:
        network: in inference mode, as it is afterwards.
        remember: take them into the running statistics, too.

    Yields:
        Whether the network has any.
    """
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = layer.momentum if remember else 0.0
    try:
        yield bool(layers)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.eval()
            layer.momentum = momentum


class StatisticsDistance:
    """The distance between statistics at the inputs of batch normalisation and the running ones, layer by layer.

    SRe2L (Yin et al. 2023, arXiv 2306.13092, eq. 8; DeepInversion, Yin et al. 2020):
    ``sum_l w_l (||mean_l(x) - running_mean_l||_2 + ||var_l(x) - running_var_l||_2)``, with the biased variance,
    over all samples and places of a batch, and ``w_l = 1`` but for the first layer that is called. Several groups may
    share a forward pass: each has its own statistics, and the distances are summed.

    Args:
        groups: consecutive parts of equal size the batch consists of.
        first_weight: weight of the first layer.
    """

    def __init__(self, groups: int = 1, first_weight: float = 10.0) -> None:
        self.groups = groups
        self.first_weight = first_weight
        self._distances: list[Tensor] = []

    @contextmanager
    def watch(self, network: nn.Module) -> Iterator[None]:
        """Look at the layers' inputs during a forward pass of a network in inference mode."""
        handles = [layer.register_forward_pre_hook(self._add) for layer in batch_norm_layers(network)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def total(self) -> Tensor:
        """Return the weighted sum over the layers seen, with graph.

        Raises:
            RuntimeError: no layer was seen.
        """
        if not self._distances:
            raise RuntimeError("no layer of batch normalisation was called")
        first, *others = self._distances
        return torch.stack([self.first_weight * first, *others]).sum()

    def _add(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        running = [cast(Tensor, statistic).float() for statistic in (layer.running_mean, layer.running_var)]
        inputs: Tensor = arguments[0]
        with torch.autocast(inputs.device.type, enabled=False):
            # (groups, samples, channels, places)
            grouped = inputs.float().reshape(self.groups, len(inputs) // self.groups, inputs.shape[1], -1)
            variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
            distances = [
                torch.linalg.vector_norm(own - kept, dim=1) for own, kept in zip((mean, variance), running, strict=True)
            ]
            self._distances.append(torch.stack(distances).sum())
