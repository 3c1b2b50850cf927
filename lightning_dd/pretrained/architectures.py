"""Train an architecture on the real data once, keep it on disk, and load it the next time."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_dd.augment.frepo import default_strategy
from lightning_dd.data.cache import cache_folder
from lightning_dd.data.facts import DataFacts
from lightning_dd.data.images import Split
from lightning_dd.data.sampling import EvalBatches, StepCounter, pass_through
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import rest
from lightning_dd.pretrained.classifier import RealClassifier
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically
from lightning_dd.utils.seeding import derive_seed
from lightning_dd.utils.silence import wants_bars

_log = logging.getLogger(__name__)
_HEADER = "lightning_dd_architecture"
_VERSION = 2


@dataclass(frozen=True)
class ArchitectureRecipe:
    """How an architecture is trained on the real data.

    Args:
        steps: training steps.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        batch_size: images per step.

    Raises:
        UserError: a number is out of range.
    """

    steps: int = 1000
    lr: float = 2e-3
    weight_decay: float = 0.01
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise UserError(
                "architecture training needs steps and batch_size >= 1, lr > 0 and weight_decay >= 0, got "
                f"{self.steps}, {self.batch_size}, {self.lr} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class Trained:
    """A frozen network and how well it does."""

    network: Network
    accuracy: float
    """Validation accuracy in [0, 1]."""


def trained_architecture(
    architecture: str,
    train: Split,
    val: Split,
    facts: DataFacts,
    recipe: ArchitectureRecipe,
    seed: int,
    accelerator: str = "auto",
    file: Path | str | None = None,
    preprocessing: str = "standardise",
    train_missing: bool = True,
) -> Trained:
    """Return an architecture trained on this data: from a given file, from the cache, or trained now.

    The cache's key covers everything that matters: data, preprocessing, architecture, recipe and seed.

    Args:
        architecture: a name of the factory.
        train: normalised training images and classes.
        val: the validation split, likewise.
        facts: what the data says of itself.
        recipe: how it is trained.
        seed: of weights, batches and augmentation.
        accelerator: Lightning's Trainer argument.
        file: a file written by this function for the same data, to be used instead.
        preprocessing: kind of the images' normalisation.
        train_missing: train what is not in the cache; otherwise refuse.

    Returns:
        The network in inference mode, without parameter gradients, on the CPU.

    Raises:
        UserError: the file is unusable or of other data, nothing is there and nothing may be trained, or the network is
            at chance on the validation split.
    """
    identity = {
        "version": _VERSION,
        "architecture": architecture,
        "data": facts.fingerprint,
        "class_names": list(facts.class_names),
        "preprocessing": preprocessing,
        "recipe": asdict(recipe),
        "seed": seed,
    }
    network = build_network(
        architecture, facts.num_classes, facts.image_shape, derive_seed(seed, "architecture", architecture)
    )
    if file is not None:
        try:
            return _checked(architecture, _load(Path(file), network, identity), facts)
        except SafetensorError as error:
            raise UserError(f"architecture file '{file}': not a safetensors file, or truncated ({error})") from None
    path = _cached(identity)
    if path.is_file():
        try:
            return _checked(architecture, _load(path, network, identity), facts)
        except SafetensorError:
            _log.warning("a damaged file in the architecture cache is replaced: %s", path.name)
    if not train_missing:
        raise UserError(
            f"architecture '{architecture}' is not trained on this data yet, and train_missing is false: run the same "
            "command with train_missing=true, or name a file of it"
        )
    accuracy = _train(architecture, network, train, val, facts, recipe, seed, accelerator)
    trained = _checked(architecture, Trained(network, accuracy), facts)
    _keep(path, network, {**identity, "accuracy": accuracy})
    return trained


def _cached(identity: dict[str, Any]) -> Path:
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / "architectures" / f"{key}.safetensors"


def _keep(path: Path, network: Network, header: dict[str, Any]) -> None:
    state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    try:
        write_atomically(path, lambda temporary: save_file(state, temporary, {_HEADER: json.dumps(header)}))
    except UserError as error:
        _log.warning("the trained architecture is not cached: %s", error)


def _train(
    architecture: str,
    network: Network,
    train: Split,
    val: Split,
    facts: DataFacts,
    recipe: ArchitectureRecipe,
    seed: int,
    accelerator: str,
) -> float:
    """Train in place by an ordinary Lightning fit and return the validation accuracy."""
    classifier = RealClassifier(
        network,
        train,
        recipe.lr,
        recipe.weight_decay,
        recipe.batch_size,
        default_strategy(facts.mirror),
        derive_seed(seed, "classifier", architecture),
    )
    trainer = Trainer(
        max_steps=recipe.steps,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=10,
        callbacks=[NamedBar(f"training {architecture}")],
    )
    trainer.fit(classifier, pass_through(StepCounter(recipe.steps)))
    scores = Trainer(
        accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).validate(classifier, pass_through(EvalBatches(val, 500)), verbose=False)
    classifier.cpu()
    rest(network)
    return float(scores[0]["val/accuracy"])


def _checked(architecture: str, trained: Trained, facts: DataFacts) -> Trained:
    chance = 1 / facts.num_classes
    if trained.accuracy < 1.5 * chance:
        raise UserError(
            f"architecture '{architecture}' is at chance on the validation split ({100 * trained.accuracy:.1f} % of "
            f"{facts.num_classes} classes): train it longer or with another learning rate, or choose another"
        )
    return trained


def _load(path: Path, network: Network, identity: dict[str, Any]) -> Trained:
    if not path.is_file():
        raise UserError(f"architecture file '{path}': no such file")
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header is None:
        raise UserError(f"architecture file '{path}': not one written by lightning_dd")
    for name in ("architecture", "data", "class_names", "preprocessing"):
        if header[name] != identity[name]:
            raise UserError(
                f"architecture file '{path}' is of other {name}: {header[name]!r} there and {identity[name]!r} here"
            )
    network.load_state_dict(state)
    rest(network)
    return Trained(network, float(header["accuracy"]))


class NamedBar(TQDMProgressBar):
    """Lightning's bar with a name of what is trained before it."""

    def __init__(self, title: str) -> None:
        super().__init__(refresh_rate=20 if wants_bars() else 0)
        self._title = title

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Put the name there, after the base class has put its own."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self._title)
