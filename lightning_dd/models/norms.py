"""Exchanging the batch normalisation of a library's network for one that does not look at other images."""

from typing import Any, cast

import torch
from torch import nn

from lightning_dd.models.convnet import NORMS, make_norm
from lightning_dd.utils.errors import UserError, unknown_name

_GROUPS = 32


def exchange_batch_norm(name: str, model: nn.Module, norm: str | None) -> None:
    """Replace every batch normalisation of a network in place.

    A student that sees ten images per step learns statistics of those ten images, and is tested with them on real
    ones. The literature's ResNet18 and VGG11 therefore normalise every image alone (DC, arXiv 2006.05929) or not at all
    (FRePo, arXiv 2206.00719). Scale and shift start as the library starts those of the layer that goes; an activation
    that the layer applies itself is kept.

    Args:
        name: what to call the network in an error message.
        model: a network of timm or torchvision.
        norm: ``instance`` (a group per channel), ``group`` (up to 32 groups), ``layer`` (one group), ``none``, or
            ``batch``, which changes nothing; so does None.

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
    new = make_norm(norm, old.num_features, _GROUPS, momentum=0.1)
    if isinstance(new, nn.GroupNorm):
        new.eps = old.eps
        with torch.no_grad():
            new.weight.copy_(old.weight)
            new.bias.copy_(old.bias)
    # timm has layers that normalise and activate in one
    activation = [cast(nn.Module, old.act)] if hasattr(old, "act") else []
    return nn.Sequential(new, *activation) if activation else new
