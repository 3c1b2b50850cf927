"""Students trained from scratch on a memory, scored class by class."""

from typing import Any, cast

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.distilled import DistilledData
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.students import Student
from lightning_dd.students.recipe import Recipe


def score_student(
    architecture: str, memory: DistilledSet, real: RealData, recipe: Recipe, seed: int, accelerator: str = "auto"
) -> dict[str, Any]:
    """Train one student on a memory and test it on the classes the memory holds.

    The student has one output per class seen, so it cannot name a class that has not come yet.

    Args:
        architecture: a name of the factory.
        memory: what it learns from; all classes seen so far.
        real: real data of the same classes.
        recipe: how it is trained.
        seed: of weights, batches, augmentation and dropout.
        accelerator: Lightning's Trainer argument.

    Returns:
        ``accuracy`` on all test images and ``class_accuracy``, one per class; in [0, 1].
    """
    student = Student.with_recipe(architecture, recipe, seed)
    data = DistilledData.from_set(memory, real, recipe.batch_size, seed)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=recipe.steps_for(len(memory)),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=recipe.ema)] if recipe.ema else [],
    )
    trainer.fit(student, datamodule=data)
    predictions = cast(list[Tensor], trainer.predict(student, datamodule=data))
    assert real.test is not None
    return class_scores(torch.cat(predictions).argmax(1).cpu(), real.test.labels.cpu(), memory.num_classes)


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
