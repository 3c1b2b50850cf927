"""The running mean of a tensor that is seen once per step."""

from typing import Any

from torch import Tensor


class RunningMean:
    """Exponential running mean with Adam's bias correction (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1).

    Args:
        decay: weight of what came before, in [0, 1); 0 keeps the last tensor alone.

    Example:
        >>> import torch
        >>> mean = RunningMean(0.5)
        >>> [mean.take(torch.tensor(value)).item() for value in (3.0, 0.0)]
        [3.0, 1.0]
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._sum: Tensor | None = None
        self._count = 0

    def take(self, value: Tensor) -> Tensor:
        """Take in a tensor without graph, and return the mean so far."""
        if self.decay == 0:
            return value
        fresh = (1 - self.decay) * value
        self._sum = fresh if self._sum is None else self.decay * self._sum.to(value.device) + fresh
        self._count += 1
        return self._sum / (1 - self.decay**self._count)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another's state."""
        self._sum, self._count = state["sum"], state["count"]
