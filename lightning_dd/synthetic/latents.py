"""Generator latents in place of pixels (GLaD: Cazenavette et al. 2023, arXiv 2305.01649)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dd.data.images import Split
from lightning_dd.models.generator import Generator, OwnGenerator
from lightning_dd.pretrained.generator import train_generator
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic.parameterisation import Parameterisation
from lightning_dd.utils.errors import UserError, check_count, check_range
from lightning_dd.utils.seeding import derive_seed, seeded

_DEFAULT_LEVEL = 2
_CLIP, _INFINITY = 10.0, 5.0
"""A map's largest entry at the start, and what stands for infinity there (GLaD's code)."""


class Latents(Parameterisation):
    """Images that a frozen generator makes of learnable latents.

    The small generator (:class:`~lightning_dd.models.generator.Generator`) is trained on the run's data once and
    cached. It is cut at a level L (GLaD's space ``wp``): the map fed into block L and the styles of the blocks from L
    on are learned. Its pixels, in [0, 1], go through the data's preprocessing. Latents start from random samples of the
    generator, class by class; ``init`` does not matter to them. The map is cleaned and clipped once, at the start.

    Where there are more images than ``slice``, the generator runs without graph, and again slice by slice when the
    gradient comes back: the same gradient, and the memory of one slice (GLaD's memory trick). The small generator's
    weights are part of the state, so a checkpoint needs neither data nor training.

    Args:
        generator: a generator of your own (:class:`~lightning_dd.models.generator.OwnGenerator`) in place of the
            small one.
        level: the block from which on the generator is used. 0 learns all styles and no map (of your own generator: its
            z), and the highest level is the generator's last block. ``None`` is block 2, or what there is.
        lr_features: learning rate of maps relative to the distiller's.
        lr_styles: learning rate of styles, or z, relative to the distiller's: a style acts on whole maps, so its
            gradient is larger than that of a map's entries (GLaD takes 0.001). Where styles are all that is learned and
            steps do not grow with the gradient (Adam, LAMB), 1 is right.
        slice: images per slice when the generator is run again for the gradient.
        latent_size: entries of z.
        width: channels of the small generator's last block.
        steps: training steps of the small generator.
        lr: their peak learning rate.
        seed: of the small generator's weights and batches; kept apart from the run's seed, so that runs share it.

    Attributes:
        features: ``(n, c, h, w)`` parameter, the map; absent at level 0.
        styles: ``(n, blocks, 64)`` parameter; absent with a generator of your own.
        z: ``(n, d)`` parameter; only with a generator of your own.

    Raises:
        UserError: a value is out of range, or (in :meth:`build`) does not fit the generator or the data.
    """

    generator: Generator | OwnGenerator
    classes: Tensor

    def __init__(
        self,
        generator: str | None = None,
        level: int | None = None,
        lr_features: float = 1.0,
        lr_styles: float = 0.1,
        slice: int = 50,
        latent_size: int = 16,
        width: int = 16,
        steps: int = 2000,
        lr: float = 2e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, count in (("slice", slice), ("latent_size", latent_size), ("width", width), ("steps", steps)):
            check_count(f"latents: {name}", count)
        check_range("positive", "latents: ", lr_features=lr_features, lr_styles=lr_styles, lr=lr)
        check_range("at least 0", "latents: ", level=level)
        if generator is not None and level:
            raise UserError(f"latents: level must be 0 with a generator of your own, which cannot be cut, got {level}")
        self.source, self.wanted_level, self.slice = generator, level, slice
        self.latent_size, self.width, self.seed = latent_size, width, seed
        self.lr_features, self.lr_styles = lr_features, lr_styles
        self.steps, self.lr = steps, lr

    def build(self, classes: Tensor, task: Task) -> None:
        """Make the generator, untrained, and the latents, all zero."""
        num_classes, image_shape = task.facts.num_classes, task.facts.image_shape
        self.register_buffer("classes", classes, persistent=False)
        self._preprocessing = task.preprocessing
        if self.source is not None:
            self.generator = OwnGenerator(self.source, num_classes, image_shape, self.latent_size)
            self.level, shapes = 0, dict[str, tuple[int, ...]](z=(self.latent_size,))
        else:
            with seeded(derive_seed(self.seed, "generator")):
                self.generator = Generator(num_classes, image_shape, self.width, self.latent_size)
            deepest = self.generator.depth
            self.level = min(_DEFAULT_LEVEL, deepest) if self.wanted_level is None else self.wanted_level
            if self.level > deepest:
                raise UserError(
                    f"latents: level must be 0 to {deepest} (the generator's blocks for this image size), "
                    f"got {self.level}"
                )
            shapes = self.generator.latent_shapes(self.level)
        self.generator.requires_grad_(False)
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(len(classes), *shape)))

    @property
    def latents(self) -> list[Tensor]:
        """What the generator is fed: the map and the styles, the styles, or z."""
        return [getattr(self, name) for name in self._names]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return a group for each kind of latents, at its multiple of ``lr``."""
        scales = {"features": self.lr_features, "styles": self.lr_styles, "z": self.lr_styles}
        return [{"params": [getattr(self, name)], "lr": lr * scales[name], "name": name} for name in self._names]

    def prepare(self, task: Task) -> None:
        """Give the small generator its weights, from the cache or trained now.

        Raises:
            UserError: it is in no cache and may not be trained, or its training diverged.
        """
        if isinstance(self.generator, Generator):
            train_generator(self.generator, self.width, self.steps, self.lr, self.seed, task)

    @torch.no_grad()
    def start(self, init: str, train: Split, ipc: int, generator: torch.Generator) -> None:
        """Start from the generator's images of random z; neither ``init`` nor the real images matter.

        Raises:
            UserError: what the generator makes is not finite.
        """
        z = torch.randn(len(self.classes), self.latent_size, generator=generator).to(self.classes.device)
        for rows in torch.split(torch.arange(len(z)), self.slice):
            for own, drawn in zip(self.latents, self._drawn(z[rows], self.classes[rows]), strict=True):
                own[rows] = drawn
        if not bool(torch.isfinite(self.render()).all()):
            raise UserError("latents: the generator's images of random latents hold NaN or infinite values")

    def render(self) -> Tensor:
        """Return the generator's images ``(n, C, H, W)``, normalised, with graph to the latents."""
        if len(self.classes) <= self.slice:
            return self._images(self.classes, *self.latents)
        slices = zip(*(torch.split(tensor, self.slice) for tensor in (self.classes, *self.latents)), strict=True)
        return torch.cat([checkpoint(self._images, *part, use_reentrant=False) for part in slices])

    def _drawn(self, z: Tensor, classes: Tensor) -> list[Tensor]:
        """Return the latents of random z ``(n, d)``."""
        if isinstance(self.generator, OwnGenerator):
            return [z]
        styles = self.generator.styles(z, classes)
        if self.level == 0:
            return [styles]
        features = torch.nan_to_num(self.generator.features(styles, self.level), 0.0, _INFINITY, -_INFINITY)
        return [features.clamp(-_CLIP, _CLIP), styles[:, self.level :]]

    def _images(self, classes: Tensor, *latents: Tensor) -> Tensor:
        """Run the generator's tail and the preprocessing in float32, whatever the precision around it.

        The images are the result that is kept, so they should not depend on the precision of a run.
        """
        device = latents[0].device
        self._preprocessing = self._preprocessing.to(device)
        with torch.autocast(device.type, enabled=False):
            pixels = self._pixels(classes, *latents)
            return self._preprocessing(pixels.float()).to(latents[0].dtype)

    def _pixels(self, classes: Tensor, *latents: Tensor) -> Tensor:
        if isinstance(self.generator, OwnGenerator):
            return cast(Tensor, self.generator(latents[0], classes))
        if self.level == 0:
            styles = latents[0]
            return self.generator.pixels(self.generator.features(styles, 1), styles[:, 1:], 1)
        return self.generator.pixels(latents[0], latents[1], self.level)
