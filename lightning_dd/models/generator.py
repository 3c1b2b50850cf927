"""A small class-conditional generator that can be cut at any of its blocks, and the encoder it is trained with."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dd.utils.errors import check_count

_STYLE_SIZE = 64
_SMALLEST_SIDE = 4
_LARGEST_GROWTH = 4
"""Channels of the first blocks relative to the last one's."""


class Generator(nn.Module):
    """From a latent vector and a class to an image: a mapping to styles, a start map, and blocks that double its side.

    A block is nearest up-sampling -> conv3x3 -> normalisation over the whole map -> scale and shift from its own
    style -> leaky ReLU, so the image is a function of one style for the start and one for each block, as in StyleGAN
    (Karras et al. 2019, arXiv 1812.04948), and the map fed into any block can take the place of what comes before.

    Args:
        num_classes: number of classes.
        image_shape: ``(C, H, W)`` of the images; sides are halved, rounding up, down to 4 for the start map.
        width: channels of the last block; the first ones have four times as many.
        latent_size: entries of the latent vector z.

    Attributes:
        depth: number of blocks B; they are counted from 1, and B is the one at full size.

    Raises:
        UserError: a count is not a whole number of at least 1.

    Example:
        >>> generator = Generator(10, (1, 28, 28), width=4)
        >>> generator.depth, generator.feature_shape(1), generator.feature_shape(3)
        (3, (16, 4, 4), (8, 14, 14))
        >>> generator(torch.zeros(2, 32), torch.tensor([0, 9])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], width: int = 16, latent_size: int = 32
    ) -> None:
        super().__init__()
        check_count("width", width)
        self.latent_size = check_count("latent_size", latent_size)
        sides = _halvings(image_shape[1:])
        self.depth = len(sides) - 1
        widths = [width * min(_LARGEST_GROWTH, 2 ** (self.depth - index)) for index in range(self.depth + 1)]
        widths[0] = widths[1]
        self._shapes = [(channels, *side) for channels, side in zip(widths, sides, strict=True)]
        self.embedding = nn.Embedding(num_classes, latent_size)
        self.mapping = nn.Sequential(
            nn.Linear(2 * latent_size, _STYLE_SIZE), nn.LeakyReLU(0.2), nn.Linear(_STYLE_SIZE, _STYLE_SIZE)
        )
        channels, height, breadth = self._shapes[0]
        self.start = nn.Linear(_STYLE_SIZE, channels * height * breadth)
        self.blocks = nn.ModuleList(
            _Block(inputs, outputs, sides[index + 1]) for index, (inputs, outputs) in enumerate(pairwise(widths))
        )
        self.to_pixels = nn.Conv2d(width, image_shape[0], 3, padding=1)

    def feature_shape(self, level: int) -> tuple[int, int, int]:
        """Return ``(channels, height, width)`` of the map fed into block ``level``, counted from 1."""
        return self._shapes[level - 1]

    def latent_shapes(self, level: int) -> dict[str, tuple[int, ...]]:
        """Return the shape, per image, of what is fed to the generator from ``level`` on.

        Level 0 is fed all styles, level L in 1 to B the map into block L and the styles of blocks L to B.
        """
        styles = (self.depth + 1 - level, _STYLE_SIZE)
        return {"features": self.feature_shape(level), "styles": styles} if level else {"styles": styles}

    def styles(self, z: Tensor, classes: Tensor) -> Tensor:
        """Map latents ``(n, latent_size)`` and classes ``(n,)`` to styles ``(n, B + 1, 64)``.

        The first is the start's, the others are the blocks'. The mapping gives one style for all places; whoever
        optimises styles may let them differ.
        """
        style: Tensor = self.mapping(torch.cat([z, self.embedding(classes)], 1))
        return style[:, None].repeat(1, self.depth + 1, 1)

    def features(self, styles: Tensor, level: int) -> Tensor:
        """Return the map ``(n, *feature_shape(level))`` fed into block ``level`` by styles ``(n, B + 1, 64)``."""
        x: Tensor = self.start(styles[:, 0]).view(-1, *self._shapes[0])
        return self._run(x, styles[:, 1:], range(level - 1))

    def pixels(self, features: Tensor, styles: Tensor, level: int) -> Tensor:
        """Return images ``(n, C, H, W)`` in [0, 1] from the map fed into block ``level`` and the styles from there on.

        Args:
            features: ``(n, *feature_shape(level))``.
            styles: ``(n, B + 1 - level, 64)``, of blocks ``level`` to B.
            level: 1 to B.
        """
        x = self._run(features, styles, range(level - 1, self.depth))
        return torch.sigmoid(self.to_pixels(x))

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        """Map latents ``(n, latent_size)`` and classes ``(n,)`` to images ``(n, C, H, W)`` in [0, 1]."""
        styles = self.styles(z, classes)
        return self.pixels(self.features(styles, 1), styles[:, 1:], 1)

    def _run(self, x: Tensor, styles: Tensor, blocks: range) -> Tensor:
        for place, index in enumerate(blocks):
            x = self.blocks[index](x, styles[:, place])
        return x


class _Block(nn.Module):
    """Up-sampling to a size, convolution, normalisation, modulation by a style, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(1, outputs, affine=False)
        self.modulation = nn.Linear(_STYLE_SIZE, 2 * outputs)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.norm(self.conv(F.interpolate(x, self.size, mode="nearest")))
        scale, shift = self.modulation(style)[:, :, None, None].chunk(2, 1)
        return F.leaky_relu(x * (1 + scale) + shift, 0.2)


class ImageEncoder(nn.Module):
    """From an image and its class to a normal distribution of latents; needed for training a generator only.

    Args:
        num_classes: number of classes.
        image_shape: ``(C, H, W)`` of the images.
        width: channels of the first convolution.
        latent_size: entries of the latent vector.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], width: int, latent_size: int) -> None:
        super().__init__()
        sides = _halvings(image_shape[1:])
        widths = [width * min(_LARGEST_GROWTH, 2**index) for index in range(len(sides) - 1)]
        inputs = [image_shape[0], *widths[:-1]]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip(inputs, widths, strict=True))
        self.embedding = nn.Embedding(num_classes, latent_size)
        height, breadth = sides[0]
        self.head = nn.Linear(widths[-1] * height * breadth + latent_size, 2 * latent_size)

    def forward(self, pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log-variances, both ``(n, latent_size)``, for images ``(n, C, H, W)`` in [0, 1]."""
        x = 2 * pixels - 1
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        mean, log_variance = self.head(torch.cat([x.flatten(1), self.embedding(classes)], 1)).chunk(2, 1)
        return mean, log_variance.clamp(-10, 10)


def _halvings(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return map sizes from the smallest to ``size``, each half of the next, rounded up; at least two."""
    sizes = [size]
    while len(sizes) == 1 or min(sizes[0]) > _SMALLEST_SIDE:
        height, width = sizes[0]
        sizes.insert(0, ((height + 1) // 2, (width + 1) // 2))
    return sizes
