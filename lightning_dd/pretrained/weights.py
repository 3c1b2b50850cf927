"""Weights that others trained: those timm and torchvision publish, and files, of which nothing is executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_dd.data.imagenet import imagenet_names
from lightning_dd.data.images import DataFacts
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.models.factory import ArchitectureSpec
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError, first_line
from lightning_dd.utils.files import load_torch

_CONTAINERS = ("state_dict", "model", "net")
_CLOSE = 1e-3


def read_weights(file: Path, setting: str = "teacher.file") -> dict[str, Tensor]:
    """Read the weights of a network: safetensors, or a PyTorch file that holds tensors, perhaps under ``state_dict``.

    Args:
        file: where they are.
        setting: that names it, for messages.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    if not file.is_file():
        raise UserError(f"{setting} '{file}': no such file")
    if file.suffix == ".safetensors":
        try:
            found: Any = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{setting} '{file}' is not a safetensors file ({first_line(error)})") from None
    else:
        found = load_torch(file, setting)
        for name in _CONTAINERS:
            if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
                found = found[name]
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{setting} '{file}' must hold a network's tensors by name, perhaps under 'state_dict'")
    return {str(name).removeprefix("module."): value for name, value in found.items()}  # of DataParallel


def fetch_weights(
    architecture: str, weights: str, preprocessing: Preprocessing, setting: str = "teacher.weights"
) -> dict[str, Tensor]:
    """Return weights that a library publishes, from its own cache or the network.

    Args:
        architecture: a name of timm or torchvision, without options.
        weights: ``default``, or a name as ``IMAGENET1K_V1`` of torchvision and ``a1_in1k`` of timm.
        preprocessing: of the run, which must be that of the weights.
        setting: that names them, for messages.

    Raises:
        UserError: there are no such weights, they cannot be fetched, or they are of images normalised in another way.
    """
    spec = ArchitectureSpec.parse(architecture)
    prefix, _, name = spec.name.rpartition("/")
    if spec.options:
        raise UserError(f"{setting} are of architectures as published, without options, got '{architecture}'")
    try:
        read = _from_torchvision if prefix == "torchvision" else _from_timm
        state, mean, std = read(name, weights)
    except Exception as error:  # whatever a library raises for an unknown name or a host that cannot be reached
        raise UserError(f"{setting} '{weights}' of '{architecture}' cannot be had: {first_line(error)}") from None
    given = torch.tensor([mean, std])
    ours = torch.stack([preprocessing.mean.cpu(), preprocessing.std.cpu()])
    if preprocessing.kind != "standardise" or ours.shape != given.shape or not torch.allclose(ours, given, atol=_CLOSE):
        raise UserError(
            f"{setting} '{weights}' of '{architecture}' are of images standardised by their own numbers: set "
            f"data.preprocessing=standardise, data.mean={list(mean)} and data.std={list(std)}"
        )
    return state


def _from_torchvision(name: str, weights: str) -> tuple[dict[str, Tensor], list[float], list[float]]:
    import torchvision

    known = torchvision.models.get_model_weights(name)
    chosen = known.DEFAULT if weights == "default" else known[weights]
    shown = chosen.transforms()
    return dict(chosen.get_state_dict(progress=False)), list(shown.mean), list(shown.std)


def _from_timm(name: str, weights: str) -> tuple[dict[str, Tensor], list[float], list[float]]:
    import timm

    model: Any = timm.create_model(name if weights == "default" else f"{name}.{weights}", pretrained=True)
    return dict(model.state_dict()), list(model.pretrained_cfg["mean"]), list(model.pretrained_cfg["std"])


def fit_weights(network: Network, state: Mapping[str, Tensor], facts: DataFacts, what: str, head: bool = True) -> None:
    """Give a network the weights of its library's model, whose last layer may know all of ImageNet's classes.

    Args:
        network: of the same architecture and image size; changed in place.
        state: by our names, or by the library's.
        facts: of the data; of a part of ImageNet, its rows of the last layer are used, found by torchvision's names.
        what: how messages call the weights.
        head: take the last layer too; otherwise it stays as it is.

    Raises:
        UserError: the weights do not fit.
    """
    own = network.state_dict()
    names = {name.removeprefix("trunk."): name for name in own}
    fitted = {}
    for name, value in state.items():
        last = name.rpartition(".")[2]
        fitted[name if name in own else names.get(name, f"head.{last}")] = value
    if not head:
        state = fitted | {name: value for name, value in own.items() if name.startswith("head.")}
        fitted = dict(state)
    rows = _rows(facts) if len(fitted.get("head.bias", ())) == 1000 != facts.num_classes else None
    if rows is not None:
        fitted |= {name: fitted[name][rows] for name in ("head.weight", "head.bias")}
    missing = [name for name in own if name not in fitted]
    other = [name for name in own if name in fitted and fitted[name].shape != own[name].shape]
    if missing or other or len(fitted) != len(state):
        found = f"'{(other or missing or ['the last layer'])[0]}' is missing or has another shape"
        raise UserError(f"{what} do not fit images of {facts.image_shape} and {facts.num_classes} classes: {found}")
    network.load_state_dict(fitted)


def _rows(facts: DataFacts) -> list[int] | None:
    """Return the places of the data's classes among ImageNet's; ``None`` where one is not there."""
    places = {name: place for place, name in enumerate(imagenet_names())}
    return [places[name] for name in facts.class_names] if set(facts.class_names) <= places.keys() else None
