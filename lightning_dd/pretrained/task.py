"""What a run distils: the facts of its real data, their preprocessing, and the images themselves."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pytorch_lightning import Trainer

from lightning_dd.data.base import RealData
from lightning_dd.data.facts import DataFacts
from lightning_dd.data.images import Split
from lightning_dd.data.preprocess import Preprocessing


@dataclass(frozen=True)
class Task:
    """What is distilled. Made in ``setup``, or read from a checkpoint, which knows all but the images.

    Args:
        facts: what the data says of itself.
        preprocessing: from pixels in [0, 1] to the images that networks see.
        origin: how a distilled set remembers the data (:meth:`~lightning_dd.data.RealData.origin`).
        images: training images, and validation images where a split was cut; ``None`` outside a run.
        trainer: of the run, for its device and processes; ``None`` outside one.
        train_missing: train networks that the cache lacks; otherwise refuse.
    """

    facts: DataFacts
    preprocessing: Preprocessing
    origin: dict[str, Any]
    images: tuple[Split, Split | None] | None = field(default=None, repr=False)
    trainer: Trainer | None = field(default=None, repr=False)
    train_missing: bool = True

    @classmethod
    def of(cls, data: RealData, trainer: Trainer | None = None, train_missing: bool = True) -> "Task":
        """Return the task of real data that is set up."""
        if data.train is None or data.preprocessing is None:
            raise RuntimeError("the real data is not set up: call its setup() first")
        return cls(data.facts, data.preprocessing, data.origin(), (data.train, data.val), trainer, train_missing)

    def through(self, preprocessing: Preprocessing) -> "Task":
        """Return the task with its images through another map from pixels."""
        if self.images is None:
            return replace(self, preprocessing=preprocessing)
        train, val = self.images
        seen = train.through(preprocessing), None if val is None else val.through(preprocessing)
        return replace(self, preprocessing=preprocessing, images=seen)

    def identity(self) -> dict[str, Any]:
        """Return what a network trained on this data depends on: images, classes and the map they went through."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.preprocessing.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return {
            "data": self.facts.fingerprint,
            "class_names": list(self.facts.class_names),
            "preprocessing": digest.hexdigest(),
        }

    @property
    def train(self) -> Split:
        """The training images.

        Raises:
            RuntimeError: there is no run.
        """
        if self.images is None:
            raise RuntimeError("real images are there only while a Trainer runs")
        return self.images[0]

    @property
    def judges(self) -> Split:
        """The validation images, or the training images where no split was cut: enough to tell a network at chance."""
        return self.train if self.images is None or self.images[1] is None else self.images[1]

    @property
    def device(self) -> torch.device:
        """Where the run computes; the CPU outside one."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    @property
    def accelerator(self) -> str:
        """Lightning's name of that kind of device, for the Trainer of a stage before the run."""
        return "gpu" if self.device.type == "cuda" else self.device.type

    @contextmanager
    def first_process_first(self, name: str) -> Iterator[None]:
        """Run a block on the first process and then on the others, so that one fills a cache and all read it."""
        if self.trainer is not None and not self.trainer.is_global_zero:
            self.trainer.strategy.barrier(name)
        yield
        if self.trainer is not None and self.trainer.is_global_zero:
            self.trainer.strategy.barrier(name)
