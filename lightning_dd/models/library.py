"""Architectures of timm and torchvision as networks of this project, fitted to small images of any channel count."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dd.models.interface import Network, check_images
from lightning_dd.models.small_images import LARGEST_SMALL_SIDE, exchange_batch_norm, fit_stem
from lightning_dd.utils.errors import UserError, check_count

ImageShape = tuple[int, int, int]

_FROM_THE_DATA = ("num_classes", "in_chans", "img_size", "image_size")
_NOT_OFFERED = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights", "progress"),
    *("features_only", "out_indices", "scriptable", "exportable", "no_jit", "device", "dtype"),
)
_BASE_WIDTH = 64  # channels of the first convolution of VGG and GoogLeNet as published
_MIXERS = {"s": (8, 512), "b": (12, 768), "l": (24, 1024)}  # blocks and width of the sizes of arXiv 2105.01601
_TIMM_VGG = r"vgg\d"
_TOKENS = 8  # patches per side of a small image: the literature's patch size 4 at 32 px


class LibraryNetwork(Network):
    """A library's network, split into what makes the features and the linear layer that reads them.

    Images are padded with zeros (the mean, for normalised images) to a multiple of 8 and at least 32 per side,
    because most of these networks halve their map five times: 28 px becomes 32.

    MobileNetV3 has no second derivative (its hard sigmoid lacks one), so it can be a student or a judge but not the
    network of a method that differentiates twice through the weights (DC, DSA, MTT).

    Args:
        trunk: maps padded images ``(N, in_channels, H, W)`` to features ``(N, head.in_features)``.
        head: maps features to logits.
        in_channels: of the images.
        image_size: ``(height, width)`` of the images before padding, in pixels.
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.in_channels = in_channels
        self.num_features = head.in_features
        self.num_classes = head.out_features
        down, across = (_padded(side) - side for side in image_size)
        self.margins = (across // 2, across - across // 2, down // 2, down - down // 2)  # left, right, top, bottom

    def pad(self, images: Tensor) -> Tensor:
        """Return the images ``(N, C, H, W)`` as the trunk takes them."""
        check_images(images, self.in_channels)
        return F.pad(images, self.margins) if any(self.margins) else images

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to what enters the classifier, ``(N, num_features)``."""
        return cast(Tensor, self.trunk(self.pad(images)))


def build_from_library(
    library: str, name: str, options: Mapping[str, Any], num_classes: int, image_shape: ImageShape
) -> LibraryNetwork:
    """Build a classifier of timm or torchvision, with random weights, fitted to the image shape.

    Convolutional networks get a stem of smaller stride (:func:`~lightning_dd.models.small_images.fit_stem`). Of timm,
    vision transformers and mixers get a patch size that makes 8x8 tokens of an image up to 64 px, Swin windows of 4,
    and VGG the literature's single linear layer after global pooling. Options of the same name win, and
    ``output_stride`` or ``patch_size`` leaves the stem alone.

    Args:
        library: ``timm`` or ``torchvision``.
        name: a name that the library knows.
        options: keyword arguments for the library's model; ``width`` (base 64) for timm's VGG and torchvision's
            GoogLeNet; ``norm`` for networks with batch normalisation, see
            :func:`~lightning_dd.models.small_images.exchange_batch_norm`.
        num_classes: number of logits.
        image_shape: ``(C, H, W)`` before padding.

    Raises:
        UserError: an option is unknown or not offered, or a network of torchvision does not end in a linear layer.
    """
    title = name if library == "timm" else f"torchvision/{name}"
    for option in options:
        if option in _FROM_THE_DATA:
            raise UserError(f"option '{option}' of architecture '{title}' comes from the data and cannot be set")
        if option in _NOT_OFFERED:
            raise UserError(f"option '{option}' of architecture '{title}' is not offered: weights start at random")
    theirs = {option: value for option, value in options.items() if option != "norm"}  # no library knows our norm
    model, head = (_timm if library == "timm" else _torchvision)(title, theirs, num_classes, image_shape)
    exchange_batch_norm(title, model, options.get("norm"))
    stem_is_chosen = {"output_stride", "patch_size"} & set(options) or re.match(_TIMM_VGG, title)
    return _assemble(model, head, num_classes, image_shape, refit=not stem_is_chosen)


def _timm(
    name: str, options: dict[str, Any], num_classes: int, image_shape: ImageShape
) -> tuple[nn.Module, nn.Linear | None]:
    """Return a network of timm that ends in its features, and its linear head if it has a single one."""
    import timm
    from timm.layers.config import set_fused_attn

    # Double backward (gradient matching, class activation maps) needs attention written out: the fused kernels have
    # no second derivative. timm reads this switch when it makes a layer, so it must be off before.
    set_fused_attn(False)
    channels = image_shape[0]
    if re.match(_TIMM_VGG, name):
        return _vgg(name, options, num_classes, channels)
    size = (_padded(image_shape[1]), _padded(image_shape[2]))
    ours: dict[str, Any] = {"img_size": size[0] if size[0] == size[1] else size, **_token_options(name, min(size))}
    mixer = re.fullmatch(r"mixer_([sbl])(\d+)_224", name)

    def create(**kwargs: Any) -> nn.Module:
        kwargs |= {"num_classes": num_classes, "in_chans": channels}
        if mixer:  # timm's own function takes neither another depth, nor another width or patch size
            from timm.models.mlp_mixer import MlpMixer

            blocks, dims = _MIXERS[mixer[1]]
            return MlpMixer(**({"patch_size": int(mixer[2]), "num_blocks": blocks, "embed_dim": dims} | kwargs))
        return timm.create_model(name, pretrained=False, **kwargs)

    model: Any = _call(name, create, ours, options)
    head = _cut_head(model, model.get_classifier())
    if head is None:  # two heads, or one that is not a linear layer: ask for none, and add our own
        model.reset_classifier(0)
    return model, head


def _torchvision(
    title: str, options: dict[str, Any], num_classes: int, image_shape: ImageShape
) -> tuple[nn.Module, nn.Linear]:
    """Return a network of torchvision that ends in its features, and its linear head.

    The last linear layer is the head; the first convolution is replaced when images do not have three channels.
    """
    import torchvision

    name = title.rpartition("/")[2]
    width = _take_width(title, options) if name == "googlenet" else _BASE_WIDTH
    ours: dict[str, Any] = {}
    if name.startswith("vit_"):
        ours["image_size"] = _padded(image_shape[1])
    if name in ("googlenet", "inception_v3"):  # their extra classifiers make a training batch return a tuple
        ours |= {"aux_logits": False, "init_weights": True}

    def create(**kwargs: Any) -> nn.Module:
        if name == "googlenet":
            return _googlenet(title, num_classes, width, **kwargs)
        return cast(nn.Module, torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs))

    model = _call(title, create, ours, options)
    if image_shape[0] != 3:
        _replace_first_convolution(model, image_shape[0])
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    head = _cut_head(model, linears[-1]) if linears and linears[-1].out_features == num_classes else None
    if head is None:
        raise UserError(f"architecture '{title}' does not end in a linear layer, so it has no features")
    return model, head


def _assemble(
    trunk: nn.Module, head: nn.Linear | None, num_classes: int, image_shape: ImageShape, refit: bool
) -> LibraryNetwork:
    """Fit the stem, find the number of features by a trial run, and join trunk and head."""
    channels, height, width = image_shape
    images = torch.zeros(2, channels, _padded(height), _padded(width))
    fitted = fit_stem(trunk.eval(), images) if refit else trunk.eval()
    try:
        num_features = _trial(fitted, images)
    except Exception:  # not with another stem
        fitted, num_features = trunk, _trial(trunk, images)
    if head is None:
        head = nn.Linear(num_features, num_classes)
    if head.in_features != num_features:
        raise ValueError(f"the classifier takes {head.in_features} features, the network makes {num_features}")
    return LibraryNetwork(fitted.train(), head, channels, (height, width))


def _trial(trunk: nn.Module, images: Tensor) -> int:
    """Return the number of features of a network in inference mode."""
    with torch.no_grad():
        shape = tuple(trunk(images).shape)
    if len(shape) != 2 or shape[0] != images.shape[0]:
        raise ValueError(f"the features are not vectors but {shape}")
    return int(shape[1])


def _call(name: str, create: Callable[..., nn.Module], ours: dict[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """Create a model with our defaults and the user's options, dropping the defaults that it does not know."""
    ours = {key: value for key, value in ours.items() if key not in options}
    while True:
        try:
            return create(**ours, **options)
        except TypeError as error:
            text = str(error)
            found = re.search(
                r"(unexpected keyword|multiple values for(?: keyword)?) argument\W*(?:s\W+)?'(\w+)'", text
            )
            if found is None or found[2] not in {*ours, *options}:
                raise
            if found[2] in options:
                option = f"option '{found[2]}' of architecture '{name}'"
                unknown = found[1].startswith("unexpected")
                raise UserError(f"unknown {option}" if unknown else f"{option} is fixed by its name") from None
            del ours[found[2]]


def _token_options(name: str, side: int) -> dict[str, Any]:
    """Options that give a transformer a grid of tokens worth the name on a small image."""
    if side > LARGEST_SMALL_SIDE:
        return {}
    patch = max(2, side // _TOKENS)
    if re.match(r"(test_)?(vit|deit|cait|beit|eva|flexivit|mixer)", name):
        return {"patch_size": patch}
    if name.startswith("pit_"):
        return {"patch_size": patch, "stride": max(1, patch // 2)}
    if name.startswith("swin"):  # it halves three times, so it starts from twice as many patches
        return {"patch_size": patch // 2, "window_size": 4}
    return {}


def _vgg(name: str, options: dict[str, Any], num_classes: int, channels: int) -> tuple[nn.Module, nn.Linear]:
    """Build timm's VGG without its two 4096-wide layers, which are 100 of its 130 million weights."""
    from timm.models import vgg

    depth, _, norm = name.partition("_")
    width = _take_width(name, options)
    layers = [max(1, entry * width // _BASE_WIDTH) if isinstance(entry, int) else entry for entry in vgg.cfgs[depth]]
    ours = {"mlp_ratio": 1 / 4096, "norm_layer": nn.BatchNorm2d if norm == "bn" else None}

    def create(**kwargs: Any) -> nn.Module:
        return cast(nn.Module, vgg.VGG(layers, num_classes=num_classes, in_chans=channels, **kwargs))

    features = cast(Any, _call(name, create, ours, options)).features
    last = next(layer for layer in reversed(list(features.modules())) if isinstance(layer, nn.Conv2d))
    trunk = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return trunk, nn.Linear(last.out_channels, num_classes)


def _take_width(name: str, options: dict[str, Any]) -> int:
    return check_count(f"option 'width' of architecture '{name}'", options.pop("width", _BASE_WIDTH))


def _googlenet(name: str, num_classes: int, width: int, **options: Any) -> nn.Module:
    """Build torchvision's GoogLeNet (Szegedy et al. 2015, arXiv 1409.4842); all widths scale with the first."""
    from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception, InceptionAux

    if width % 4:
        raise UserError(f"option 'width' of architecture '{name}' must be a multiple of 4, got {width}")

    def scaled(channels: int) -> int:
        return channels * width // _BASE_WIDTH

    def block(inputs: int, outputs: int, **kwargs: Any) -> nn.Module:
        inputs = inputs if inputs == 3 else scaled(inputs)  # only the image has three channels
        return cast(nn.Module, BasicConv2d(inputs, scaled(outputs), **kwargs))

    blocks = [block, partial(Inception, conv_block=block), InceptionAux]
    model = GoogLeNet(num_classes, blocks=blocks, **options)
    if width != _BASE_WIDTH:
        model.fc = nn.Linear(scaled(model.fc.in_features), num_classes)
    return cast(nn.Module, model)


def _cut_head(model: nn.Module, head: object) -> nn.Linear | None:
    """Replace a linear layer of the model by the identity and return it; None if it is not one."""
    if not isinstance(head, nn.Linear):
        return None
    name = next(name for name, layer in model.named_modules() if layer is head)
    model.set_submodule(name, nn.Identity())
    return head


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    name, old = next((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    arguments: dict[str, Any] = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    new = nn.Conv2d(channels, old.out_channels, **arguments, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, new)


def _padded(side: int) -> int:
    """The next multiple of 8, at least 32."""
    return max(32, -(-side // 8) * 8)
