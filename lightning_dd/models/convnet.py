"""The two plain convolutional networks of the dataset-distillation literature.

They look alike and differ in widths, order, normalisation and initial weights, which is enough to make numbers
incomparable: ``conv`` is FRePo's, ``convnet`` is the one of DC, DSA, DM and MTT.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dd.models.checks import check_count, check_images
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError, unknown_name

NORMS = ("batch", "instance", "group", "layer", "none")

# The standard deviation of a unit normal cut off at two; dividing by it gives the cut-off normal unit variance.
_TRUNCATED_STD = 0.87962566103423978


class _PlainConv(Network):
    """What both networks share: ``depth`` blocks that each halve the map, and a linear head on the flat last map.

    Raises:
        UserError: a count is not a whole number of at least 1, or the image has no pixel left after ``depth`` halvings.
    """

    def __init__(
        self, in_channels: int, num_classes: int, image_size: tuple[int, int], width: int, depth: int, growth: int
    ) -> None:
        super().__init__()
        self.in_channels = check_count("in_channels", in_channels)
        self.num_classes = check_count("num_classes", num_classes)
        self.width = check_count("width", width)
        self.depth = check_count("depth", depth)
        self.widths = [width * growth**index for index in range(depth)]
        height, breadth = (_map_side(side, depth, image_size) for side in image_size)
        inputs = [in_channels, *self.widths[:-1]]
        paddings = [_first_padding(image_size)] + [(1, 1)] * (depth - 1)
        self.convs = nn.ModuleList(
            _Conv3x3(i, o, 3, padding=padding) for i, o, padding in zip(inputs, self.widths, paddings, strict=True)
        )
        self.num_features = self.widths[-1] * height * breadth
        self.head = nn.Linear(self.num_features, num_classes)

    def feature_maps(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the last activation ``(N, widths[-1], h, w)``."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to ``(N, num_features)``: the last activation, flattened.

        The order is always channel, row, column, whatever the memory format of the images.

        Raises:
            UserError: the images have another number of channels than the network.
        """
        return self.feature_maps(images).flatten(1)

    def classify(self, features: Tensor) -> Tensor:
        """Map features ``(N, num_features)`` to logits ``(N, num_classes)``."""
        return cast(Tensor, self.head(features))


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
        norm: one of ``batch``, ``instance`` (GroupNorm with a group per channel), ``group`` (up to 32 groups),
            ``layer`` (one group) and ``none``. FRePo distils with ``batch`` and trains students with ``none``.

    Raises:
        UserError: a setting is out of range, or the image is too small for the depth.

    Example:
        >>> FRePoConv(3, 10, (32, 32), width=8).features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        width: int = 128,
        depth: int = 3,
        norm: str = "batch",
    ) -> None:
        super().__init__(in_channels, num_classes, image_size, width, depth, growth=2)
        # flax's momentum 0.1 is the fraction of the *old* statistic that is kept, PyTorch's the fraction of the new
        # one that is taken. Pool networks live about 100 steps: with PyTorch's usual 0.1 the running statistics,
        # which the outer loss uses, would lag behind the weights all their life.
        norms = [make_norm(norm, channels, groups=32, momentum=0.9) for channels in self.widths[:-1]]
        self.norms = nn.ModuleList([nn.Identity(), *norms])
        for module in [*self.convs, self.head]:
            lecun_normal_(cast(Tensor, module.weight))
            nn.init.zeros_(cast(Tensor, module.bias))

    def feature_maps(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the last activation ``(N, widths[-1], h, w)``."""
        check_images(images, self.in_channels)
        x = images
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = F.avg_pool2d(_relu(conv(norm(x))), 2)
        return x


class ConvNet(_PlainConv):
    """The field's ConvNet (Zhao et al. 2021, arXiv 2006.05929, and most methods since).

    A block is conv3x3 -> norm -> ReLU -> average pool 2, with the same width in every block and PyTorch's initial
    weights. "Instance" normalisation is GroupNorm with one group per channel, with scale and shift.

    Args:
        in_channels: image channels C.
        num_classes: number of logits.
        image_size: ``(height, width)`` in pixels; a side of 28 is zero-padded to 32 by the first convolution.
        width: channels of every block.
        depth: number of blocks; the literature takes 3 at 32 px, 4 at 64, 5 at 128, 6 at 256.
        norm: one of ``batch``, ``instance``, ``group`` (up to 4 groups), ``layer`` (one group) and ``none``.

    Raises:
        UserError: a setting is out of range, or the image is too small for the depth.

    Example:
        >>> ConvNet(1, 10, (28, 28), width=8).num_features
        128
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
    ) -> None:
        super().__init__(in_channels, num_classes, image_size, width, depth, growth=1)
        self.norms = nn.ModuleList(make_norm(norm, channels, groups=4, momentum=0.1) for channels in self.widths)

    def feature_maps(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the last activation ``(N, width, h, w)``."""
        check_images(images, self.in_channels)
        x = images
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = F.avg_pool2d(_relu(norm(conv(x))), 2)
        return x


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
        norm: one of :data:`NORMS`.
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
    fan_in = weight[0].numel()
    std = math.sqrt(1.0 / fan_in) / _TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _relu(x: Tensor) -> Tensor:
    # In place saves a pass over the largest maps, but second-order methods need the input: only where no graph is kept.
    return F.relu(x, inplace=not torch.is_grad_enabled())


def _first_padding(image_size: tuple[int, int]) -> tuple[int, int]:
    """Padding that turns a side of 28 into 32, as the literature does for MNIST-like data, and keeps any other."""
    height, width = (3 if side == 28 else 1 for side in image_size)
    return height, width


def _map_side(side: int, depth: int, image_size: tuple[int, int]) -> int:
    """Side of the last map after ``depth`` halvings."""
    last = (32 if side == 28 else check_count("image_size", side)) >> depth
    if last == 0:
        raise UserError(
            f"image_size {image_size[0]}x{image_size[1]} is too small for depth {depth}: no pixel is left "
            f"after {depth} halvings; choose a smaller depth"
        )
    return last
