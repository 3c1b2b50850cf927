"""What is trained on real data is trained once: kept in the cache by all it depends on, and read the next time."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_dd.data.cache import cache_folder
from lightning_dd.data.sampling import StepCounter, pass_through
from lightning_dd.pretrained.task import Task
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically
from lightning_dd.utils.silence import wants_bars

_log = logging.getLogger(__name__)
_HEADER = "lightning_dd_trained"
_VERSION = 3

Made = tuple[Mapping[str, Tensor], dict[str, Any]]
"""Tensors, and facts to keep beside them."""


@dataclass(frozen=True)
class Trained:
    """Tensors that were trained on real data, in a file as a rule."""

    facts: dict[str, Any]
    """What was kept beside them, as ``accuracy``."""
    file: Path | None
    """``None`` where the cache cannot be written."""
    _tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, on the CPU."""
        return dict(self._tensors) if self.file is None else load_file(self.file)


def train_once(kind: str, identity: Mapping[str, Any], make: Callable[[], Made], task: Task, what: str) -> Trained:
    """Return what is in the cache under an identity, or make it now.

    Of several processes of a run the first one makes it, and of several runs one: the others wait for its lock, which
    goes with the process that holds it.

    Args:
        kind: ``classifiers``, ``experts`` or ``generators``: a folder of the cache.
        identity: plain values, all that the result depends on.
        make: trains, and returns tensors and facts.
        task: the run's data and processes.
        what: how messages call it.

    Raises:
        UserError: it is not in the cache and may not be trained.
    """
    identity = {"version": _VERSION, **identity}
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = cache_folder() / kind / f"{key}.safetensors"
    with task.first_process_first(what):
        found = _find(path, identity)
        if found is not None:
            return found
        if not task.train_missing or task.images is None:
            raise UserError(
                f"{what} is not trained on this data yet, and train_missing is false: run the same command with "
                "train_missing=true (what is trained already is kept), or name a file of it"
            )
        with _alone(path):
            return _find(path, identity) or _keep(path, identity, *make())


def read_trained(path: Path, what: str) -> Trained:
    """Read a file of :func:`train_once` that the user names.

    Raises:
        UserError: it is missing, damaged, or of another origin.
    """
    if not path.is_file():
        raise UserError(f"{what} '{path}': no such file")
    try:
        header = _header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{what} '{path}': not a safetensors file, or truncated ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{what} '{path}': not one written by lightning_dd")
    return Trained({**header.get("identity", {}), **header.get("facts", {})}, path)


def fit_quietly(module: LightningModule, steps: int, accelerator: str, title: str) -> None:
    """Run an ordinary Lightning fit of ``steps`` steps that leaves nothing behind but the trained module.

    Args:
        module: draws its own batches.
        steps: training steps.
        accelerator: Lightning's Trainer argument.
        title: of the progress bar.
    """
    bar = _NamedBar(title)
    words = logging.getLogger("pytorch_lightning")
    level = words.level
    words.setLevel(max(level, logging.WARNING))  # a run may train a hundred experts
    try:
        trainer = Trainer(
            max_steps=steps,
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            log_every_n_steps=10,
            callbacks=[bar],
        )
        trainer.fit(module, pass_through(StepCounter(steps)))
    finally:
        words.setLevel(level)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state for a file: contiguous tensors on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def _find(path: Path, identity: Mapping[str, Any]) -> Trained | None:
    """Return what a good file of the cache holds; a damaged one is going to be replaced."""
    try:
        header = _header(path)
        if not isinstance(header, dict) or header["identity"] != identity:
            raise ValueError("it is of another origin")
        return Trained(header["facts"], path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        _log.warning("a damaged file in the cache is replaced: %s (%s)", path.name, error)
        return None


def _keep(path: Path, identity: Mapping[str, Any], tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Trained:
    metadata = {_HEADER: json.dumps({"identity": dict(identity), "facts": facts})}
    plain = {name: value.contiguous() for name, value in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))
    except UserError as error:
        _log.warning("what was trained is not cached: %s", error)
        return Trained(facts, None, plain)
    return Trained(facts, path)


def _header(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(_HEADER, "null"))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file of the cache; a cache that cannot be written needs none."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


class _NamedBar(TQDMProgressBar):
    """Lightning's bar with a name of what is trained before it."""

    def __init__(self, title: str) -> None:
        super().__init__(refresh_rate=20 if wants_bars() else 0)
        self._title = title

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Put the name there, after the base class has put its own."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self._title)
