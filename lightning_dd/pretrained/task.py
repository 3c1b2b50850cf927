"""What a run distils, and what is trained on its real data once: classifiers, expert trajectories, generators."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pytorch_lightning import Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lightning_dd.data.base import RealData
from lightning_dd.data.cache import Shapes, cache_folder
from lightning_dd.data.images import DataFacts, Split
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.sampling import ShuffledStream
from lightning_dd.jobs import tensor_digest
from lightning_dd.students.loop import take_steps
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically
from lightning_dd.utils.finite import all_finite
from lightning_dd.utils.seeding import make_generator

_log = logging.getLogger(__name__)
_HEADER = "lightning_dd_trained"
_VERSION = 3
_POSTFIX_EVERY = 20  # steps between two looks at the loss, each of which waits for the device

Made = tuple[Mapping[str, Tensor], dict[str, Any]]
"""Tensors, and facts to keep beside them."""


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
        return {
            "data": self.facts.fingerprint,
            "class_names": list(self.facts.class_names),
            "preprocessing": tensor_digest(self.preprocessing.state_dict()),
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
    def validation(self) -> Split:
        """The validation images, or the training images where no split was cut: enough to tell a network at chance."""
        return self.train if self.images is None or self.images[1] is None else self.images[1]

    @property
    def device(self) -> torch.device:
        """Where the run computes; the CPU outside one."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def stream(self, batch_size: int, seed: int) -> ShuffledStream:
        """Return rows of the training images in batches of random order, for a training on them."""
        labels = self.train.labels
        return ShuffledStream(len(labels), batch_size, make_generator(seed, "order", device=labels.device))

    @contextmanager
    def first_process_first(self, name: str) -> Iterator[None]:
        """Run a block on the first process and then on the others, so that one fills a cache and all read it."""
        if self.trainer is not None and not self.trainer.is_global_zero:
            self.trainer.strategy.barrier(name)
        yield
        if self.trainer is not None and self.trainer.is_global_zero:
            self.trainer.strategy.barrier(name)


def fit(task: Task, module: nn.Module, recipe: Recipe, loss_at: Callable[[int], Tensor], title: str) -> None:
    """Train a module on real images in the students' bare loop, on the task's device.

    Args:
        task: the run's data and device; the progress bar is shown where the run shows its own.
        module: trained in place, in the mode it is in.
        recipe: steps, optimizer and schedule.
        loss_at: the loss of a step, counted from 0; it draws its own batch.
        title: of the progress bar.
    """
    steps = recipe.steps_for(len(task.train), task.facts.num_classes)
    taken = take_steps(module.to(task.device), recipe, steps, loss_at)
    hidden = task.trainer is not None and task.trainer.progress_bar_callback is None
    with tqdm(taken, title, steps, disable=hidden) as bar:
        for step, loss in enumerate(bar):
            if step % _POSTFIX_EVERY == 0 and not hidden:
                bar.set_postfix(loss=f"{float(loss):.3g}", refresh=False)


@dataclass(frozen=True)
class Trained:
    """Tensors that were trained on real data.

    Args:
        facts: what was kept beside them, as ``accuracy``.
        file: where they are; ``None`` where the cache cannot be written.
        unwritten: the tensors themselves in that case.
    """

    facts: dict[str, Any]
    file: Path | None
    unwritten: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, on the CPU."""
        return dict(self.unwritten) if self.file is None else load_file(self.file)


def train_once(
    kind: str,
    identity: Mapping[str, Any],
    make: Callable[[], Made],
    task: Task,
    what: str,
    shapes: Shapes,
) -> Trained:
    """Return what is in the cache under an identity, or make it now.

    Of several processes of a run the first one makes it, and of several runs one: the others wait for its lock, which
    goes with the process that holds it.

    Args:
        kind: ``classifiers``, ``experts`` or ``generators``: a folder of the cache.
        identity: plain values, all that the result depends on beside the task's own identity.
        make: trains, and returns tensors and facts.
        task: the run's data and processes.
        what: how messages call it.
        shapes: of the tensors; a file with others is damaged.

    Raises:
        UserError: it is not in the cache and may not be trained, or its training diverged.
    """
    identity = {"version": _VERSION, **identity, **task.identity()}
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = cache_folder() / kind / f"{key}.safetensors"
    with task.first_process_first(what):
        found = _find(path, identity, shapes)
        if found is not None:
            return found
        if not task.train_missing or task.images is None:
            raise UserError(
                f"{what} is not trained on this data yet, and train_missing is false: run the same command with "
                "train_missing=true (what is trained already is kept), or name a file of it"
            )
        with _locked(path):
            return _find(path, identity, shapes) or _keep(path, what, identity, *make())


def is_trained(path: Path) -> bool:
    """Whether a file was written by :func:`train_once`."""
    try:
        return bool(_header(path))
    except (SafetensorError, OSError, ValueError):
        return False


def read_trained(path: Path, what: str) -> Trained:
    """Read a file of :func:`train_once` that the user names; its identity is among the facts.

    Raises:
        UserError: it is missing, damaged, or of another origin.
    """
    if not path.is_file():
        raise UserError(f"{what} '{path}': no such file")
    try:
        header = _header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{what} '{path}': not one written by lightning_dd, or truncated ({error})") from None
    return Trained({**header["identity"], **header["facts"]}, path)


def _find(path: Path, identity: Mapping[str, Any], shapes: Shapes) -> Trained | None:
    """Return what a good file of the cache holds; a damaged one is going to be replaced."""
    try:
        header = _header(path)
        if header["identity"] != identity:
            raise ValueError("it is of another origin")
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if found != shapes:
            raise ValueError("its tensors have other shapes")
        return Trained(header["facts"], path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        _log.warning("a damaged file in the cache is replaced: %s (%s)", path.name, error)
        return None


def _header(path: Path) -> dict[str, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
    if not isinstance(header, dict) or not header.keys() >= {"identity", "facts"}:
        raise ValueError("its header is missing")
    return header


def _keep(
    path: Path, what: str, identity: Mapping[str, Any], tensors: Mapping[str, Tensor], facts: dict[str, Any]
) -> Trained:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if not all_finite(plain):
        raise UserError(f"{what}: its training diverged (NaN in its weights), nothing is kept: lower its learning rate")
    metadata = {_HEADER: json.dumps({"identity": identity, "facts": facts})}
    try:
        write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))
    except UserError as error:
        _log.warning("what was trained is not cached: %s", error)
        return Trained(facts, None, plain)
    return Trained(facts, path)


def _locked(path: Path) -> AbstractContextManager[Any]:
    """Hold the lock of a file of the cache; a cache that cannot be written needs none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_suffix(".lock")).acquire()
    except OSError:
        return nullcontext()
