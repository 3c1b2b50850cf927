"""Differentiable class-activation maps of any network of the factory.

Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) of the last spatial feature map ``A``::

    alpha_k = mean_ij d score / d A_kij,    map_ij = relu(sum_k alpha_k A_kij)

and for transformers the same on tokens, or a map of their attention. MetaDD (arXiv 2410.05103) compares such maps
between architectures; its paper leaves layer, class and order of differentiation open, so they are switches here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dd.losses.cam_layers import as_map, check_layer, find_layer, frame_of, title, token_grid
from lightning_dd.losses.gradients import no_float16, wide
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError, unknown_name

CAM_KINDS = ("auto", "gradcam", "attention")
"""``gradcam``: Grad-CAM of the last map or tokens; ``attention``: see :func:`attention_map`; ``auto``: ``gradcam``."""
NORMALISATIONS = ("minmax", "max")
"""How a map comes to [0, 1]: ``(map - min) / (max - min)``, or ``map / max``, where 0 stays no evidence at all."""

_FLAT = 1e-6


class Cam(NamedTuple):
    """A network's class-activation maps and its logits, from one forward pass."""

    maps: Tensor
    """``(N, h, w)`` of the network's own resolution, at least 0, in units of a logit; float32 or float64."""
    logits: Tensor
    """``(N, num_classes)``, as the network returned them."""


