"""The plain convolutional networks of the dataset-distillation literature.

``conv`` and ``convnet`` look alike and differ in widths, order, normalisation and initial weights, which is enough to
make numbers incomparable: ``conv`` is FRePo's, ``convnet`` is the one of DC, DSA, DM and MTT. ``alexnet`` is what the
literature tests transfer with.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dd.models.interface import Network, check_images
from lightning_dd.utils.errors import UserError, check_count, unknown_name

# The standard deviation of a unit normal cut off at two; dividing by it gives the cut-off normal unit variance.
_TRUNCATED_STD = 0.87962566103423978
NORMS = ("batch", "instance", "group", "layer", "none")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"avg": F.avg_pool2d, "max": F.max_pool2d}
_ALEXNET_WIDTHS = (128, 192, 256, 192, 192)


class _PlainNetwork(Network):
    """A network whose features are its last map, flattened, and that ends in a linear head."""

    def __init__(
        self, in_channels: int, num_classes: int, image_size: tuple[int, int], width: int, halvings: int, what: str
    ) -> None:
        super().__init__()
        self.in_channels = check_count("in_channels", in_channels)
        self.num_classes = check_count("num_classes", num_classes)
        self.width = check_count("width", width)
        sides = [(32 if side == 28 else check_count("image_size", side)) >> halvings for side in image_size]
        if min(sides) == 0:
            raise UserError(
                f"image_size {image_size[0]}x{image_size[1]} is too small for {what}: "
                f"no pixel is left after {halvings} halvings"
            )
        self.last_cells = sides[0] * sides[1]

    def make_head(self, channels: int) -> nn.Linear:
        """Return the linear layer that reads a last map of so many channels."""
        self.num_features = channels * self.last_cells
        return nn.Linear(self.num_features, self.num_classes)

    @abstractmethod
    def feature_maps(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the last activation ``(N, channels, h, w)``."""

    def features(self, images: Tensor) -> Tensor:
        """Return the last activation ``(N, num_features)`` in the order channel, row, column, whatever its layout."""
        return self.feature_maps(images).flatten(1)


