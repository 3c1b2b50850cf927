"""Feature extractors that have seen real data: trained networks, and mixtures of them with where they began."""

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_dd.models.interface import Network
from lightning_dd.pretrained.classifier import ClassifierRecipe, initial_network, trained_classifier
from lightning_dd.pretrained.task import Task


class Extractors:
    """Trained networks of some architectures, trained now or read from the cache.

    Args:
        task: the run's data.
        names: architectures.
        recipe: how each is trained; few steps stop it early.
        count: networks of every architecture, from as many seeds.

    Raises:
        UserError: one cannot be trained or read, or is at chance.
    """

    def __init__(self, task: Task, names: tuple[str, ...], recipe: ClassifierRecipe, count: int) -> None:
        self.count = count
        self.trained = {
            name: [trained_classifier(name, task, recipe, seed)[0] for seed in range(count)] for name in names
        }
        # Copies on the CPU, where the networks of a pool are built: a step then waits for no device.
        self._ends = {
            name: [{key: value.cpu() for key, value in network.state_dict().items()} for network in networks]
            for name, networks in self.trained.items()
        }
        self._starts = {
            name: [
                parameters_to_vector(initial_network(name, task.facts, seed).parameters()).detach()
                for seed in range(count)
            ]
            for name in names
        }

    def draw(self, architecture: str, generator: torch.Generator) -> Network:
        """Draw a trained network of an architecture, by a CPU generator."""
        return self.trained[architecture][self._draw(generator)]

    @torch.no_grad()
    def fill(self, network: Network, architecture: str, interpolate: bool, generator: torch.Generator) -> Network:
        """Give a network, on the CPU, the weights of a trained one, and return it.

        Args:
            network: of the architecture.
            architecture: a name of the factory.
            interpolate: mix them with those it was trained from, by a share that is uniform in [0, 1] (DANCE: Zhang et
                al. 2024; NCFM: Wang et al. 2025, arXiv 2502.20653).
            generator: CPU generator.
        """
        index = self._draw(generator)
        network.load_state_dict(self._ends[architecture][index])
        if interpolate:
            start, end = self._starts[architecture][index], parameters_to_vector(network.parameters())
            vector_to_parameters(torch.lerp(start, end, torch.rand((), generator=generator)), network.parameters())
        return network

    def _draw(self, generator: torch.Generator) -> int:
        return int(torch.randint(self.count, (), generator=generator))
