"""How a student learns from a synthetic set, step by step. Plain torch.

Step k (its rows, views, augmentation, dropout and loss) is a function of the seed and of k. It is written once, here,
and two things take such steps: :class:`~lightning_dd.students.student.Student` under a Trainer, on any number of
devices, and :func:`train_student` in a bare loop. In one process on a CPU both give the same weights, bit for bit.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from lightning_dd.augment.frepo import Augmentation
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.views import SyntheticBatches
from lightning_dd.losses.labels import student_loss
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded


@dataclass(frozen=True)
class StudentStep:
    """What a student does with the k-th batch; ``seed`` is that of augmentation and dropout."""

    label_kind: str
    temperature: float
    temperature_squared: bool
    augmentation: Augmentation
    seed: int

    @classmethod
    def on(cls, distilled: DistilledSet, recipe: Recipe, seed: int, mirror: bool) -> "StudentStep":
        """Return the step for a set; views stored with a set are its augmentation, and there is no other then."""
        augmentation = Augmentation("none") if distilled.views is not None else recipe.augmentation(mirror)
        return cls(distilled.label_kind, distilled.temperature, recipe.temperature_squared, augmentation, seed)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, step: int, rank: int = 0) -> Tensor:
        """Augment a batch and return its loss.

        Args:
            network: maps images to logits ``(N, num_classes)``.
            images: ``(N, C, H, W)``, normalised.
            labels: ``(N, num_classes)``.
            step: k, counted from 0.
            rank: of this process among those that train one student.
        """
        images = self.augmentation(images, make_generator(self.seed, "augment", rank, step))
        with seeded(derive_seed(self.seed, "dropout", rank, step)):
            return student_loss(network(images), labels, self.label_kind, self.temperature, self.temperature_squared)


def take_steps(module: nn.Module, recipe: Recipe, steps: int, loss_at: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """Take training steps in a bare loop, and yield the loss of each once it is taken.

    Args:
        module: trained in place, in the mode it is in.
        recipe: optimizer and schedule.
        steps: how many.
        loss_at: the loss of a step, counted from 0.
    """
    optimizer = recipe.build_optimizer(module)
    scheduler = recipe.scheduler(optimizer, steps)
    for step in range(steps):
        with torch.enable_grad():
            loss = loss_at(step)
            torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.detach()


def train_student(
    network: Network,
    distilled: DistilledSet,
    recipe: Recipe,
    seed: int,
    stops: Collection[int] = (),
    at_stop: Callable[[nn.Module, int], None] = lambda network, taken: None,
    on_step: Callable[[Tensor, int], None] = lambda loss, taken: None,
    *,
    steps: int | None = None,
    one_step: StudentStep | None = None,
) -> Network:
    """Train a network on a synthetic set in a bare loop.

    Args:
        network: trained in place, on its device, and returned in inference mode.
        distilled: images, labels and what goes with them.
        recipe: how; its learning rate is taken as it is (:meth:`~lightning_dd.students.recipe.Recipe.suited_to` finds
            that of an architecture).
        seed: of batch order, augmentation and dropout.
        stops: numbers of steps after which ``at_stop`` is called.
        at_stop: gets a network in inference mode with the weights that would be tested then, and the steps taken.
        on_step: gets the loss of a step, and the steps taken.
        steps: how many, if not as many as the recipe says for this set.
        one_step: what is done with a batch, if not what set and recipe say.
    """
    device = next(network.parameters()).device
    network.to(memory_format=torch.channels_last)  # pooling is several times faster so on a CPU
    network.train().requires_grad_(True)
    steps = steps or recipe.steps_for(len(distilled), distilled.num_classes)
    batch_size = recipe.batch_for(len(distilled), distilled.num_classes)
    act = one_step or StudentStep.on(distilled, recipe, seed, distilled.mirror)
    average = None
    if recipe.ema:
        average = AveragedModel(network, avg_fn=get_ema_avg_fn(recipe.ema), use_buffers=True)  # type: ignore[no-untyped-call]
    images, labels = distilled.images.to(device), distilled.labels.to(device)
    views = distilled.views and distilled.views.to(device)
    batches = iter(SyntheticBatches(images, labels, batch_size, steps, seed, views=views))
    taken = take_steps(network, recipe, steps, lambda step: act.loss(network, *next(batches), step))
    for count, loss in enumerate(taken, start=1):
        if average is not None:
            average.update_parameters(network)
        on_step(loss, count)
        if count in stops:
            at_stop((network if average is None else average.module).eval(), count)
            network.train()
    if average is not None:
        network.load_state_dict(average.module.state_dict())
    return network.eval().requires_grad_(False)


def step_flops(architecture: str, recipe: Recipe, rows: int, num_classes: int, shape: tuple[int, int, int]) -> float:
    """Return about how many FLOPs a training step takes: convolutions and products of a forward pass, three times.

    Args:
        architecture: a name of the factory.
        recipe: of the student.
        rows: images it learns from.
        num_classes: of the data.
        shape: ``(C, H, W)`` of an image.
    """
    batch = min(rows, recipe.batch_for(rows, num_classes))
    return 3.0 * batch * _forward_flops(architecture, num_classes, shape)


@cache
def _forward_flops(architecture: str, num_classes: int, shape: tuple[int, int, int]) -> int:
    network = build_network(architecture, num_classes, shape, seed=0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape))
    return int(counter.get_total_flops())
