"""LAMB, which FRePo moves its images and labels with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

_BETAS, _EPS = (0.9, 0.999), 1e-6


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, the second form) without weight decay and clipping.

    Each tensor moves along Adam's direction by ``lr`` times its own norm. The digits on a CPU are those of timm's
    optimizer of this name, which takes two seconds to import.

    Args:
        groups: of parameters, each with its ``lr``; with ``always_adapt`` false a group moves as Adam's would.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "always_adapt": True, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            count = group["step"] = int(group["step"]) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._direction(parameter, count)
                    if group["always_adapt"]:
                        own, length = parameter.norm(2.0), update.norm(2.0)
                        update.mul_(torch.where((own > 0) & (length > 0), own / length, 1.0))
                    parameter.add_(update, alpha=-group["lr"])
        return loss

    def _direction(self, parameter: torch.Tensor, count: int) -> torch.Tensor:
        """Return Adam's direction, both moments corrected for ``count`` steps."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean = state["exp_avg"].lerp_(grad, 1 - _BETAS[0])
        square = state["exp_avg_sq"].mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
        size = (square.sqrt() / (1 - _BETAS[1] ** count) ** 0.5).add_(_EPS)
        direction: torch.Tensor = (mean / (1 - _BETAS[0] ** count)).div_(size)
        return direction
