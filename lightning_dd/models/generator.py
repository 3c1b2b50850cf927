"""Generators of images: a small class-conditional one, the encoder it is trained with, and one of the user's own."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dd.jobs import tensor_digest
from lightning_dd.models.factory import ArchitectureSpec
from lightning_dd.utils.arguments import find_class, user_asked
from lightning_dd.utils.errors import UserError, check_count, first_line
from lightning_dd.utils.seeding import make_generator

_STYLE_SIZE = 64
_SMALLEST_SIDE = 4
_LARGEST_GROWTH = 4
"""Channels of the first blocks relative to the last one's."""
_RANGE_SLACK = 1e-3
_FILES = (".pt", ".pth", ".pt2", ".ckpt", ".safetensors")


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


class OwnGenerator(nn.Module):
    """A class of the user's that maps latents ``(n, d)`` float32 and classes ``(n,)`` int64 to images in [0, 1].

    It is named by its path, as a network of one's own is, and imported: it is a program that the user wrote, and reads
    its weights as it likes. They are frozen, and it runs in inference mode::

        class Mine(torch.nn.Module):
            def __init__(self, file="mine.safetensors"):
                super().__init__()
                self.body = my_generator()
                self.body.load_state_dict(safetensors.torch.load_file(file))

            def forward(self, z, classes):  # whatever it needs, and its range moved to [0, 1]
                return (self.body(z, torch.nn.functional.one_hot(classes, 10)) + 1) / 2

    Of its weights a checkpoint holds the hash only: a resumed run makes it again, and nothing else does.

    Args:
        name: ``my_package.Mine``, with its constructor's arguments ``my_package.Mine:file=other.safetensors``.
        num_classes: classes are below this.
        image_shape: ``(C, H, W)`` the images must have.
        latent_size: d.

    Attributes:
        digest: ``(16,)`` uint8 buffer, the hash of its weights.

    Raises:
        UserError: it is no such class or cannot be made, or what it makes of two random latents has another shape, is
            not finite, outside [0, 1] or random.
    """

    digest: Tensor

    def __init__(self, name: str, num_classes: int, image_shape: tuple[int, int, int], latent_size: int) -> None:
        super().__init__()
        self.name, self.image_shape, self.latent_size = name, image_shape, latent_size
        program = _make(name).eval().requires_grad_(False)
        self._program = (program,)  # in a tuple: a registered module would enter the checkpoint
        digest = bytes.fromhex(tensor_digest(program.state_dict()))
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
        self._try(torch.tensor([0, num_classes - 1]))

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        """Map latents ``(n, latent_size)`` and classes ``(n,)`` to images ``(n, C, H, W)`` in [0, 1]."""
        images: Tensor = self._program[0].to(z.device)(z, classes)
        return images

    def _try(self, classes: Tensor) -> None:
        z = torch.randn(len(classes), self.latent_size, generator=make_generator(0, "try"))
        try:
            with torch.no_grad():
                images, again = self(z, classes), self(z, classes)
        except Exception as error:  # whatever a program of somebody else's raises
            why = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"generator '{self.name}' cannot run on latents of shape {tuple(z.shape)} and classes of shape (2,): "
                f"{why[-1]} (latents: latent_size sets the first)"
            ) from None
        expected = (len(classes), *self.image_shape)
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if got != expected:
            raise UserError(f"generator '{self.name}' must give images of shape {expected} for this data, got {got}")
        if not bool(torch.isfinite(images).all()):
            raise UserError(f"generator '{self.name}' gives NaN or infinite values")
        if not torch.equal(images, again):
            raise UserError(f"generator '{self.name}' gives other images for the same latents: switch its noise off")
        low, high = float(images.min()), float(images.max())
        if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
            raise UserError(f"generator '{self.name}' must give pixels in [0, 1], got [{low:.3g}, {high:.3g}]")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuse the state of other weights."""
        saved = state_dict.get(f"{prefix}digest")
        if saved is not None and not torch.equal(saved.cpu(), self.digest.cpu()):
            raise UserError(f"generator '{self.name}' has other weights than the checkpoint was made with")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _halvings(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return map sizes from the smallest to ``size``, each half of the next, rounded up; at least two."""
    sizes = [size]
    while len(sizes) == 1 or min(sizes[0]) > _SMALLEST_SIDE:
        height, width = sizes[0]
        sizes.insert(0, ((height + 1) // 2, (width + 1) // 2))
    return sizes


def _make(name: str) -> nn.Module:
    if not user_asked():
        raise UserError(f"generator '{name}' is a program, and none is run for a file: use the run's own sets")
    path = name.partition(":")[0]
    if "/" in path or "." not in path or path.endswith(_FILES):
        raise UserError(
            f"latents: generator '{name}' must be the path of a class of your own, as my_package.Mine: files that "
            "hold programs are not run"
        )
    spec = ArchitectureSpec.parse(name)
    cls: type[Any] = find_class(spec.name, nn.Module, "generator")
    try:
        made: nn.Module = cls(**spec.options)
    except Exception as error:  # whatever the user's class raises
        raise UserError(f"generator '{name}' cannot be made: {first_line(error)}") from error
    return made
