"""Layers of normalisation by name, and the exchange of a library's batch normalisation for one of them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.utils.errors import UserError, unknown_name

NORMS = ("batch", "instance", "group", "layer", "none")


class _GroupNorm(nn.GroupNorm):
    """Group normalisation that avoids a slow kernel.

    On a CPU, eager and in half precision, the backward of channels-last maps is so slow that converting them first
    makes a whole training step of ``convnet`` three times as fast.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        if input.device.type == "cpu" and input.dtype != torch.float32 and not torch.compiler.is_compiling():
            input = input.contiguous()
        return super().forward(input)


def make_norm(norm: str, channels: int, groups: int, momentum: float) -> nn.Module:
    """Return a normalisation layer for maps ``(N, channels, H, W)``.

    Args:
        norm: ``batch``, ``instance`` (GroupNorm with a group per channel, with scale and shift), ``group``, ``layer``
            (one group) or ``none``.
        channels: number of channels.
        groups: for ``group``, the number of groups; the greatest common divisor with ``channels`` is taken.
        momentum: for ``batch``, the fraction of the new statistic that enters the running one.

    Raises:
        UserError: the name is unknown.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels, momentum=momentum)
    if norm == "none":
        return nn.Identity()
    by_name = {"instance": channels, "group": math.gcd(groups, channels), "layer": 1}
    if norm not in by_name:
        raise unknown_name("norm", str(norm), NORMS)
    return _GroupNorm(by_name[norm], channels)


def exchange_batch_norm(name: str, model: nn.Module, norm: str | None) -> None:
    """Replace every batch normalisation of a library's network in place.

    A student that sees ten images per step learns statistics of those ten images, and is tested with them on real
    ones. The literature's ResNet18 and VGG11 therefore normalise every image alone (DC, arXiv 2006.05929) or not at all
    (FRePo, arXiv 2206.00719). Scale and shift start as the library starts those of the layer that goes; an activation
    that the layer applies itself is kept.

    Args:
        name: what to call the network in an error message.
        model: a network of timm or torchvision.
        norm: see :func:`make_norm`; ``group`` makes up to 32 groups, ``batch`` and None change nothing.

    Raises:
        UserError: the norm is unknown, or the network has no batch normalisation.
    """
    if norm is None:
        return
    if norm not in NORMS:
        raise unknown_name(f"norm of architecture '{name}'", str(norm), NORMS)
    layers = [(key, layer) for key, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    if not layers:
        raise UserError(f"architecture '{name}' has no batch normalisation, so option 'norm' cannot replace it")
    for key, old in layers if norm != "batch" else []:
        model.set_submodule(key, _replacement(old, norm))


def _replacement(old: Any, norm: str) -> nn.Module:
    new = make_norm(norm, old.num_features, groups=32, momentum=0.1)
    if isinstance(new, nn.GroupNorm):
        new.eps = old.eps
        new.load_state_dict({"weight": old.weight, "bias": old.bias})
    # timm has layers that normalise and activate in one
    return nn.Sequential(new, old.act) if hasattr(old, "act") else new
