"""One class order of a continual experiment, with its data."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_dd.applications.continual.plan import JOINT, Plan, class_order, split_classes
from lightning_dd.data import ClassSubset
from lightning_dd.data.parts import save_preprocessing
from lightning_dd.distilled.datamodule import real_set
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.utils.seeding import derive_seed


class Course:
    """A class order: which classes each step brings, and the real images to distil, to score and to compare with.

    Preprocessing is that of the first step's classes for the whole course, as a learner who does not know later classes
    has to do it: published channel statistics where the data set has them, else statistics (and whitening matrices)
    fitted on the first step's training images.

    Args:
        plan: the experiment.
        number: the order's number, which is its seed.
        num_classes: of the data set.
        folder: where the order's files go.

    Raises:
        UserError: the steps do not divide the classes.
    """

    def __init__(self, plan: Plan, number: int, num_classes: int, folder: Path) -> None:
        self.plan, self.number, self.folder = plan, number, folder
        self.steps = split_classes(class_order(num_classes, number), plan.steps)

    def seen(self, step: int) -> list[int]:
        """Return the labels of all classes seen after ``step`` (from 0), in the order of their coming."""
        return [label for part in self.steps[: step + 1] for label in part]

    def seed(self, *names: str | int) -> int:
        """Return a seed for a purpose within this order, below 2^31."""
        return derive_seed(self.number, "continual", *names) % 2**31

    def memory_file(self, method: str, step: int) -> Path:
        """Return where the united memory of a method lies after ``step``."""
        return self.folder / method / f"step{step + 1}" / "memory.safetensors"

    def data_of(self, step: int) -> dict[str, Any]:
        """Return the configuration of a step's data: its own classes only."""
        arguments = {"classes": self.steps[step], "preprocessing_file": str(self._preprocessing_file)}
        return {
            "class_path": "lightning_dd.data.ClassSubset",
            "init_args": self.plan.data.as_source() | arguments,
        }

    def seen_data(self, step: int) -> ClassSubset:
        """Return the real data of all classes seen after ``step``, for scoring and the upper line alone."""
        return self._subset(self.seen(step), str(self._preprocessing_file))

    def joint_set(self, step: int) -> DistilledSet:
        """Return all real training images of the classes seen after ``step``, with hard labels."""
        data = self.seen_data(step)
        data.setup("fit")
        assert data.train is not None
        return real_set(data, *data.train.everything(), "hard", JOINT)

    @cached_property
    def _preprocessing_file(self) -> Path:
        """The map of the first step, written once."""
        spec = [self.plan.data.name, dict(self.plan.data.arguments), self.steps[0]]
        key = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=8).hexdigest()
        path = self.folder / f"preprocessing-{key}.safetensors"
        if not path.is_file():
            first = self._subset(self.steps[0])
            first.setup("fit")
            assert first.preprocessing is not None
            save_preprocessing(first.preprocessing, path)
        return path

    def _subset(self, classes: list[int], preprocessing_file: str | None = None) -> ClassSubset:
        return ClassSubset(classes=classes, preprocessing_file=preprocessing_file, **self.plan.data.as_source())
