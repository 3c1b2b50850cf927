"""Networks by name: ``conv``, ``resnet18:channels=[8,16,32,64]``, ``torchvision/mobilenet_v2``, ``my_package.Net``."""

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import yaml

from lightning_dd.models.convnet import AlexNet, ConvNet, FRePoConv
from lightning_dd.models.interface import Network
from lightning_dd.utils.arguments import find_class
from lightning_dd.utils.errors import UserError, check_count, first_line, unknown_name
from lightning_dd.utils.seeding import seeded

Builder = Callable[[Mapping[str, Any], int, tuple[int, int, int]], Network]
"""From options, number of classes and the images' ``(C, H, W)`` to a network with random weights."""
Architectures = str | list[str] | dict[str, float]
"""A name of the factory, several names, or names with probabilities."""

_OWN: dict[str, type[Network]] = {"alexnet": AlexNet, "conv": FRePoConv, "convnet": ConvNet}
_LIBRARIES = ("timm", "torchvision")
_SYNTAX = "write name or name:option=value,option=value, as in conv:norm=none,width=32"


@dataclass(frozen=True)
class ArchitectureSpec:
    """An architecture's name, with its library's prefix if one was given, and options other than its defaults.

    Example:
        >>> spec = ArchitectureSpec.parse("resnet18:channels=[16,32,64,128]")
        >>> spec.name, spec.options
        ('resnet18', {'channels': [16, 32, 64, 128]})
        >>> str(ArchitectureSpec.parse("conv:width=32").with_options(norm="none"))
        'conv:width=32,norm=none'
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "ArchitectureSpec":
        """Read ``name`` or ``name:option=value,...``; values are YAML, so lists and ``true`` work."""
        name, colon, body = str(text).strip().partition(":")
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise UserError(f"cannot read architecture '{text}': {_SYNTAX}")
        return cls(name, _read_options(body, text) if colon else {})

    def with_options(self, **options: Any) -> "ArchitectureSpec":
        """Return the same architecture with these options added or replaced."""
        return ArchitectureSpec(self.name, {**self.options, **options})

    def __str__(self) -> str:
        if not self.options:
            return self.name
        flow = yaml.safe_dump(dict(self.options), default_flow_style=True, sort_keys=False, width=2**20).strip()
        return f"{self.name}:{flow[1:-1].replace(': ', '=').replace(', ', ',')}"


@dataclass(frozen=True)
class NetworkMixture:
    """Architectures and how often each is drawn.

    Example:
        >>> NetworkMixture.parse({"conv": 9, "convnet": 1}).probabilities
        (0.9, 0.1)
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    @classmethod
    def parse(cls, given: Architectures) -> "NetworkMixture":
        """Read a name, several names (equally often), or a mapping from names to probabilities.

        Raises:
            UserError: there is none, or a probability is not positive.
        """
        weights = {given: 1.0} if isinstance(given, str) else given
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(weights, 1.0)
        if not weights or min(weights.values()) <= 0:
            raise UserError(f"architecture must be a name, names, or names with positive probabilities, got {given!r}")
        total = sum(weights.values())
        return cls(tuple(weights), tuple(weight / total for weight in weights.values()))

    @property
    def main(self) -> str:
        """The most probable architecture, the first of equals."""
        return self.names[self.probabilities.index(max(self.probabilities))]

    def draw(self, generator: torch.Generator) -> str:
        """Draw a name; a single one takes no random number."""
        if len(self.names) == 1:
            return self.names[0]
        return self.names[int(torch.multinomial(torch.tensor(self.probabilities), 1, generator=generator))]


