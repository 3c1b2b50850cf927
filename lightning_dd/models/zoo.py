"""Named groups of students: ``unseen-small`` instead of a line of architectures.

Group members carry the options that make sense of a few small images. Networks of the libraries are made for a million
large ones, and three of their habits hurt here:

* batch normalisation learns the statistics of ten synthetic images, and is tested with them on real ones: small
  networks that have no other get ``norm=layer`` (GroupNorm with one group), a small VGG none at all, and full-size ones
  what their tables use: instance normalisation, every channel of an image by itself (DC, MTT, GLaD);
* residual blocks that start as the identity (``zero_init_last``, ``ls_init_value``) take thousands of steps to wake up,
  a student has hundreds: they start as their convolutions do;
* random depth (``drop_path_rate``) drops what little there is to learn: it is off.

Stems, patch and window sizes need no options: the factory fits them to the image.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches

from lightning_dd.models.factory import ArchitectureSpec, find_builder
from lightning_dd.utils.errors import UserError

_RESNET = "zero_init_last=false,norm=instance"
_TINY_RESNET = "layers=[1,1,1,1],channels=[8,16,32,64],zero_init_last=false,norm=layer"
_TINY_VIT = "depth=2,embed_dim=64,num_heads=4,class_token=false,global_pool=avg"

_ALEXNET = "alexnet:width=32"
_VGG = "vgg11:width=16"
_RESNET18 = f"resnet18:{_TINY_RESNET}"
_DENSENET = "densenet121:growth_rate=8,block_config=[2,2,2,2],norm=layer"
_GOOGLENET = "torchvision/googlenet:width=16,norm=layer"
_CONVNEXT = "convnext_atto:depths=[1,1,2,1],dims=[16,32,64,128],ls_init_value=1.0"
_VIT = f"vit_tiny_patch16_224:patch_size=8,{_TINY_VIT}"
_SWIN = "swin_tiny_patch4_window7_224:embed_dim=24,depths=[1,1,1,1],num_heads=[1,2,4,8],drop_path_rate=0"
_MIXER = "mixer_s16_224:num_blocks=2,embed_dim=64"

GROUPS: dict[str, tuple[str, ...]] = {
    # Eight families that train in seconds on two CPU cores.
    "unseen-small": (_ALEXNET, _VGG, _RESNET18, _GOOGLENET, _CONVNEXT, _SWIN, _VIT, _MIXER),
    # What papers test transfer with, in full size: the four of MTT and GLaD, and the eight of MetaDD. Normalised as in
    # MTT's networks.py: VGG and ResNet by instance (GroupNorm with a group per channel), AlexNet not at all. MetaDD
    # does not say how its networks are normalised; GoogLeNet follows the others.
    "unseen": (
        "alexnet",
        "vgg11_bn:norm=instance",
        f"resnet18:{_RESNET}",
        "vit_tiny_patch16_224",
        "torchvision/googlenet:norm=instance",
        f"resnet34:{_RESNET}",
        "vit_base_patch16_224",
        f"resnet50:{_RESNET}",
        "vgg19_bn:norm=instance",
        "swin_small_patch4_window7_224:drop_path_rate=0",
        "convnet:depth=auto",
    ),
    # FRePo's own table: its network, DC's, and each family with batch normalisation and without.
    "frepo-cross": (
        "conv:depth=auto,norm=none",
        "conv:depth=auto,norm=instance",
        "convnet:depth=auto,norm=none",
        "convnet:depth=auto,norm=instance",
        "resnet18:zero_init_last=false,norm=none",
        "resnet18:zero_init_last=false",
        "vgg11",
        "vgg11_bn",
        "alexnet",
    ),
    # One of every family the libraries have, each as small as its family goes.
    "zoo-small": (
        "conv:width=16,depth=auto,norm=none",
        "convnet:width=16,depth=auto",
        "alexnet:width=16",
        "vgg11:width=8",
        _RESNET18,
        f"resnet50:{_TINY_RESNET}",
        f"seresnet18:{_TINY_RESNET}",
        "resnetv2_50:layers=[1,1,1,1],channels=[32,64,128,256],zero_init_last=false,norm=layer",
        _DENSENET,
        _GOOGLENET,
        "mobilenetv2_035:norm=layer",
        "mobilenetv3_small_050:norm=layer",
        "tinynet_e:norm=layer",
        "mnasnet_small:norm=layer",
        "ghostnet_050:norm=layer",
        "torchvision/shufflenet_v2_x0_5:norm=layer",
        "regnetx_002:depth=6,w0=16,wa=16,wm=2,group_size=8,zero_init_last=false,norm=layer",
        _CONVNEXT,
        "mobilevit_xxs:norm=layer",
        _VIT,
        f"deit_tiny_patch16_224:{_TINY_VIT}",
        "cait_xxs24_224:depth=2,embed_dim=48,num_heads=2,init_values=1.0",
        "xcit_nano_12_p16_224:depth=2,embed_dim=64,num_heads=4,norm=layer",
        _SWIN,
        _MIXER,
    ),
}
"""Architectures by the name of their group."""


def expand(names: Sequence[str], image_shape: tuple[int, int, int] | None = None) -> list[str]:
    """Replace names of groups by their members; keep the order, drop repetitions.

    Args:
        names: groups, and architectures of the factory as ``name`` or ``name:option=value,...``.
        image_shape: ``(C, H, W)`` of the images. ``depth=auto`` becomes the literature's depth of a ConvNet for them
            (3 blocks at 28 and 32 px, 4 at 64, 5 at 128), or is left out if no shape is given.

    Raises:
        UserError: a name is neither a group nor an architecture.

    Example:
        >>> expand(["alexnet", "frepo-cross"], (3, 64, 64))[:3]
        ['alexnet', 'conv:depth=4,norm=none', 'conv:depth=4,norm=instance']
    """
    members = [member for name in names for member in GROUPS.get(name, (name,))]
    found: dict[str, str] = {}
    for text in members:
        spec = ArchitectureSpec.parse(text)
        if spec.options.get("depth") == "auto":
            spec = _with_depth(spec, image_shape)
            text = str(spec)
        try:
            find_builder(spec.name)
        except UserError as error:
            close = get_close_matches(spec.name, GROUPS, n=1)
            hint = f"did you mean the group '{close[0]}'? " if close else ""
            raise UserError(f"{error}; {hint}groups: {', '.join(sorted(GROUPS))}") from None
        found.setdefault(str(ArchitectureSpec(spec.name, dict(sorted(spec.options.items())))), text)
    return list(found.values())


def _with_depth(spec: ArchitectureSpec, image_shape: tuple[int, int, int] | None) -> ArchitectureSpec:
    """Fill in the depth that halves the image until 4 pixels are left."""
    if image_shape is None:
        return ArchitectureSpec(spec.name, {key: value for key, value in spec.options.items() if key != "depth"})
    side = max(32, min(image_shape[1:]))  # 28 pixels are padded
    return spec.with_options(depth=int(math.log2(side)) - 2)
