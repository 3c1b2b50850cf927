"""The small generator of latents, trained on the real data once."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from lightning_dd.data.facts import DataFacts
from lightning_dd.data.images import Split
from lightning_dd.data.sampling import ShuffledStream
from lightning_dd.models.generator import Generator, ImageEncoder
from lightning_dd.pretrained.once import Made, fit_quietly, state_of, train_once
from lightning_dd.pretrained.task import Task
from lightning_dd.students.recipe import warmup_cosine
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded

_KL_WEIGHT = 4.0
_FIRST_KL_WEIGHT = 40.0


@dataclass(frozen=True)
class GeneratorRecipe:
    """How the small generator is trained on the real data.

    Args:
        steps: training steps.
        lr: peak learning rate of Adam.
        batch_size: images per step.
    """

    steps: int = 2000
    lr: float = 2e-3
    batch_size: int = 64


def prepare_generator(generator: Generator, recipe: GeneratorRecipe, width: int, seed: int, task: Task) -> None:
    """Give the small generator its weights, in place, from the cache or trained now.

    Args:
        generator: gets the weights.
        recipe: how it is trained.
        width: channels of its last block.
        seed: of the encoder's weights, batches and latents.
        task: the run's data.

    Raises:
        UserError: nothing is in the cache and nothing may be trained, or the training diverged.
    """

    def make() -> Made:
        device = next(generator.parameters()).device
        generator.requires_grad_(True)
        training = GeneratorTraining(generator, task.train, task.facts, width, recipe, seed)
        fit_quietly(training, recipe.steps, task.accelerator, "training the generator")
        generator.to(device).requires_grad_(False)
        if not all(bool(torch.isfinite(value).all()) for value in generator.state_dict().values()):
            raise UserError(f"training the generator of latents diverged: lower latents' lr, which is {recipe.lr}")
        return state_of(generator), {}

    sizes = {"width": width, "latent_size": generator.latent_size}
    identity = {**sizes, "recipe": asdict(recipe), "seed": seed, **task.identity()}
    made = train_once("generators", identity, make, task, "the generator of latents")
    generator.load_state_dict(made.tensors())


class GeneratorTraining(LightningModule):
    """Train a generator as the decoder of a class-conditional variational auto-encoder, in pixel space.

    A likelihood has no opponent: it cannot collapse and has no balance to tune, so it trains on a few thousand images
    in a minute or two and on any data. The price, soft images, matters little where latents are optimised afterwards.
    The loss per pixel and channel is ``1/2 log(mse) + weight KL / D``: the Gaussian likelihood at its best variance
    (Rybkin et al. 2021, arXiv 2006.13202), which needs no scale of the data. ``weight`` falls from 40 to 4 over the
    first half. At first latents are thus too dear to carry what the class already says; otherwise they learn the class
    as well, and random ones then show another class than the one asked for.

    Args:
        generator: trained in place.
        train: normalised images and their classes.
        facts: what the data says of itself.
        width: channels of the encoder's first convolution.
        recipe: how.
        seed: of the encoder's weights, batches and latents.
    """

    def __init__(
        self,
        generator: Generator,
        train: Split,
        facts: DataFacts,
        width: int,
        recipe: GeneratorRecipe,
        seed: int,
    ) -> None:
        super().__init__()
        self.generator, self.recipe, self.seed = generator, recipe, seed
        with seeded(derive_seed(seed, "encoder")):
            self.encoder = ImageEncoder(facts.num_classes, facts.image_shape, width, generator.latent_size)
        self._train = train  # a tuple: not a buffer, and not in the checkpoint
        order = make_generator(seed, "order", device=train.labels.device)
        self._stream = ShuffledStream(len(train.labels), recipe.batch_size, order)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One step on a batch of its own; ``batch`` only counts."""
        rows = self._stream.next()
        pixels = self._train.pixels(rows).to(self.device)
        classes = self._train.labels[rows].to(self.device)
        mean, log_variance = self.encoder(pixels, classes)
        noise = torch.randn(mean.shape, generator=make_generator(self.seed, "latents", batch_idx)).to(self.device)
        made = self.generator(mean + noise * (log_variance / 2).exp(), classes)
        error = (made - pixels).square().mean()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        loss: Tensor = error.clamp_min(1e-6).log() / 2 + self._weight(batch_idx) * divergence / pixels[0].numel()
        self.log("generator/error", error.detach(), prog_bar=True)
        self.log("generator/kl", divergence.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return Adam with a warm-up of a twentieth of the run and a cosine to 0."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.recipe.lr, fused=True)
        steps = self.recipe.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, steps // 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _weight(self, step: int) -> float:
        return max(_KL_WEIGHT, _FIRST_KL_WEIGHT * (1 - 2 * step / self.recipe.steps))
