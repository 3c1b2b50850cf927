"""Train the small generator of latent sets on the real data once, keep it on disk, and load it the next time."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dd.data.cache import cache_folder
from lightning_dd.data.facts import DataFacts
from lightning_dd.data.images import Split
from lightning_dd.data.sampling import ShuffledStream, StepCounter, pass_through
from lightning_dd.models.generator import Generator, ImageEncoder
from lightning_dd.pretrained.architectures import NamedBar
from lightning_dd.pretrained.task import Task
from lightning_dd.students.recipe import warmup_cosine
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded

_log = logging.getLogger(__name__)
_HEADER = "lightning_dd_generator"
_VERSION = 1
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

    The first process trains, the others read. The cache's key covers data, preprocessing, the generator's sizes,
    recipe and seed.

    Args:
        generator: gets the weights.
        recipe: how it is trained.
        width: channels of its last block.
        seed: of the encoder's weights, batches and latents.
        task: the run's data.

    Raises:
        UserError: nothing is in the cache and nothing may be trained, or the training diverged.
    """
    identity = _identity(task.facts, width, generator.latent_size, recipe, seed)
    path = _cached(identity)
    with task.first_process_first("generator"):
        if _load(path, generator):
            return
        if not task.train_missing:
            raise UserError(
                "the generator of latents is not trained on this data yet, and train_missing is false: run the same "
                "command with train_missing=true"
            )
        training = GeneratorTask(generator, task.train, task.facts, width, recipe, seed)
        _train(training, task.accelerator)
        if not all(bool(torch.isfinite(value).all()) for value in generator.state_dict().values()):
            raise UserError(f"training the generator of latents diverged: lower latents' lr, which is {recipe.lr}")
        _keep(path, generator, identity)


class GeneratorTask(LightningModule):
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


def _train(task: GeneratorTask, accelerator: str) -> None:
    """Train in place by an ordinary Lightning fit."""
    trainer = Trainer(
        max_steps=task.recipe.steps,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=10,
        callbacks=[NamedBar("training the generator")],
    )
    generator = task.generator
    device = next(generator.parameters()).device
    generator.requires_grad_(True)
    trainer.fit(task, pass_through(StepCounter(task.recipe.steps)))
    generator.to(device).requires_grad_(False)


def _identity(facts: DataFacts, width: int, latent_size: int, recipe: GeneratorRecipe, seed: int) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "data": facts.fingerprint,
        "class_names": list(facts.class_names),
        "preprocessing": facts.preprocessing,
        "width": width,
        "latent_size": latent_size,
        "recipe": asdict(recipe),
        "seed": seed,
    }


def _cached(identity: dict[str, Any]) -> Path:
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / "generators" / f"{key}.safetensors"


def _load(path: Path, generator: Generator) -> bool:
    """Fill the generator from the cache; return whether a good file was there."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        _log.warning("a damaged file in the generator cache is replaced: %s", path.name)
        return False
    generator.load_state_dict(state)
    return True


def _keep(path: Path, generator: Generator, header: dict[str, Any]) -> None:
    state = {name: value.cpu().contiguous() for name, value in generator.state_dict().items()}
    try:
        write_atomically(path, lambda temporary: save_file(state, temporary, {_HEADER: json.dumps(header)}))
    except UserError as error:
        _log.warning("the trained generator is not cached: %s", error)
