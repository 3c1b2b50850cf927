"""How much of a noisy gradient points the same way every time."""

from typing import Any

import torch
from torch import Tensor


class SteadyShare:
    """Running estimate of the share of a gradient's norm that is steady, from gradients of successive looks.

    Of gradients ``g_k = s + e_k`` with independent noise, ``E <g_k, g_(k-1)> = |s|^2`` and ``E |g_k|^2 = |s|^2 +
    E |e_k|^2``, so the root of the ratio of both is the share ``|s| / |g|``; unlike the norm of a running mean, it
    goes to 0 for noise alone. Both are exponential running means. Nothing is known at the first look: the share is 0.

    Args:
        decay: weight of what came before in the running means, in [0, 1).

    Example:
        >>> share = SteadyShare()
        >>> [round(share.take(torch.tensor([2.0, 0.0])).item(), 3) for _ in range(3)]
        [0.0, 1.0, 1.0]
        >>> round(share.take(torch.tensor([0.0, 2.0])).item(), 3)  # at a right angle to the last: 0 into the mean
        0.794
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self._last: Tensor | None = None
        self._means = torch.zeros(2)

    def take(self, gradient: Tensor) -> Tensor:
        """Take in a gradient, and return the share of its norm that is steady: a scalar in [0, 1].

        A gradient that is not finite (float16 overflows now and then) is left out.
        """
        flat = gradient.detach().flatten().float()
        if self._last is None:
            self._last = torch.where(flat.isfinite(), flat, 0.0)
            return flat.new_zeros(())
        last, means = self._last.to(flat.device), self._means.to(flat.device)
        seen = torch.stack([flat @ last, (flat.square().sum() + last.square().sum()) / 2])
        finite = seen.isfinite().all()
        self._means = torch.where(finite, torch.lerp(seen, means, self.decay), means)
        self._last = torch.where(finite, flat, last)
        share: Tensor = (self._means[0] / self._means[1].clamp(min=1e-30)).clamp(0, 1).sqrt()
        return share

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on."""
        return {"last": self._last, "means": self._means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another's state."""
        self._last, self._means = state["last"], state["means"]
