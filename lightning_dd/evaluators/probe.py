"""Linear probes: what a set teaches a linear layer, on the features of a network that others trained."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_dd.data.images import DataFacts
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.models.factory import build_network
from lightning_dd.models.interface import Network
from lightning_dd.pretrained.weights import fetch_weights, fit_weights, read_weights
from lightning_dd.utils.seeding import derive_seed, seeded

_FILES = (".safetensors", ".pt", ".pth")
_SETTING = "probe"


class LinearProbe(Network):
    """A new linear layer on the features of a network that stays in inference mode and as it is.

    Args:
        body: a trained network.
        seed: of the layer's initial weights.
    """

    def __init__(self, body: Network, seed: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = body.num_features, body.num_classes
        self.body = body.eval().requires_grad_(False)
        with seeded(derive_seed(seed, _SETTING)):
            self.head = nn.Linear(body.num_features, body.num_classes)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the body's features, without graph."""
        return self.body.features(images)

    def train(self, mode: bool = True) -> "LinearProbe":
        """Set the mode of the layer alone."""
        super().train(mode)
        self.body.eval()
        return self


def linear_probe(
    architecture: str, weights: str, facts: DataFacts, preprocessing: Preprocessing, seed: int
) -> LinearProbe:
    """Return a network of which students train the last layer alone.

    Args:
        architecture: a name of the factory, as its library publishes it where weights are fetched.
        weights: ``default`` or a name as timm and torchvision publish them, or a file (``.safetensors``, ``.pt``) of
            weights by the names of the architecture's library; its own last layer, if any, is left out.
        facts: of the data.
        preprocessing: of the set, which must be that of published weights.
        seed: of the layer's initial weights.

    Raises:
        UserError: the weights cannot be had or do not fit, or are of images standardised in another way.
    """
    body = build_network(architecture, facts.num_classes, facts.image_shape, seed)
    if _is_file(weights):
        state = read_weights(Path(weights), _SETTING)
    else:
        state = fetch_weights(architecture, weights, preprocessing, _SETTING)
    fit_weights(body, state, facts, f"{_SETTING} '{weights}' of architecture '{architecture}'", head=False)
    return LinearProbe(body, seed)


def which_weights(weights: str) -> str:
    """Return what a ledger calls weights: published ones by name, those of a file by what is in it."""
    return hashlib.blake2b(Path(weights).read_bytes()).hexdigest() if _is_file(weights) else weights


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in _FILES
