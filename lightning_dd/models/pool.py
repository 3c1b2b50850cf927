"""The model pool: partly trained networks that the outer objective is measured on.

Plain torch and no Lightning: a distiller keeps a pool outside its module tree, so DDP neither synchronises the
networks nor refuses their backward passes, and every rank trains its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.models.factory import NetworkMixture
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.machine import memory_of

BuildNetwork = Callable[[int, str], Network]
"""From a seed and an architecture to a fresh network."""
BuildOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
InnerLoss = Callable[[Network], Tensor]

_SIZE_DECAY = 0.9  # of what came before, in the running mean of a loss's size


@dataclass
class PoolMember:
    """One network, its optimizer, and how many inner steps it has counted since its reset."""

    architecture: str
    network: Network
    optimizer: torch.optim.Optimizer
    age: int


class ModelPool:
    """A pool of networks of staggered ages, one of which is in use at a time.

    Networks are at rest in inference mode without parameter gradients, so an outer loss that runs through them
    reaches only the synthetic set. :meth:`advance` gives the one in use an inner step, or replaces it by a fresh
    one when its age has reached ``lifetime``; :meth:`select` draws the next. FRePo's rule (Zhou et al. 2022): the i-th
    network starts with its age *counter* at ``i * (lifetime // size)``, untrained, so that resets are spread out.

    Where several architectures are mixed, every fresh network draws its own.

    Args:
        build: makes a fresh network.
        build_optimizer: makes the inner optimizer for a network's parameters.
        mixture: the architectures of the networks.
        size: number of networks, at least 1.
        lifetime: inner steps a network takes before it is replaced; 0 replaces it every time.
        generator: CPU generator for the networks' architectures and seeds, and for the choice of the next.
        device: where the networks live.
        mixed: whether fresh networks draw their architecture; otherwise all are of the main one.

    Attributes:
        mixed: the same, of the networks to come.

    Raises:
        UserError: ``size`` or ``lifetime`` is out of range.
    """

    def __init__(
        self,
        build: BuildNetwork,
        build_optimizer: BuildOptimizer,
        mixture: NetworkMixture,
        size: int,
        lifetime: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        mixed: bool = True,
    ) -> None:
        check_range("at least 1", pool_size=size)
        check_range("at least 0", lifetime=lifetime)
        self.lifetime, self.mixture, self.mixed = lifetime, mixture, mixed
        self._build, self._build_optimizer = build, build_optimizer
        self._generator, self._device = generator, device
        self._sizes: dict[str, Tensor] = {}
        self.members: list[PoolMember] = []
        for index in range(size):
            self.members.append(self._member(*self._draw(), age=index * (lifetime // size)))
            if index == 0:
                self._check_room(size)
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

    def others(self, count: int, generator: torch.Generator) -> list[Network]:
        """Draw networks that are not in use, each at most once, with a CPU generator of the caller's."""
        idle = [member.network for member in self.members if member is not self.current]
        return [idle[index] for index in torch.randperm(len(idle), generator=generator)[:count].tolist()]

    def advance(self, inner_loss: InnerLoss) -> bool:
        """Give the current network one inner step on ``inner_loss(network)``, or replace it if it is too old.

        A replacement uses up the turn: the fresh network takes no step now. ``inner_loss`` sees the network in
        train mode with parameter gradients.

        Returns:
            Whether the network was trained, and not replaced.
        """
        member = self.current
        if member.age >= self.lifetime:
            self._replace_current()
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

    def balanced(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Divide an outer loss's terms, as seen through the current network, by the size that is usual for its kind.

        Losses grow with a network's features, and the architecture with most of them would decide alone what becomes
        of the images. The usual size is the running mean, over the outer steps of one architecture, of the sum of the
        terms' magnitudes. A pool of one architecture leaves the terms as they are.
        """
        if len(self.mixture.names) == 1:
            return terms
        size = torch.stack([term.detach().float().abs() for term in terms.values()]).sum()
        usual = self._sizes.get(self.current.architecture, size).to(size.device)
        usual = torch.where(size.isfinite(), torch.lerp(size, usual, _SIZE_DECAY), usual)
        self._sizes[self.current.architecture] = usual
        return {name: term / usual.clamp(min=1e-12) for name, term in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return networks, optimizers, ages, usual sizes and generator: plain tensors and numbers."""
        return {
            "members": [
                {
                    "architecture": member.architecture,
                    "network": {name: value.cpu() for name, value in member.network.state_dict().items()},
                    "optimizer": member.optimizer.state_dict(),
                    "age": member.age,
                }
                for member in self.members
            ],
            "current": self._current,
            "sizes": dict(self._sizes),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly from :meth:`state_dict`, of a pool of as many networks and the same architectures."""
        if len(state["members"]) != len(self.members):
            raise UserError(
                f"the checkpoint's pool has {len(state['members'])} networks, pool_size is {len(self.members)}"
            )
        for index, saved in enumerate(state["members"]):
            architecture = saved.get("architecture", self.mixture.main)  # older checkpoints have one
            if architecture not in self.mixture.names:
                raise UserError(f"the checkpoint's pool has architecture '{architecture}', the run has none")
            if architecture != self.members[index].architecture:
                self.members[index] = self._member(architecture, self._build(0, architecture), age=0)
            member = self.members[index]
            member.network.load_state_dict(saved["network"])
            member.optimizer.load_state_dict(saved["optimizer"])
            member.age = int(saved["age"])
        self._current = int(state["current"])
        self._sizes = dict(state.get("sizes", {}))
        self._generator.set_state(state["generator"].cpu())

    def _draw(self) -> tuple[str, Network]:
        architecture = self.mixture.draw(self._generator) if self.mixed else self.mixture.main
        seed = int(torch.randint(2**62, (), generator=self._generator))
        return architecture, self._build(seed, architecture)

    def _check_room(self, size: int) -> None:
        """Refuse more networks than the device has memory for, judged by the first one."""
        needed = size * sum(value.nbytes for value in self.members[0].network.state_dict().values())
        device = torch.device(self._device)
        room = memory_of(device)
        if room is not None and needed > room:
            raise UserError(
                f"pool_size={size} networks take {needed / 2**30:.1f} GiB and the {device.type} has "
                f"{room / 2**30:.1f}: lower pool_size"
            )

    def _member(self, architecture: str, network: Network, age: int) -> PoolMember:
        network = network.to(self._device).to(memory_format=torch.channels_last)
        rest(network)
        return PoolMember(architecture, network, self._build_optimizer(list(network.parameters())), age)

    def _replace_current(self) -> None:
        """Put a fresh network in place of the current one."""
        architecture, network = self._draw()
        old = self.current
        if architecture != old.architecture:
            self.members[self._current] = self._member(architecture, network, age=0)
            return
        old.network.load_state_dict(network.state_dict())  # in the same module, so that a compiled one stays compiled
        old.optimizer.state.clear()
        old.age = 0


def rest(network: Network) -> None:
    """Put a network in inference mode, its parameters without gradient."""
    network.eval().requires_grad_(False)


@contextmanager
def perturbed(network: Network, share: float, generator: torch.Generator) -> Iterator[None]:
    """Within the block, have a network look with noise on its parameters (Acc-DD, arXiv 2212.06152).

    Gaussian noise of ``share`` times the root mean square of a tensor is added to it. Copies stand in for the
    parameters, which are not written to: a graph made in the block stays valid, and what was there comes back bit for
    bit.

    Args:
        network: whose parameters are to be noisy.
        share: relative size of the noise.
        generator: on the network's device.
    """
    owned = [(module, dict(module.named_parameters(recurse=False))) for module in network.modules()]
    try:
        for module, parameters in owned:
            for name, parameter in parameters.items():
                weight = parameter.detach()
                size = share * weight.square().mean().sqrt()
                noisy = weight + size * torch.empty_like(weight).normal_(generator=generator)
                setattr(module, name, nn.Parameter(noisy, requires_grad=parameter.requires_grad))
        yield
    finally:
        for module, parameters in owned:
            for name, parameter in parameters.items():
                setattr(module, name, parameter)
