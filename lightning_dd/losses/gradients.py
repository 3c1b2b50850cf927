"""What gradients that are taken inside an outer step need: precision, a way back into autograd, and a measure."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

_DECAY = 0.9  # weight of what came before in a running mean


@contextmanager
def no_float16(device: str) -> Iterator[None]:
    """Turn float16 autocast off: a gradient taken inside a step is out of the gradient scaler's reach, and underflows.

    bfloat16 has the range of float32 and stays.
    """
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


def wide(values: Tensor) -> Tensor:
    """Return the values in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


def attach_gradients(value: Tensor, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return a value whose backward pass hands these gradients to these tensors.

    For gradients that are cheaper to gather by hand than by one graph: gradient scaling, clipping, accumulation and
    DDP then see an ordinary loss. There is no second derivative.

    Args:
        value: scalar without graph.
        tensors: what it depends on, with whatever graph they have.
        gradients: of the value, one for each tensor and in its shape; ``None`` for zero.

    Returns:
        The value, with graph to the tensors.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (3 * attach_gradients(torch.tensor(5.0), [x], [torch.tensor([0.5, 0.0])])).backward()
        >>> x.grad
        tensor([1.5000, 0.0000])
    """
    return cast(Tensor, _Attach.apply(value, *tensors, *gradients))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors_and_gradients: Tensor | None) -> Tensor:
        """Return the value; of ``2n`` tensors the first ``n`` are differentiated by, the others their gradients."""
        ctx.save_for_backward(*tensors_and_gradients[len(tensors_and_gradients) // 2 :])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients times that of the value."""
        scaled = [None if gradient is None else gradient * scale for gradient in ctx.saved_tensors]
        return (None, *scaled, *[None] * len(scaled))


class SteadyShare:
    """Running estimate of the share of a gradient's norm that is steady, from gradients of successive looks.

    Of gradients ``g_k = s + e_k`` with independent noise, ``E <g_k, g_(k-1)> = |s|^2`` and ``E |g_k|^2 = |s|^2 +
    E |e_k|^2``, so the root of the ratio of both is the share ``|s| / |g|``; unlike the norm of a running mean, it
    goes to 0 for noise alone. Both are exponential running means. Nothing is known at the first look: the share is 0.

    Example:
        >>> share = SteadyShare()
        >>> [round(share.take(torch.tensor([2.0, 0.0])).item(), 3) for _ in range(3)]
        [0.0, 1.0, 1.0]
        >>> round(share.take(torch.tensor([0.0, 2.0])).item(), 3)  # at a right angle to the last: 0 into the mean
        0.794
    """

    def __init__(self) -> None:
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
        self._means = torch.where(finite, torch.lerp(seen, means, _DECAY), means)
        self._last = torch.where(finite, flat, last)
        share: Tensor = (self._means[0] / self._means[1].clamp(min=1e-30)).clamp(0, 1).sqrt()
        return share

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on."""
        return {"last": self._last, "means": self._means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another's state."""
        self._last, self._means = state["last"], state["means"]