def build_network(
    architecture: str, num_classes: int, image_shape: tuple[int, int, int], seed: int | None = None
) -> Network:
    """Build a network by name, with random weights, on the CPU, in train mode.

    A name is looked up among the project's own (:func:`known_architectures`), then timm's, then torchvision's;
    ``timm/`` or ``torchvision/`` before it asks for that library's. Any other name with a dot is imported: a
    :class:`~lightning_dd.models.Network` of your own.

    Args:
        architecture: see :class:`ArchitectureSpec`.
        num_classes: number of logits.
        image_shape: ``(C, H, W)`` of the images it will get.
        seed: fixes the initial weights and leaves torch's global CPU generator as it was; None draws from it.

    Raises:
        UserError: the architecture or one of its options is unknown, or it cannot take images of this shape.

    Example:
        >>> network = build_network("conv:width=8", num_classes=10, image_shape=(1, 28, 28), seed=0)
        >>> network.num_features
        512
    """
    spec = ArchitectureSpec.parse(architecture)
    check_count("num_classes", num_classes)
    if len(image_shape) != 3:
        raise UserError(f"image_shape must be (channels, height, width), got {tuple(image_shape)}")
    for side in image_shape:
        check_count("image_shape", side)
    build = find_builder(spec.name)
    with nullcontext() if seed is None else seeded(seed):
        try:
            return build(spec.options, num_classes, image_shape)
        except UserError:
            raise
        except Exception as error:  # whatever a library raises for a combination it cannot build or run
            what = f"architecture '{spec}' for images of shape {tuple(image_shape)}"
            raise UserError(f"cannot build {what}: {first_line(error)}") from error


def known_architectures() -> list[str]:
    """Return the names of the project's own architectures; any timm or torchvision name works as well."""
    return sorted(_OWN)


def every_architecture() -> list[tuple[str, str]]:
    """Return every name the factory takes, with where it comes from."""
    import timm

    return [
        *((name, "lightning_dd") for name in known_architectures()),
        *((name, "timm") for name in timm.list_models()),
        *((f"torchvision/{name}", "torchvision") for name in _torchvision_classifiers()),
    ]


def find_builder(name: str) -> Builder:
    """Return what builds the architecture of a name without options; a :class:`UserError` if nothing does."""
    if name in _OWN:
        return partial(_build_class, _OWN[name], name)
    import timm  # here, not above: importing it takes seconds, and most runs need only the project's own networks

    from lightning_dd.models.library import build_from_library

    prefix, slash, bare = name.rpartition("/")
    if slash and prefix not in _LIBRARIES:
        raise unknown_name("library", prefix, _LIBRARIES)
    if prefix != "torchvision" and timm.is_model(bare):
        return partial(build_from_library, "timm", bare)
    if prefix != "timm" and bare in _torchvision_classifiers():
        return partial(build_from_library, "torchvision", bare)
    if "." in name and not slash:
        return partial(_build_class, find_class(name, Network, "architecture"), name)  # type: ignore[type-abstract]
    close = get_close_matches(bare, {*_OWN, *timm.list_models(), *_torchvision_classifiers()}, n=1)
    error = unknown_name("architecture", name, {*_OWN, *close})
    raise UserError(f"{error}, and every classification model of timm and torchvision")


def _torchvision_classifiers() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _build_class(
    cls: type[Network], name: str, options: Mapping[str, Any], num_classes: int, image_shape: tuple[int, int, int]
) -> Network:
    parameters = list(inspect.signature(cls).parameters.values())[3:]  # the first three are not options
    accepted = [parameter.name for parameter in parameters]
    for option in options:
        if option not in accepted and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            raise unknown_name(f"option of {name}", option, accepted)
    channels, height, width = image_shape
    return cls(channels, num_classes, (height, width), **options)


def _read_options(body: str, text: str) -> dict[str, Any]:
    try:
        options = yaml.safe_load("{" + body.replace("=", ": ") + "}")
    except yaml.YAMLError:
        raise UserError(f"cannot read the options of architecture '{text}': {_SYNTAX}") from None
    for name in options if isinstance(options, dict) else [None]:
        # YAML takes a lone word for a key without a value, and the last of two equal keys.
        if not isinstance(name, str) or len(re.findall(rf"(?<!\w){re.escape(name)}\s*=", body)) != 1:
            raise UserError(f"cannot read the options of architecture '{text}': {_SYNTAX}")
    return {name: _number(value) for name, value in options.items()}


def _number(value: Any) -> Any:
    """Turn ``1e-6`` into a number: YAML 1.1 asks for ``1.0e-6`` and calls the rest text."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value
