"""Fitting networks made for a million images of 224 px to few of 28 to 64: smaller strides, other normalisation.

At 32 px a network that halves its map five times ends in a single cell: it classifies worse, and a class activation
map of one cell says nothing.
"""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_dd.models.convnet import NORMS, make_norm
from lightning_dd.utils.errors import UserError, unknown_name

LARGEST_SMALL_SIDE = 64
"""Images with a side above this many pixels keep the network's own stem."""

_CELLS = 4  # wanted side of the last map: that of the literature's ResNet18 at 32 px

_Strided = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


def fit_stem(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a convolutional network that leaves a map worth looking at of small images.

    A ResNet gets the stem that the literature uses up to 64 px: a 3x3 convolution of stride 1 and no max pool (He et
    al. 2016, CIFAR; SRe2L, arXiv 2306.13092, for Tiny ImageNet). In any other network the first strided layers lose
    their stride until the last map would be 4x4. Transformers and whatever cannot be run are left alone; whether the
    copy can be run is for the caller to try.

    Args:
        model: a network in inference mode.
        images: an example batch ``(N, C, H, W)``, padded as the network will get it.
    """
    if min(images.shape[-2:]) > LARGEST_SMALL_SIDE:
        return model
    model = deepcopy(model)
    if all(hasattr(model, name) for name in ("conv1", "bn1", "maxpool", "layer1", "layer4")):  # a ResNet, or its kin
        _small_resnet_stem(model)
    else:
        _reduce_strides(_strided_layers(model, images))
    return model


def exchange_batch_norm(name: str, model: nn.Module, norm: str | None) -> None:
    """Replace every batch normalisation of a library's network in place.

    A student that sees ten images per step learns statistics of those ten images, and is tested with them on real
    ones. The literature's ResNet18 and VGG11 therefore normalise every image alone (DC, arXiv 2006.05929) or not at all
    (FRePo, arXiv 2206.00719). Scale and shift start as the library starts those of the layer that goes; an activation
    that the layer applies itself is kept.

    Args:
        name: what to call the network in an error message.
        model: a network of timm or torchvision.
        norm: see :func:`~lightning_dd.models.convnet.make_norm`; ``group`` makes up to 32 groups, ``batch`` and None
            change nothing.

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


def _small_resnet_stem(model: Any) -> None:
    if isinstance(model.conv1, nn.Conv2d):
        old = model.conv1
        model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as both libraries do
    else:  # a deep stem is a row of 3x3 convolutions, the first with stride 2
        next(layer for layer in model.conv1.modules() if isinstance(layer, nn.Conv2d)).stride = (1, 1)
    model.maxpool = nn.Identity()


def _strided_layers(model: nn.Module, images: Tensor) -> list[tuple[_Strided, int, int]]:
    """Run the model once and list the layers that shrink their map, each with its input and output side.

    The run is what tells which layers work side by side (a block and its shortcut): they see the same input side.
    """
    seen: list[tuple[_Strided, int, int]] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        before, after = min(inputs[0].shape[-2:]), min(output.shape[-2:])
        if _stride(cast(_Strided, layer)) > 1 and after < before:
            seen.append((cast(_Strided, layer), before, after))

    layers = [layer for layer in model.modules() if isinstance(layer, _Strided)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(images)
    except Exception:
        return []  # the caller's own trial will say why
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _reduce_strides(layers: list[tuple[_Strided, int, int]]) -> None:
    """Take strides away from the front until the last map has the wanted side."""
    surplus = max(1, _CELLS // min((after for _, _, after in layers), default=_CELLS))
    for side in sorted({before for _, before, _ in layers}, reverse=True):
        if surplus == 1:
            return
        level = [layer for layer, before, _ in layers if before == side]
        old = max(_stride(layer) for layer in level)
        new = max(1, old // surplus)
        for layer in level:
            _set_stride(layer, new)
        surplus //= old // new


def _stride(layer: _Strided) -> int:
    stride = layer.stride
    return max(stride) if isinstance(stride, tuple) else int(stride)


def _set_stride(layer: _Strided, stride: int) -> None:
    """Give a layer a smaller stride, keeping its map aligned."""
    layer.stride = (stride, stride)
    if not isinstance(layer, nn.Conv2d):
        if stride == 1:  # a pool that no longer shrinks would only blur
            layer.kernel_size, layer.padding = (1, 1), (0, 0)
        return
    kernel = layer.kernel_size[0]
    cropped = kernel % 2 == 0
    if cropped:
        # Patch layers (kernel = stride) become the overlapping 3x3 of a small-image stem: an even kernel would shift
        # the map by half a pixel. Cropping keeps the library's scale of the initial weights.
        kernel -= 1
        layer.weight = nn.Parameter(layer.weight.detach()[..., :kernel, :kernel].clone())
        layer.kernel_size = (kernel, kernel)
    if cropped or layer.padding != (0, 0):
        layer.padding = (kernel // 2, kernel // 2)


def _replacement(old: Any, norm: str) -> nn.Module:
    new = make_norm(norm, old.num_features, groups=32, momentum=0.1)
    if isinstance(new, nn.GroupNorm):
        new.eps = old.eps
        new.load_state_dict({"weight": old.weight, "bias": old.bias})
    # timm has layers that normalise and activate in one
    return nn.Sequential(new, old.act) if hasattr(old, "act") else new
