"""Generator latents in place of pixels (GLaD: Cazenavette et al. 2023, arXiv 2305.01649)."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_dd.data.facts import DataFacts
from lightning_dd.data.images import Split
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.models.exported import ExportedGenerator
from lightning_dd.models.generator import Generator
from lightning_dd.synthetic.parameterisation import LatentOptions
from lightning_dd.synthetic.pixels import SyntheticSet
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import derive_seed, seeded

_DEFAULT_LEVEL = 2
_CLIP = 10.0
_INFINITY = 5.0

Render = Callable[..., Tensor]
"""From classes ``(n,)`` and latents ``(n, ...)`` to images ``(n, C, H, W)``, each row for itself."""


class LatentSet(SyntheticSet):
    """Images that a frozen generator makes of learnable latents; labels are those of any synthetic set.

    The small generator is cut at a level L (GLaD's space ``wp``): the map fed into block L and the styles of the blocks
    from L on are learned. Its pixels, in [0, 1], go through the data's preprocessing. A latent set starts from random
    samples of the generator, class by class; ``init`` says nothing to it. The map is cleaned and clipped once, there.

    Where there are more images than :attr:`LatentOptions.slice`, the generator runs without graph, and again slice by
    slice when the gradient comes back: the same gradient, and the memory of one slice (GLaD's memory trick).

    The small generator's weights are part of the state, so a checkpoint needs neither data nor training. It is built
    untrained; :func:`~lightning_dd.pretrained.prepare_generator` trains it.

    Args:
        ipc: images per class.
        num_classes: number of classes C.
        image_shape: ``(channels, height, width)``.
        label_kind: ``learned``, ``centred`` or ``hard``.
        options: which generator, where it is cut, how fast latents learn.
        preprocessing: the map from pixels to normalised space.

    Attributes:
        generator: the frozen generator.
        features: ``(n, c, h, w)`` parameter, the map; absent at level 0.
        styles: ``(n, blocks, 64)`` parameter; absent with a generator of the user's own.
        z: ``(n, d)`` parameter; only with a generator of the user's own.

    Raises:
        UserError: an option does not fit the generator or the data.
    """

    generator: Generator | ExportedGenerator

    def __init__(
        self,
        ipc: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
        label_kind: str,
        options: LatentOptions,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(ipc, num_classes, image_shape, label_kind)
        self.options = options
        self._preprocessing = preprocessing
        if options.generator is not None:
            self.generator = ExportedGenerator(options.generator, num_classes, image_shape, options.latent_size)
            self.level, shapes = 0, dict[str, tuple[int, ...]](z=(options.latent_size,))
        else:
            with seeded(derive_seed(options.seed, "generator")):
                self.generator = Generator(num_classes, image_shape, options.width, options.latent_size)
            self.level = _checked_level(options.level, self.generator)
            shapes = self.generator.latent_shapes(self.level)
        self.generator.requires_grad_(False)
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(len(self), *shape)))

    def make_learnable(self) -> None:
        """Leave it to the constructor, which knows the generator by then."""

    @property
    def latents(self) -> list[Tensor]:
        """What the generator is fed: the map and the styles, the styles, or z."""
        return [getattr(self, name) for name in self._names]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return a group for each kind of latents, at its multiple of ``lr``, and one for learned labels."""
        options = self.options
        scales = {"features": options.lr_features, "styles": options.lr_styles, "z": options.lr_styles, "labels": 1.0}
        learned = {name: getattr(self, name) for name in (*self._names, "labels")}
        return [
            {"params": [tensor], "lr": lr * scales[name], "name": name}
            for name, tensor in learned.items()
            if tensor.requires_grad
        ]

    @torch.no_grad()
    def start(self, init: str, train: Split, generator: torch.Generator) -> None:
        """Start from the generator's images of random z; ``init`` and the real images do not count.

        Args:
            init: ignored.
            train: ignored.
            generator: CPU generator of the draw.

        Raises:
            UserError: what the generator makes is not finite.
        """
        z = torch.randn(len(self), self.options.latent_size, generator=generator).to(self.classes.device)
        for rows in torch.split(torch.arange(len(self)), self.options.slice):
            for own, drawn in zip(self.latents, self._drawn(z[rows], self.classes[rows]), strict=True):
                own[rows] = drawn
        if not bool(torch.isfinite(self.render()).all()):
            raise UserError("latents: the generator's images of random latents hold NaN or infinite values")

    def render(self) -> Tensor:
        """Return the generator's images ``(n, C, H, W)`` in normalised space, with graph to the latents."""
        latents, rows = self.latents, self.options.slice
        if len(self) <= rows:
            return self._images(self.classes, *latents)
        images: Tensor = _InSlices.apply(self._images, rows, self.classes, *latents)
        return images

    def _drawn(self, z: Tensor, classes: Tensor) -> list[Tensor]:
        """Return the latents of random z ``(n, d)``."""
        if isinstance(self.generator, ExportedGenerator):
            return [z]
        styles = self.generator.styles(z, classes)
        if self.level == 0:
            return [styles]
        return [clean(self.generator.features(styles, self.level)), styles[:, self.level :]]

    def _images(self, classes: Tensor, *latents: Tensor) -> Tensor:
        """Run the generator's tail and the preprocessing in float32, whatever the precision around it.

        The images are the result that is kept, so they should not depend on the precision of a run.
        """
        device = latents[0].device
        if self._preprocessing.mean.device != device:
            self._preprocessing = self._preprocessing.to(device)
        with torch.autocast(device.type, enabled=False):
            pixels = self._pixels(classes, latents)
            return self._preprocessing(pixels.float()).to(latents[0].dtype)

    def _pixels(self, classes: Tensor, latents: Sequence[Tensor]) -> Tensor:
        if isinstance(self.generator, ExportedGenerator):
            return cast(Tensor, self.generator(latents[0], classes))
        if self.level == 0:
            styles = latents[0]
            return self.generator.pixels(self.generator.features(styles, 1), styles[:, 1:], 1)
        return self.generator.pixels(latents[0], latents[1], self.level)


class _InSlices(torch.autograd.Function):
    """Run a function of rows without graph, and once more, slice by slice with graph, for the gradient."""

    @staticmethod
    def forward(ctx: Any, render: Render, rows: int, classes: Tensor, *latents: Tensor) -> Tensor:
        ctx.render, ctx.rows = render, rows
        ctx.save_for_backward(classes, *latents)
        return torch.cat([render(*part) for part in _split(rows, classes, *latents)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Render part by part once more, with graph, and carry the images' gradient on to the latents."""
        classes, *latents = ctx.saved_tensors
        found = []
        for part, slope in zip(_split(ctx.rows, classes, *latents), torch.split(gradient, ctx.rows), strict=True):
            leaves = [tensor.detach().requires_grad_() for tensor in part[1:]]
            with torch.enable_grad():
                images = ctx.render(part[0], *leaves)
            found.append(torch.autograd.grad(images, leaves, slope))
        return None, None, None, *(torch.cat(parts) for parts in zip(*found, strict=True))


def build_synthetic(
    options: LatentOptions | None, ipc: int, facts: DataFacts, label_kind: str, preprocessing: Preprocessing
) -> SyntheticSet:
    """Return an empty set of pixels, or one of latents where there are options of latents; see :class:`LatentSet`."""
    if options is None:
        return SyntheticSet(ipc, facts.num_classes, facts.image_shape, label_kind)
    return LatentSet(ipc, facts.num_classes, facts.image_shape, label_kind, options, preprocessing)


def clean(features: Tensor) -> Tensor:
    """Return a map with NaN as 0, infinities as 5 with their sign, and all else clipped to [-10, 10] (GLaD's code).

    Example:
        >>> clean(torch.tensor([float("nan"), float("inf"), -float("inf"), 12.0, 3.0])).tolist()
        [0.0, 5.0, -5.0, 10.0, 3.0]
    """
    return torch.nan_to_num(features, nan=0.0, posinf=_INFINITY, neginf=-_INFINITY).clamp(-_CLIP, _CLIP)


def _split(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True))


def _checked_level(level: int | None, generator: Generator) -> int:
    if level is None:
        return min(_DEFAULT_LEVEL, generator.depth)
    if level > generator.depth:
        raise UserError(
            f"latents: level must be 0 to {generator.depth} (the generator's blocks for this image size), got {level}"
        )
    return level