def class_activation_map(
    network: Network,
    images: Tensor,
    scores_for: Tensor | None,
    kind: str = "auto",
    layer: str | None = None,
    detach_weights: bool = True,
) -> Cam:
    """Return class-activation maps and logits of a frozen network, differentiable with respect to the images.

    When nothing before the map needs a gradient (images without ``requires_grad``, a frozen network), the graph starts
    at the map: only the layers after it are differentiated, and what is returned has no graph.

    Maps cover the image as the network takes it: a 28 px image that the network pads to 32 has a map of 32 px.

    Args:
        network: in inference mode, its parameters without gradient.
        images: ``(N, C, H, W)`` in the network's own preprocessing.
        scores_for: class indices ``(N,)``, or rows ``(N, num_classes)`` of weights of the logits. For learned soft
            labels give the class of the row: a row mixes in the evidence for other classes, which are not what a
            meta feature of this class is. None asks for the class that the network itself predicts.
        kind: one of :data:`CAM_KINDS`; ``attention`` for transformers only.
        layer: name of a module as in ``network.named_modules()``; None finds the last map, see
            :func:`~lightning_dd.losses.cam_layers.find_layer`. For ``attention`` the module that returns the matrix.
        detach_weights: take ``alpha`` for constant, which is cheap; False is the exact derivative, of second order.
            Where a linear head (or a pool and one) reads the map itself, as in the project's own networks and most
            convolutional ones, ``alpha`` is constant and both are the same.

    Raises:
        UserError: the kind or layer is unknown, ``scores_for`` has another shape, or there is no map.

    Example:
        >>> from lightning_dd.models import build_network
        >>> network = build_network("conv:width=8", 10, (3, 32, 32), seed=0).eval().requires_grad_(False)
        >>> cam = class_activation_map(network, torch.rand(2, 3, 32, 32), torch.tensor([3, 5]))
        >>> cam.maps.shape, cam.logits.shape
        (torch.Size([2, 4, 4]), torch.Size([2, 10]))
    """
    if kind not in CAM_KINDS:
        raise unknown_name("cam", str(kind), CAM_KINDS)
    with torch.enable_grad(), no_float16(images.device.type), sdpa_kernel(SDPBackend.MATH):
        activation, logits, has_graph = _run(network, images, kind == "attention", layer)
        score = _score(logits, scores_for)
        create_graph = has_graph and not detach_weights
        with torch.autocast(images.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(
                score, activation, retain_graph=has_graph, create_graph=create_graph, allow_unused=True
            )
            gradient = torch.zeros_like(activation) if gradient is None else gradient
            if kind == "attention":
                maps = attention_map(activation, gradient, frame_of(network, images))
            else:
                maps = _gradcam(network, activation, gradient, frame_of(network, images), layer)
    return Cam(maps, logits) if has_graph else Cam(maps.detach(), logits.detach())


def attention_map(attention: Tensor, gradient: Tensor, frame: tuple[int, int]) -> Tensor:
    """Return the map ``(N, h, w)`` of an attention matrix weighted by its gradient.

    ``mean over heads of relu(gradient * attention)``, summed over the queries: how much the score gains by looking at
    each patch (Chefer et al. 2021, arXiv 2103.15679, eq. 5; one block of their rollout, the last). Plain rollout
    (Abnar and Zuidema 2020, arXiv 2005.00928) has no gradient in it and is the same for every class. The heads play
    the part of Grad-CAM's channels; queries that the head of the network does not read have no gradient and drop out.

    Args:
        attention: ``(N, heads, Q, T)`` after the softmax.
        gradient: of the score with respect to it.
        frame: ``(height, width)`` of the image in pixels; tokens before the grid are dropped.

    Raises:
        UserError: the tokens do not form a grid.
    """
    grid = token_grid(attention.shape[-1], frame) if attention.ndim == 4 else None
    if grid is None:
        raise UserError(f"a tensor of shape {tuple(attention.shape)} is no attention matrix over a grid of tokens")
    keys = (wide(gradient) * wide(attention)).relu().mean(1).sum(1)
    return keys[:, -grid[0] * grid[1] :].reshape(-1, *grid)


def normalise_maps(maps: Tensor, size: tuple[int, int], form: str = "minmax") -> tuple[Tensor, Tensor]:
    """Resize maps to one grid and scale each to [0, 1] by its own values.

    Bilinear (antialiased where the grid is coarser), then one of :data:`NORMALISATIONS`; in float32, or float64 for
    such maps, also under autocast. A map is dead if it is flat: its range is below 1e-6 logits or 1e-6 of its largest
    value, or if it is not finite. Dead maps become zeros with zero gradient.

    Args:
        maps: ``(N, h, w)``, at least 0.
        size: ``(I, J)`` of the grid.
        form: one of :data:`NORMALISATIONS`.

    Returns:
        The maps ``(N, I, J)`` in [0, 1], and which of them are alive, ``(N,)`` bool.

    Example:
        >>> maps, alive = normalise_maps(torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]]]), (1, 2))
        >>> maps.tolist(), alive.tolist()
        ([[[0.0, 1.0]], [[0.0, 0.0]]], [True, False])
    """
    with torch.autocast(maps.device.type, enabled=False):
        coarser = maps.shape[-2] > size[0] or maps.shape[-1] > size[1]
        resized = F.interpolate(wide(maps)[:, None], size, mode="bilinear", antialias=coarser)[:, 0]
        # Values that would make NaN are replaced before the arithmetic, not after it: 0 * NaN is NaN in the backward.
        resized = torch.where(resized.isfinite().all(2, keepdim=True).all(1, keepdim=True), resized, 0.0)
        low, high = resized.amin((1, 2), keepdim=True), resized.amax((1, 2), keepdim=True)
        span = high - low
        alive = (span > _FLAT) & (span > _FLAT * high.abs())
        base = low if form == "minmax" else torch.zeros_like(low)
        scaled = (resized - base) / torch.where(alive, high - base, 1.0)
        return torch.where(alive, scaled, 0.0), alive[:, 0, 0]


def _run(network: Network, images: Tensor, attention: bool, layer: str | None) -> tuple[Tensor, Tensor, bool]:
    """Return the activation, the logits that depend on it, and whether its graph goes back to the images."""
    feature_maps = getattr(network, "feature_maps", None)
    if layer is None and not attention and callable(feature_maps):
        maps = feature_maps(images)  # by the networks' contract what classify takes, before it is flattened
        start, has_graph = _start_of_graph(maps)
        return start, network.classify(start.flatten(1)), has_graph
    name = find_layer(network, images, attention) if layer is None else layer
    outputs: list[tuple[Tensor, bool]] = []

    def hook(module: nn.Module, args: object, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise UserError(f"layer '{name}' of architecture {title(network)} does not return one tensor")
        outputs.append(_start_of_graph(output))
        return outputs[-1][0].clone()  # what follows may work in place

    handle = check_layer(network, name).register_forward_hook(hook)
    try:
        logits = network(images)
    finally:
        handle.remove()
    if not outputs:
        raise UserError(f"layer '{name}' of architecture {title(network)} is not part of its forward pass")
    return outputs[-1][0], logits, outputs[0][1]


def _start_of_graph(activation: Tensor) -> tuple[Tensor, bool]:
    """Return the activation ready to be differentiated by, and whether it already has a graph."""
    if activation.requires_grad:
        return activation, True
    return activation.detach().requires_grad_(), False


def _gradcam(
    network: Network, activation: Tensor, gradient: Tensor, frame: tuple[int, int], layer: str | None
) -> Tensor:
    maps, gradients = as_map(activation, frame), as_map(gradient, frame)
    if maps is None or gradients is None:
        where = f"layer '{layer}'" if layer else "the last feature map"
        raise UserError(
            f"{where} of architecture {title(network)} has shape {tuple(activation.shape)}: "
            "no spatial map of more than one cell"
        )
    weights = wide(gradients).mean((2, 3), keepdim=True)
    return (weights * wide(maps)).sum(1).relu()


def _score(logits: Tensor, scores_for: Tensor | None) -> Tensor:
    """Sum over the batch of the chosen logits; samples do not touch each other's maps."""
    if scores_for is None:
        scores_for = logits.detach().argmax(1)
    if scores_for.ndim == 1 and len(scores_for) == len(logits) and not scores_for.is_floating_point():
        return logits.gather(1, scores_for[:, None]).sum()
    if scores_for.shape == logits.shape:
        return (wide(logits) * scores_for).sum()
    raise UserError(
        f"scores_for must be class indices ({len(logits)},) or rows {tuple(logits.shape)}, "
        f"got {scores_for.dtype} of shape {tuple(scores_for.shape)}"
    )
