"""Families whose libraries fix the size by the name, built again with sizes that can be chosen."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import nn

from lightning_dd.utils.errors import UserError

BASE_WIDTH = 64
"""Channels of the first convolution of VGG and GoogLeNet as published; option ``width`` scales the others with it."""

_MIXERS = {"s": (8, 512), "b": (12, 768), "l": (24, 1024)}  # blocks and width of the sizes of arXiv 2105.01601


def take_width(name: str, options: dict[str, Any]) -> int:
    """Take option ``width`` out of the options of a VGG or a GoogLeNet and return it.

    Raises:
        UserError: it is not a whole number of at least 1.
    """
    width = options.pop("width", BASE_WIDTH)
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise UserError(f"option 'width' of architecture '{name}' must be a whole number of at least 1, got {width!r}")
    return width


def googlenet(name: str, num_classes: int, width: int, **options: Any) -> nn.Module:
    """Return torchvision's GoogLeNet (Szegedy et al. 2015, arXiv 1409.4842) with other widths.

    Args:
        name: what to call it in an error message.
        num_classes: number of logits.
        width: channels of the first convolution, 64 as published; the others scale with it.
        **options: keyword arguments for torchvision's class.

    Raises:
        UserError: the width does not divide the published channels.
    """
    from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception, InceptionAux

    if width % 4:
        raise UserError(f"option 'width' of architecture '{name}' must be a multiple of 4, got {width}")

    def scaled(channels: int) -> int:
        return channels * width // BASE_WIDTH

    def block(inputs: int, outputs: int, **kwargs: Any) -> nn.Module:
        inputs = inputs if inputs == 3 else scaled(inputs)  # only the image has three channels
        return cast(nn.Module, BasicConv2d(inputs, scaled(outputs), **kwargs))

    blocks = [block, partial(Inception, conv_block=block), InceptionAux]
    model = GoogLeNet(num_classes, blocks=blocks, **options)
    if width != BASE_WIDTH:
        model.fc = nn.Linear(scaled(model.fc.in_features), num_classes)
    return cast(nn.Module, model)


def mixer_builder(name: str) -> Callable[..., nn.Module] | None:
    """Return what builds timm's MLP-Mixer of a name (Tolstikhin et al. 2021, arXiv 2105.01601), None for other names.

    timm's own function takes neither another depth, nor another width or patch size.

    Example:
        >>> mixer_builder("mixer_s16_224")(img_size=32, patch_size=4, num_blocks=1, embed_dim=8).stem.num_patches
        64
    """
    found = re.fullmatch(r"mixer_([sbl])(\d+)_224", name)
    if found is None:
        return None

    def build(**kwargs: Any) -> nn.Module:
        from timm.models.mlp_mixer import MlpMixer

        blocks, dims = _MIXERS[found[1]]
        sizes = {"patch_size": int(found[2]), "num_blocks": blocks, "embed_dim": dims}
        return cast(nn.Module, MlpMixer(**(sizes | kwargs)))

    return build
