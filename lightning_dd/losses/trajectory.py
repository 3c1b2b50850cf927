"""Trajectory matching: training on the synthetic set shall lead where training on the real data led.

This is MTT's objective (Cazenavette et al. 2022, arXiv 2203.11932).

A network starts at an expert's parameters theta*_t, takes N gradient steps of size alpha on synthetic mini-batches,
``theta_{i+1} = theta_i - alpha g_i`` with ``g_i = grad_theta loss(theta_i; X_i, y_i)``, and is compared with what the
expert had become M epochs later:

    ``L = |theta_N - theta*_{t+M}|^2 / |theta*_t - theta*_{t+M}|^2``

Two functions return the same loss with the same gradient by images, labels and alpha. :func:`unrolled` keeps the graph
of all steps, so its memory grows with N. :func:`constant_memory` walks back through the steps one at a time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dd.losses.gradients import attach_gradients, no_float16, wide
from lightning_dd.models.interface import Network

StepLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From parameters ``(P,)``, images ``(b, C, H, W)`` and labels ``(b, num_classes)`` to the scalar a step descends."""

_LEAST_MOVE = 1e-12
"""Floor of the expert's squared distance: an expert that has not moved gives a large loss, not NaN."""


class InnerStep(NamedTuple):
    """What one step of the student sees."""

    rows: Tensor
    """``(b,)`` int64: the synthetic mini-batch."""
    augment: Callable[[Tensor], Tensor]
    """From ``(b, C, H, W)`` to the same shape: a pure function, as it may be called twice."""


class Stretch(NamedTuple):
    """A stretch of an expert's trajectory, and the inner steps that are to reproduce it."""

    loss: StepLoss
    """What an inner step descends; a pure function, as it may be called twice."""
    start: Tensor
    """The expert's parameters theta*_t, ``(P,)``."""
    target: Tensor
    """Its parameters M epochs later, ``(P,)``."""
    steps: Sequence[InnerStep]
    """The N inner steps."""


def parameter_vector(network: Network) -> Tensor:
    """Return a copy of all parameters as one vector ``(P,)``, without graph, in the order of their names."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def functional_loss(network: Network, loss: Callable[[Tensor, Tensor], Tensor]) -> StepLoss:
    """Return the loss of a network as a function of its parameters.

    Args:
        network: gives the computation; its own parameters are not used. What is random in train mode (dropout) must be
            off.
        loss: from logits and labels ``(b, num_classes)`` to a scalar.
    """
    named = list(network.named_parameters())
    sizes = [parameter.numel() for _, parameter in named]

    def step_loss(vector: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        parts = zip(named, torch.split(vector, sizes), strict=True)
        parameters = {name: part.view(parameter.shape) for (name, parameter), part in parts}
        return loss(torch.func.functional_call(network, parameters, (images,)), labels)

    return step_loss


def unrolled(stretch: Stretch, images: Tensor, labels: Tensor, step_size: Tensor) -> Tensor:
    """Return the trajectory loss with the graph of all N steps, as the paper computes it.

    Args:
        stretch: what is to be reproduced.
        images: synthetic images ``(n, C, H, W)``, normalised.
        labels: their labels ``(n, num_classes)``.
        step_size: scalar alpha.
    """
    vector = stretch.start.detach().requires_grad_(torch.is_grad_enabled())
    for step in stretch.steps:
        vector = _next(stretch.loss, vector, step, images, labels, step_size)
    return trajectory_loss(vector, stretch.start, stretch.target)


def constant_memory(stretch: Stretch, images: Tensor, labels: Tensor, step_size: Tensor) -> Tensor:
    """Return what :func:`unrolled` returns, with the graph of one inner step in memory whatever N is.

    The N steps are first taken without graph; only their parameter vectors are kept. The adjoint
    ``lambda_N = dL/d theta_N`` then goes back through the steps: each ``g_i`` is computed once more, with the graph of
    this one step, and the vector-Jacobian product of ``theta_i - alpha g_i`` with ``lambda_{i+1}`` gives ``lambda_i``
    and the step's share in the gradients of images, labels and alpha. This is the chain rule and nothing else, so the
    gradient is exact; the price is a second computation of each ``g_i``. That this loss can do with constant memory is
    the idea of TESLA (Cui et al. 2023, arXiv 2211.10586), which leaves out how a step depends on the steps before it.

    The gradient is computed here and waits for ``backward``, which only scales and passes it on; there is no second
    derivative. Nothing is differentiated when gradients are off.
    """
    given = (images, labels, step_size)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]
    path = [stretch.start.detach()]
    with torch.no_grad():
        for step in stretch.steps:
            path.append(_next(stretch.loss, path[-1], step, *leaves))
    end = path.pop().requires_grad_(wanted)
    value = trajectory_loss(end, stretch.start, stretch.target)
    if not wanted:
        return value
    (adjoint,) = torch.autograd.grad(value, end)
    totals = [torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in leaves]
    for step in reversed(stretch.steps):
        adjoint, shares = _pull_back(stretch.loss, path.pop(), leaves, step, adjoint)
        for total, share in zip(totals, shares, strict=True):
            if total is not None and share is not None:
                total += share
    return attach_gradients(value.detach(), given, totals)


def trajectory_loss(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return ``|end - target|^2 / |start - target|^2`` of parameter vectors ``(P,)``, never in half precision.

    Example:
        >>> trajectory_loss(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 2.0]))
        tensor(0.2500)
    """
    with torch.autocast(end.device.type, enabled=False):
        left, moved = (wide(vector) - wide(target) for vector in (end, start))
        return left.square().sum() / moved.square().sum().clamp_min(_LEAST_MOVE)


def _next(loss: StepLoss, vector: Tensor, step: InnerStep, images: Tensor, labels: Tensor, step_size: Tensor) -> Tensor:
    """Return ``theta - alpha g``, with graph where gradients are on; attention takes a kernel differentiable twice."""
    device, keep = vector.device.type, torch.is_grad_enabled()
    batch, targets = step.augment(images[step.rows]), labels[step.rows]
    with torch.enable_grad(), no_float16(device), sdpa_kernel(SDPBackend.MATH):
        position = vector if keep else vector.detach().requires_grad_()
        value = loss(position, batch, targets)
        with torch.autocast(device, enabled=False):
            (gradient,) = torch.autograd.grad(value, position, create_graph=keep)
    return vector - step_size * gradient


def _pull_back(
    loss: StepLoss, vector: Tensor, leaves: Sequence[Tensor], step: InnerStep, adjoint: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Carry an adjoint over one step: the adjoint before it, and its shares for images, labels and step size.

    A function of its own so that no graph outlives it.
    """
    before = vector.detach().requires_grad_()
    after = _next(loss, before, step, *leaves)
    sources = [before, *(leaf for leaf in leaves if leaf.requires_grad)]
    with torch.autocast(vector.device.type, enabled=False):
        adjoint, *found = torch.autograd.grad(after, sources, adjoint, allow_unused=True)
    shares = iter(found)
    return adjoint, [next(shares) if leaf.requires_grad else None for leaf in leaves]
