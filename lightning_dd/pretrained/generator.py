"""The small generator of latents, trained on the real data once."""

import torch
from torch import Tensor, nn

from lightning_dd.data.cache import shapes_of
from lightning_dd.models.generator import Generator, ImageEncoder
from lightning_dd.pretrained.task import Made, Task, fit, train_once
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded

_KL_WEIGHT = 4.0
_FIRST_KL_WEIGHT = 40.0


def train_generator(generator: Generator, width: int, steps: int, lr: float, seed: int, task: Task) -> None:
    """Give the small generator its weights, in place, from the cache or trained now.

    Args:
        generator: gets the weights.
        width: channels of its last block.
        steps: training steps.
        lr: peak learning rate of Adam.
        seed: of the encoder's weights, batches and latents.
        task: the run's data.

    Raises:
        UserError: nothing is in the cache and nothing may be trained, or the training diverged.
    """
    recipe = Recipe(steps=steps, lr=lr, batch_size=64, warmup=steps // 20, final_lr=0.0)

    def make() -> Made:
        device = next(generator.parameters()).device
        _train(generator.requires_grad_(True), recipe, width, seed, task)
        generator.to(device).requires_grad_(False)
        if not all(bool(torch.isfinite(value).all()) for value in generator.state_dict().values()):
            raise UserError(f"training the generator of latents diverged: lower latents' lr, which is {lr}")
        return generator.state_dict(), {}

    settings = {"steps": steps, "lr": lr, "batch_size": recipe.batch_size}
    identity = {"width": width, "latent_size": generator.latent_size, "recipe": settings, "seed": seed}
    made = train_once("generators", identity, make, task, "the generator of latents", shapes_of(generator.state_dict()))
    generator.load_state_dict(made.tensors())


def _train(generator: Generator, recipe: Recipe, width: int, seed: int, task: Task) -> None:
    """Train a generator as the decoder of a class-conditional variational auto-encoder, in pixel space.

    A likelihood has no opponent: it cannot collapse and has no balance to tune, so it trains on a few thousand images
    in a minute or two and on any data. The price, soft images, matters little where latents are optimised afterwards.
    The loss per pixel and channel is ``1/2 log(mse) + weight KL / D``: the Gaussian likelihood at its best variance
    (Rybkin et al. 2021, arXiv 2006.13202), which needs no scale of the data. ``weight`` falls from 40 to 4 over the
    first half. At first latents are thus too dear to carry what the class already says; otherwise they learn the class
    as well, and random ones then show another class than the one asked for.
    """
    with seeded(derive_seed(seed, "encoder")):
        encoder = ImageEncoder(task.facts.num_classes, task.facts.image_shape, width, generator.latent_size)
    size = len(task.train), task.facts.num_classes
    stream, steps = task.stream(recipe.batch_for(*size), seed), recipe.steps_for(*size)

    def loss_at(step: int) -> Tensor:
        rows = stream.next()
        pixels = task.train.pixels(rows).to(task.device)
        classes = task.train.labels[rows].to(task.device)
        mean, log_variance = encoder(pixels, classes)
        noise = torch.randn(mean.shape, generator=make_generator(seed, "latents", step)).to(task.device)
        made = generator(mean + noise * (log_variance / 2).exp(), classes)
        error = (made - pixels).square().mean()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        weight = max(_KL_WEIGHT, _FIRST_KL_WEIGHT * (1 - 2 * step / steps))
        loss: Tensor = error.clamp_min(1e-6).log() / 2 + weight * divergence / pixels[0].numel()
        return loss

    fit(task, nn.ModuleList([generator, encoder]), recipe, loss_at, "training the generator")
