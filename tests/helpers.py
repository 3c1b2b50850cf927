"""Small stand-ins shared by the tests: data, a network, a trainer."""

import inspect
import os

import torch
from pytorch_lightning import Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_dd.callbacks import PoolAlternation
from lightning_dd.data import RawSplit, RealData, Split, cache
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.base import Probe
from lightning_dd.models import Network
from lightning_dd.models.factory import NetworkMixture
from lightning_dd.pretrained.classifier import Committee, Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic import Pixels, SyntheticSet


class TinyData(RealData):
    """Class-dependent blobs, 3 classes of 8 x 8 images: learnable in a few steps."""

    classes = 3
    per_class = 12
    channels = 1
    side = 8

    def read(self, *, train: bool) -> RawSplit:
        generator = torch.Generator().manual_seed(int(train))
        labels = torch.arange(self.classes).repeat(self.per_class)
        images = torch.randint(0, 60, (len(labels), self.channels, self.side, self.side), generator=generator)
        for label in range(self.classes):
            images[labels == label, :, 2 * label : 2 * label + 3] += 150
        return RawSplit(images.to(torch.uint8), labels, tuple(f"class{index}" for index in range(self.classes)))


class LinearNetwork(Network):
    """features = W x, logits = V features: small enough for closed forms."""

    def __init__(self, pixels: int = 64, num_features: int = 5, num_classes: int = 3) -> None:
        super().__init__()
        self.num_features, self.num_classes = num_features, num_classes
        self.body = nn.Linear(pixels, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images.flatten(1))

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)


def tiny_trainer(folder, max_steps: int = 4, **kwargs) -> Trainer:
    """A quiet CPU Trainer with the clock of the inner steps."""
    # Lightning leaves the port of its first launch in the environment, and by the next one somebody else may have it.
    os.environ.pop("MASTER_PORT", None)
    settings = {
        "max_steps": max_steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "default_root_dir": folder,
        "callbacks": [PoolAlternation()],
    }
    return Trainer(**(settings | kwargs))


def split_of(images: Tensor, labels: Tensor) -> Split:
    """Normalised images as a split that gives them as they are."""
    return Split(images, labels)


def other_shapes(path):
    """Plant tensors of another shape in a file of the cache, which is whole in all else."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: torch.cat([value.reshape(-1)] * 2) for name, value in load_file(path).items()}
    if "checksum" in metadata:
        metadata["checksum"] = cache._checksum(*(tensors[name] for name in sorted(tensors)))
    save_file(tensors, path, metadata)


def committee_of(network: Network) -> Committee:
    """One teacher as a committee."""
    return Committee([network], NetworkMixture.parse("one"))


def make_distilled(
    ipc: int = 1, data: type[RealData] = TinyData, label_kind: str = "learned", data_name=None, **changes
):
    """A distilled set made of real images of ``data``, as if it had been distilled with ``conv``."""
    real = data()
    real.setup("fit")
    synthetic = SyntheticSet(Pixels(), ipc, label_kind, Task.of(real))
    synthetic.parameterisation.start("real", real.train, ipc, torch.Generator().manual_seed(0))
    settings = {
        "images": synthetic.images.detach(),
        "labels": synthetic.labels.detach(),
        "classes": synthetic.classes,
        "label_kind": label_kind,
        "class_names": real.facts.class_names,
        "preprocessing": real.preprocessing,
        "data": real.origin() | {"name": data_name or real.name},
        "method": "Test",
        "config": {"architecture": "conv:width=4,depth=2"},
    }
    return DistilledSet(**(settings | changes))


TINY_SETTINGS = {
    "real_batch_size": 8,
    "pool_size": 1,
    "inner_batch_size": 4,
    "probe": Probe(steps=1),
    "teacher": Teacher("convnet:width=4,depth=2,norm=batch", steps=2),
    "inner_steps": 2,
    "real_per_class": 6,
    "experts": 1,
    "trajectory_epochs": 2,
    "expert_epochs": 1,
    "max_start_epoch": 1,
    "syn_steps": 2,
}
"""What makes a distiller of any kind run in a blink, where it has the setting."""


def accepted_settings(cls) -> set[str]:
    """The names of all arguments of a class and of those its ``**kwargs`` go to."""
    return {name for base in cls.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}


def tiny_settings(cls) -> dict:
    """The tiny settings that a distiller class accepts."""
    accepted = accepted_settings(cls)
    return {name: value for name, value in TINY_SETTINGS.items() if name in accepted}
