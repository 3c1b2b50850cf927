"""The MetaDD loss of images, and its exact gradient with one architecture in memory (arXiv 2410.05103, our reading).

The loss depends on the images only through small tensors: each architecture's map on the grid and its logits.
:func:`gathered_loss` first computes all of these without graph, then the loss and its derivatives with respect to
them (for the variance ``2/M (C_m - mean)``), and then runs one architecture after the other once more, with a graph,
to carry its share on to the images. That is the chain rule and nothing else, so every coupling between architectures
is exact and the memory does not grow with their number (the idea of gradient caching, Gao et al. 2021, arXiv
2101.06983). The price is a second forward pass of all but one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_dd.losses.cam import class_activation_map, normalise_maps
from lightning_dd.losses.cam_layers import find_layer
from lightning_dd.losses.gradients import attach_gradients, no_float16, wide
from lightning_dd.losses.metadd import LAYERS, MetaOptions, metadd_loss
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """One of MetaDD's frozen architectures.

    Attributes:
        network: in inference mode, its parameters without gradient.
        adapt: from the images given to the loss, ``(N, C, H, W)``, to the network's own preprocessing,
            differentiable; None if they are the same.
        layer: the module that its map is made of, in place of the last one; None finds it.
        cam: overrides the options' kind of map for this network.
        name: put before error messages.
    """

    network: Network
    adapt: Callable[[Tensor], Tensor] | None = None
    layer: str | None = None
    cam: str | None = None
    name: str = ""


class MetaLoss(NamedTuple):
    """The loss, what it is made of, and the maps it compared."""

    loss: Tensor
    """Scalar, to be added to an objective; with graph to images, labels and consensus where they need gradient."""
    terms: dict[str, Tensor]
    """See :class:`~lightning_dd.losses.metadd.WeightedTerms`."""
    maps: Tensor
    """``(M, N, grid, grid)`` normalised maps without graph; dead ones are zeros. Those of a second layer are N more.
    Empty where none were made."""


class _View(NamedTuple):
    """What one architecture says of the images."""

    maps: Tensor
    alive: Tensor
    logits: Tensor


def gathered_loss(
    architectures: Sequence[Architecture],
    images: Tensor,
    labels: Tensor,
    label_kind: str,
    options: MetaOptions,
    consensus_logits: Tensor | None = None,
    with_maps: bool = True,
) -> MetaLoss:
    """Return the MetaDD loss of images and labels, its gradient gathered one architecture at a time.

    The gradient is computed here and waits for ``backward``, which only scales and passes it on: memory is free
    again when this returns, and gradient scaling, clipping and DDP see an ordinary loss. There is no second
    derivative. Nothing is differentiated when gradients are off.

    Args:
        architectures: at least one.
        images: ``(N, C, H, W)`` as the architectures' ``adapt`` take them.
        labels: ``(N, num_classes)`` rows; ``cam_class: label`` takes the class of their largest entry.
        label_kind: ``learned``, ``centred`` or ``hard``.
        options: the switches.
        consensus_logits: ``(N, num_classes)``, what the distiller's own network returned for these images, for
            ``consensus="distiller"``. With ``detach_consensus=False`` they get their gradient too.
        with_maps: make maps where no term with weight needs them, to be looked at; false saves their time.

    Raises:
        UserError: there is no architecture, one is in training mode or has no map, or the logits of the distiller are
            missing.
    """
    _check(architectures)
    wanted = torch.is_grad_enabled()
    given = (images, labels, consensus_logits)
    needed = [wanted and tensor is not None and tensor.requires_grad for tensor in given]
    with_maps = with_maps or options.needs_maps
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_leaf(tensor, need) for tensor, need in zip(given, needed, strict=True)]
        pixels, rows, consensus = cast(tuple[Tensor, Tensor, Tensor | None], tuple(leaves))
        still = pixels.detach()
        views = [_look(architecture, still, rows, options, with_maps) for architecture in architectures[:-1]]
        views.append(_look(architectures[-1], pixels, rows, options, with_maps))  # the only graph alive: it is kept
        maps, alive, logits = (torch.stack(tensors).detach() for tensors in zip(*views, strict=True))
        maps.requires_grad_(needed[0] and options.uses_maps)
        logits.requires_grad_(needed[0])
        shown, live = (maps, alive) if with_maps else (None, None)
        total, terms = metadd_loss(shown, live, logits, rows, label_kind, options, consensus)
        sources = [tensor for tensor in (maps, logits, rows, consensus) if tensor is not None and tensor.requires_grad]
        found = torch.autograd.grad(total, sources, allow_unused=True) if sources and total.requires_grad else ()
        slope = {id(source): gradient for source, gradient in zip(sources, found, strict=False)}
        gradients = [None, slope.get(id(rows)), slope.get(id(consensus))]
        if needed[0]:
            slopes = slope.get(id(maps)), slope.get(id(logits))
            gradients[0] = _carry(architectures, views.pop(), pixels, rows, options, *slopes)
    made = maps.detach() if with_maps else maps.new_zeros(0)
    return MetaLoss(attach_gradients(total.detach(), given, gradients), terms, made)


def naive_loss(
    architectures: Sequence[Architecture],
    images: Tensor,
    labels: Tensor,
    label_kind: str,
    options: MetaOptions,
    consensus_logits: Tensor | None = None,
) -> MetaLoss:
    """Return the same as :func:`gathered_loss` as one graph over all architectures: one pass, M times the memory."""
    _check(architectures)
    views = [_look(architecture, images, labels, options) for architecture in architectures]
    maps, alive, logits = (torch.stack(tensors) for tensors in zip(*views, strict=True))
    total, terms = metadd_loss(maps, alive, logits, labels, label_kind, options, consensus_logits)
    return MetaLoss(total, terms, maps.detach())


def _carry(
    architectures: Sequence[Architecture],
    last: _View | None,
    pixels: Tensor,
    labels: Tensor,
    options: MetaOptions,
    map_slopes: Tensor | None,
    logit_slopes: Tensor | None,
) -> Tensor:
    """Carry the loss's derivatives by maps and logits on to the images, one architecture after the other.

    The last one's graph is there already, so it goes first.
    """
    gathered = torch.zeros_like(pixels)
    for index in reversed(range(len(architectures))):
        map_slope, logit_slope = (None if slopes is None else slopes[index] for slopes in (map_slopes, logit_slopes))
        view = last or _look(architectures[index], pixels, labels, options, with_map=map_slope is not None)
        share, last = _share(view, pixels, map_slope, logit_slope), None
        if share is not None:
            gathered += share
    return gathered


def _share(view: _View, pixels: Tensor, map_slope: Tensor | None, logit_slope: Tensor | None) -> Tensor | None:
    """One architecture's part of the images' gradient."""
    pairs = [(view.maps, map_slope), (view.logits, logit_slope)]
    pairs = [(output, slope) for output, slope in pairs if slope is not None and output.requires_grad]
    if not pairs:
        return None
    outputs, slopes = [output for output, _ in pairs], [cast(Tensor, slope).to(output.dtype) for output, slope in pairs]
    with torch.autocast(pixels.device.type, enabled=False):
        return torch.autograd.grad(outputs, pixels, slopes)[0]


def _look(
    architecture: Architecture, images: Tensor, labels: Tensor, options: MetaOptions, with_map: bool = True
) -> _View:
    with no_float16(images.device.type):
        adapted = images if architecture.adapt is None else architecture.adapt(images)
        if not with_map:
            logits = wide(architecture.network(adapted))
            return _View(logits, logits, logits)
        kind = architecture.cam or options.cam
        classes = labels.argmax(1) if options.cam_class == "label" else None
        cams = []
        try:
            for shallow in LAYERS[options.layers]:
                layer = architecture.layer
                if shallow:
                    layer = find_layer(architecture.network, adapted, kind == "attention", shallow)
                cams.append(
                    class_activation_map(architecture.network, adapted, classes, kind, layer, options.detach_weights)
                )
        except UserError as error:
            if not architecture.name:
                raise
            raise UserError(f"{architecture.name}: {error}") from error
    normalised = [normalise_maps(cam.maps, (options.grid, options.grid), options.normalisation) for cam in cams]
    maps, alive = (torch.cat(parts) for parts in zip(*normalised, strict=True))
    return _View(maps, alive, cams[0].logits.to(maps.dtype))


def _check(architectures: Sequence[Architecture]) -> None:
    if not architectures:
        raise UserError("metadd needs at least one architecture to look at the images")
    for index, architecture in enumerate(architectures):
        if architecture.network.training:
            raise UserError(f"metadd architecture {architecture.name or index} must be frozen, but is in training mode")


def _leaf(tensor: Tensor | None, needed: bool) -> Tensor | None:
    """Return a leaf with the tensor's values, usable in a graph also when it comes from inference mode."""
    if tensor is None:
        return None
    return (tensor.clone() if tensor.is_inference() else tensor.detach()).requires_grad_(needed)
