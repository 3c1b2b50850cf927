"""Class orders of continual learning: which classes each step brings, and the data that belongs to it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dd.applications import JOINT
from lightning_dd.data import ClassSubset
from lightning_dd.data.parts import save_preprocessing
from lightning_dd.distilled.datamodule import real_set
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import derive_seed


class Course:
    """A class order: which classes each step brings, and the real images to distil, to score and to compare with.

    Preprocessing is that of the first step's classes for the whole course, as a learner who does not know later classes
    has to do it: published channel statistics where the data set has them, else statistics (and whitening matrices)
    fitted on the first step's training images.

    Args:
        source: the data set, as the arguments ``source``, ``source_args`` and ``root`` of a ``ClassSubset``.
        number: the order's number, which is its seed.
        steps: the classes that come at each step, see :func:`split_classes`.
        folder: where the order's files go.
    """

    def __init__(self, source: Mapping[str, Any], number: int, steps: list[list[int]], folder: Path) -> None:
        self.source, self.number, self.steps, self.folder = source, number, steps, folder

    def seed(self, *names: str | int) -> int:
        """Return a seed for a purpose within this order, below 2^31."""
        return derive_seed(self.number, "continual", *names) % 2**31

    def memory_file(self, method: str, step: int) -> Path:
        """Return where the united memory of a method lies after ``step`` (from 0)."""
        return self.folder / method / f"step{step + 1}" / "memory.safetensors"

    def data_of(self, step: int) -> dict[str, Any]:
        """Return the configuration of a step's data: its own classes only."""
        arguments = {"classes": self.steps[step], "preprocessing_file": str(self._preprocessing_file)}
        return {"class_path": "lightning_dd.data.ClassSubset", "init_args": {**self.source, **arguments}}

    def seen_data(self, step: int) -> ClassSubset:
        """Return the real data of all classes seen after ``step``, for scoring and the upper line alone."""
        seen = [label for part in self.steps[: step + 1] for label in part]
        return ClassSubset(classes=seen, preprocessing_file=str(self._preprocessing_file), **self.source)

    def joint_set(self, step: int) -> DistilledSet:
        """Return all real training images of the classes seen after ``step``, with hard labels."""
        data = self.seen_data(step)
        data.setup("fit")
        assert data.train is not None
        return real_set(data, *data.train.everything(), "hard", JOINT)

    @cached_property
    def _preprocessing_file(self) -> Path:
        """The map of the first step, written once."""
        spec = [self.source["source"], self.source["source_args"], self.steps[0]]
        key = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=8).hexdigest()
        path = self.folder / f"preprocessing-{key}.safetensors"
        if not path.is_file():
            first = ClassSubset(classes=self.steps[0], **self.source)
            first.setup("fit")
            assert first.preprocessing is not None
            save_preprocessing(first.preprocessing, path)
        return path


def class_order(num_classes: int, seed: int) -> list[int]:
    """Return the order in which classes arrive: numpy's legacy ``RandomState(seed).permutation``.

    These are the orders of FRePo's and DM's published code, the same on every machine and version of numpy.

    Example:
        >>> class_order(10, 0)
        [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    """
    return [int(label) for label in np.random.RandomState(seed).permutation(num_classes)]


def split_classes(order: Sequence[int], steps: int) -> list[list[int]]:
    """Cut a class order into ``steps`` parts of as many classes each.

    Raises:
        UserError: the classes cannot be divided so, or a part would hold fewer than 2.

    Example:
        >>> split_classes([3, 1, 0, 2], 2)
        [[3, 1], [0, 2]]
    """
    count = len(order)
    fitting = [number for number in range(1, count // 2 + 1) if count % number == 0]
    if steps not in fitting:
        raise UserError(
            f"steps must divide the {count} classes into parts of at least 2 classes: "
            f"{', '.join(map(str, fitting))}; got {steps}"
        )
    return np.reshape(order, (steps, -1)).tolist()
