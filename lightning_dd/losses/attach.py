"""Gradients computed by hand, handed to autograd."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


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
    """A value with given gradients with respect to given tensors."""

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