class _PlainConv(_PlainNetwork):
    """Blocks of convolution, normalisation, activation and pooling that each halve the map."""

    growth: ClassVar[int]  # of the width from block to block
    own_norm: ClassVar[str]
    norm_first: ClassVar[bool]  # before the convolution; the image itself is not normalised then
    most_groups: ClassVar[int]
    momentum: ClassVar[float]
    flax_weights: ClassVar[bool] = False  # to start from, in place of PyTorch's

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        width: int = 128,
        depth: int = 3,
        norm: str | None = None,
        activation: str = "relu",
        pooling: str = "avg",
    ) -> None:
        super().__init__(in_channels, num_classes, image_size, width, check_count("depth", depth), f"depth {depth}")
        for option, name, known in (("activation", activation, ACTIVATIONS), ("pooling", pooling, POOLINGS)):
            if name not in known:
                raise unknown_name(option, str(name), known)
        self.activate, self.pool = ACTIVATIONS[activation], POOLINGS[pooling]
        self.widths = [width * self.growth**index for index in range(depth)]
        inputs = [in_channels, *self.widths[:-1]]
        paddings = [_first_padding(image_size, 3)] + [(1, 1)] * (depth - 1)
        self.convs = nn.ModuleList(
            _Conv3x3(i, o, 3, padding=padding) for i, o, padding in zip(inputs, self.widths, paddings, strict=True)
        )
        self.head = self.make_head(self.widths[-1])
        for layer in [*self.convs, self.head] if self.flax_weights else []:
            lecun_normal_(cast(Tensor, layer.weight))
            nn.init.zeros_(cast(Tensor, layer.bias))
        norms = [
            make_norm(norm or self.own_norm, channels, self.most_groups, self.momentum)
            for channels in (inputs if self.norm_first else self.widths)
        ]
        self.norms = nn.ModuleList([nn.Identity(), *norms[1:]] if self.norm_first else norms)

    def feature_maps(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the last activation ``(N, widths[-1], h, w)``."""
        check_images(images, self.in_channels)
        x = images
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(norm(x)) if self.norm_first else norm(conv(x))
            # In place saves a pass over the largest maps, but second-order methods need the input.
            in_place = self.activate is F.relu and not torch.is_grad_enabled()
            x = self.pool(F.relu_(x) if in_place else self.activate(x), 2)
        return x


class FRePoConv(_PlainConv):
    """FRePo's network ``conv`` (Zhou et al. 2022, arXiv 2206.00719).

    A block is [norm, from the second block on] -> conv3x3 -> ReLU -> average pool 2; widths double: w, 2w, 4w, ...
    Weights start as flax starts them (LeCun normal cut off at two standard deviations, zero biases), not as PyTorch
    does: the method regresses on the features of hardly trained networks, so their scale is part of the method.

    Args:
        in_channels: image channels C.
        num_classes: number of logits.
        image_size: ``(height, width)`` in pixels; a side of 28 is zero-padded to 32 by the first convolution.
        width: channels of the first block.
        depth: number of blocks.
        norm: see :func:`~lightning_dd.models.convnet.make_norm`; ``group`` makes up to 32 groups. FRePo distils with
            ``batch``, which None stands for, and trains students with ``none``.
        activation: ``relu``, ``leaky_relu``, ``gelu``, ``silu`` or ``sigmoid``.
        pooling: ``avg`` or ``max``.

    Raises:
        UserError: a setting is out of range, or the image is too small for the depth.
    """

    growth, own_norm, norm_first, most_groups = 2, "batch", True, 32
    # flax's momentum 0.1 is the fraction of the *old* statistic that is kept, PyTorch's the fraction of the new one
    # that is taken. Pool networks live about 100 steps: with PyTorch's usual 0.1 the running statistics, which the
    # outer loss uses, would lag behind the weights all their life.
    momentum = 0.9
    flax_weights = True


class ConvNet(_PlainConv):
    """The field's ConvNet (Zhao et al. 2021, arXiv 2006.05929, and most methods since).

    A block is conv3x3 -> norm -> ReLU -> average pool 2, with the same width in every block and PyTorch's initial
    weights. The first three arguments are those of :class:`FRePoConv`.

    Args:
        width: channels of every block.
        depth: number of blocks; the literature takes 3 at 32 px, 4 at 64, 5 at 128, 6 at 256.
        norm: see :func:`~lightning_dd.models.convnet.make_norm`; ``group`` makes up to 4 groups, None is ``instance``.
        activation: ``relu``, ``leaky_relu``, ``gelu``, ``silu`` or ``sigmoid``.
        pooling: ``avg`` or ``max``.

    Raises:
        UserError: a setting is out of range, or the image is too small for the depth.
    """

    growth, own_norm, norm_first, most_groups, momentum = 1, "instance", False, 4, 0.1


class AlexNet(_PlainNetwork):
    """AlexNet in the form of DC (arXiv 2006.05929).

    Five convolutions, three max pools, one linear layer; no normalisation. The first three arguments are those of
    :class:`FRePoConv`.

    Args:
        width: channels of the first convolution; the others scale with it (128 gives 128, 192, 256, 192, 192).

    Raises:
        UserError: a setting is out of range, or the image is smaller than 8 pixels.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int], width: int = 128) -> None:
        super().__init__(in_channels, num_classes, image_size, width, 3, "alexnet")
        self.widths = [max(1, channels * width // _ALEXNET_WIDTHS[0]) for channels in _ALEXNET_WIDTHS]
        a, b, c, d, e = self.widths
        self.trunk = nn.Sequential(
            *(nn.Conv2d(in_channels, a, 5, padding=_first_padding(image_size, 5)), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = self.make_head(e)

    def feature_maps(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the last activation ``(N, widths[-1], h, w)``."""
        check_images(images, self.in_channels)
        return cast(Tensor, self.trunk(images))


class _Conv3x3(nn.Conv2d):
    """A convolution that keeps the channels-last layout of one-channel images when it is compiled in half precision.

    With one channel both layouts have the same strides, so the layout is lost, and the largest maps of the network
    are computed in the slow one. A second channel of zeros, with zero weights, says which is meant: up to twice as
    fast compiled under bf16 autocast, and no gain otherwise.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        weight = self.weight
        halved = torch.compiler.is_compiling() and torch.is_autocast_enabled(input.device.type)
        if halved and self.in_channels == 1:
            channel = (0, 0, 0, 0, 0, 1)
            input = F.pad(input, channel).contiguous(memory_format=torch.channels_last)
            weight = F.pad(weight, channel)
        return F.conv2d(input, weight, self.bias, padding=cast(tuple[int, int], self.padding))


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


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill a weight ``(out, in, ...)`` with flax's LeCun normal: variance ``1 / fan_in``, cut off at two deviations."""
    std = math.sqrt(1.0 / weight[0].numel()) / _TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _first_padding(image_size: tuple[int, int], kernel: int) -> tuple[int, int]:
    """Padding that turns a side of 28 into 32, as the literature does for MNIST-like data, and keeps any other."""
    height, width = (kernel // 2 + (2 if side == 28 else 0) for side in image_size)
    return height, width
