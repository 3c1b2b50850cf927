"""One architecture, or several with probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_dd.utils.errors import UserError

Architectures = str | list[str] | dict[str, float]
"""A name of the factory, several names, or names with probabilities."""


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
