"""The model pool: partly trained networks that the outer objective is measured on.

Plain torch and no Lightning: a distiller keeps a pool outside its module tree, so DDP neither synchronises the
networks nor refuses their backward passes, and every rank trains its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError

BuildNetwork = Callable[[int], Network]
BuildOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
InnerLoss = Callable[[Network], Tensor]


@dataclass
class PoolMember:
    """One network, its optimizer, and how many inner steps it has counted since its reset."""

    network: Network
    optimizer: torch.optim.Optimizer
    age: int


class ModelPool:
    """A pool of networks of staggered ages, one of which is in use at a time.

    Networks are at rest in inference mode without parameter gradients, so an outer loss that runs through them
    reaches only the synthetic set. :meth:`advance` gives the one in use an inner step, or replaces it by a fresh
    one when its age has reached ``lifetime``; :meth:`select` draws the next. FRePo's rule (Zhou et al. 2022): the i-th
    network starts with its age *counter* at ``i * (lifetime // size)``, untrained, so that resets are spread out.

    Args:
        build: makes a fresh network from a seed.
        build_optimizer: makes the inner optimizer for a network's parameters.
        size: number of networks, at least 1.
        lifetime: inner steps a network takes before it is replaced; 0 replaces it every time.
        generator: CPU generator for the networks' seeds and for the choice of the next.
        device: where the networks live.

    Raises:
        UserError: ``size`` or ``lifetime`` is out of range.
    """

    def __init__(
        self,
        build: BuildNetwork,
        build_optimizer: BuildOptimizer,
        size: int,
        lifetime: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise UserError(f"pool_size must be at least 1, got {size}")
        if lifetime < 0:
            raise UserError(f"lifetime must be at least 0, got {lifetime}")
        self.lifetime = lifetime
        self._build = build
        self._generator = generator
        self.members: list[PoolMember] = []
        for index in range(size):
            network = build(self._next_seed()).to(device).to(memory_format=torch.channels_last)
            rest(network)
            optimizer = build_optimizer(list(network.parameters()))
            self.members.append(PoolMember(network, optimizer, age=index * (lifetime // size)))
        self._current = 0
        self.select()

    @property
    def current(self) -> PoolMember:
        """The member in use."""
        return self.members[self._current]

    @property
    def network(self) -> Network:
        """The network in use: inference mode, parameters without gradient."""
        return self.current.network

    def select(self) -> None:
        """Draw the next member uniformly."""
        self._current = int(torch.randint(len(self.members), (), generator=self._generator))

    def advance(self, inner_loss: InnerLoss) -> bool:
        """Give the current network one inner step on ``inner_loss(network)``, or replace it if it is too old.

        A replacement uses up the turn: the fresh network takes no step now. ``inner_loss`` sees the network in
        train mode with parameter gradients.

        Returns:
            Whether the network was trained, and not replaced.
        """
        member = self.current
        if member.age >= self.lifetime:
            self._reset(member)
            return False
        member.network.train().requires_grad_(True)
        with torch.enable_grad():
            loss = inner_loss(member.network)
        torch.autograd.backward(loss)
        member.optimizer.step()
        member.optimizer.zero_grad(set_to_none=True)
        rest(member.network)
        member.age += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return networks, optimizers, ages and generator: plain tensors and numbers."""
        return {
            "members": [
                {
                    "network": {name: value.cpu() for name, value in member.network.state_dict().items()},
                    "optimizer": member.optimizer.state_dict(),
                    "age": member.age,
                }
                for member in self.members
            ],
            "current": self._current,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly from :meth:`state_dict`.

        Raises:
            UserError: the state has another number of networks.
        """
        if len(state["members"]) != len(self.members):
            raise UserError(
                f"the checkpoint's pool has {len(state['members'])} networks, pool_size is {len(self.members)}"
            )
        for member, saved in zip(self.members, state["members"], strict=True):
            member.network.load_state_dict(saved["network"])
            member.optimizer.load_state_dict(saved["optimizer"])
            member.age = int(saved["age"])
        self._current = int(state["current"])
        self._generator.set_state(state["generator"].cpu())

    def _reset(self, member: PoolMember) -> None:
        """Load fresh weights into the same module, so that a compiled one stays compiled."""
        member.network.load_state_dict(self._build(self._next_seed()).state_dict())
        member.optimizer.state.clear()
        member.age = 0

    def _next_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self._generator))


def rest(network: Network) -> None:
    """Put a network in inference mode, its parameters without gradient."""
    network.eval().requires_grad_(False)
