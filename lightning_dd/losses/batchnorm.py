"""How far the statistics of a batch are from those a network's batch normalisation remembers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_layers(network: nn.Module) -> list[_BatchNorm]:
    """Return the layers of batch normalisation that keep running statistics."""
    return [
        module for module in network.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


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
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        inputs: Tensor = arguments[0]
        with torch.autocast(inputs.device.type, enabled=False):
            # (groups, samples, channels, places)
            grouped = inputs.float().reshape(self.groups, len(inputs) // self.groups, inputs.shape[1], -1)
            variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
            distances = [
                torch.linalg.vector_norm(own - kept.float(), dim=1)
                for own, kept in ((mean, layer.running_mean), (variance, layer.running_var))
            ]
            self._distances.append(torch.stack(distances).sum())
