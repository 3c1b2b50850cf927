"""Seeds and generators: every random number comes from a named stream of the run's one seed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive an independent 63-bit seed for a named purpose (network 3 of rank 1, say).

    A pure function of its arguments: no clock and no global state, the same on every machine.

    Example:
        >>> derive_seed(0, "pool", 1) == derive_seed(0, "pool", 1) != derive_seed(0, "pool", 2)
        True
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device`` seeded with :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's global CPU generator seeded, and put the old state back afterwards.

    For library code that can only draw from the global generator (weight initialisers, dropout).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        yield
