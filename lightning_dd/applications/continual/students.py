"""Students trained from scratch on a memory, scored class by class."""

from typing import Any

import torch
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.data.sampling import EvalBatches
from lightning_dd.distilled.datamodule import check_match
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.models.factory import build_network
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe


def score_student(
    architecture: str,
    memory: DistilledSet,
    real: RealData,
    recipe: Recipe,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train one student on a memory and test it on the classes the memory holds.

    The student has one output per class seen, so it cannot name a class that has not come yet.

    Args:
        architecture: a name of the factory.
        memory: what it learns from; all classes seen so far.
        real: real data of the same classes, not set up yet.
        recipe: how it is trained.
        seed: of weights, batches, augmentation and dropout.
        device: where.

    Returns:
        ``accuracy`` on all test images and ``class_accuracy``, one per class; in [0, 1].
    """
    real.use_preprocessing(memory.preprocessing)
    real.setup("test")
    check_match(memory, real)
    assert real.test is not None
    recipe = recipe.suited_to(architecture, memory.training.get("step_size"))
    network = build_network(architecture, memory.num_classes, memory.image_shape, seed).to(device)
    train_student(network, memory, recipe, seed)
    with torch.no_grad():
        answers = [network(images.to(device)).argmax(1).cpu() for images, _ in EvalBatches(real.test, 500)]
    return class_scores(torch.cat(answers), real.test.labels.cpu(), memory.num_classes)


def class_scores(answers: Tensor, labels: Tensor, num_classes: int) -> dict[str, Any]:
    """Return the accuracy on all images and on those of each class.

    Args:
        answers: ``(N,)`` int64.
        labels: true classes ``(N,)`` int64.
        num_classes: number of classes, each with test images.

    Example:
        >>> class_scores(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)["class_accuracy"]
        [0.5, 1.0]
    """
    right = torch.bincount(labels[answers == labels], minlength=num_classes).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    return {"accuracy": float(right.sum() / total.sum()), "class_accuracy": (right / total.clamp(min=1)).tolist()}
