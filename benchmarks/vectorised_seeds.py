"""Students of one architecture and several seeds: one after the other, or together under torch.func.vmap.

    python benchmarks/vectorised_seeds.py
    python benchmarks/vectorised_seeds.py --architectures unseen-small --seeds 5 --images 10 --steps 20

Times a training step (forward, backward, AdamW) of all seeds, both ways in turn, and compares their first losses, which
dropout alone may tell apart. The rows go to ``benchmarks/results/vectorised_seeds.json``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from lightning_dd.models import build_network
from lightning_dd.models.zoo import expand
from lightning_dd.utils.files import write_text

RESULT = Path(__file__).parent / "results" / "vectorised_seeds.json"
Step = Callable[[], Tensor]


def one_after_the_other(networks: list[nn.Module], images: Tensor, labels: Tensor) -> Step:
    """Return a step that trains every network on its own batch and returns their losses."""
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True) for network in networks]

    def step() -> Tensor:
        losses = []
        for network, optimizer, batch in zip(networks, optimizers, images, strict=True):
            loss = nn.functional.cross_entropy(network(batch), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def together(networks: list[nn.Module], images: Tensor, labels: Tensor) -> Step:
    """Return the same step for all networks at once, their parameters stacked."""
    parameters, buffers = stack_module_state(networks)
    stacked = {name: nn.Parameter(value.detach()) for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(stacked.values(), lr=1e-3, fused=True)
    network = networks[0]

    def loss_of(own: dict[str, Tensor], rest: dict[str, Tensor], batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(network, (own, rest), (batch,)), labels)

    differentiate = vmap(grad_and_value(loss_of), randomness="different")

    def step() -> Tensor:
        gradients, losses = differentiate({name: value.detach() for name, value in stacked.items()}, buffers, images)
        for name, value in stacked.items():
            value.grad = gradients[name]
        optimizer.step()
        found: Tensor = losses
        return found

    return step


def measure(architecture: str, shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Time one architecture both ways."""

    def networks() -> list[nn.Module]:
        built = [build_network(architecture, 10, shape, seed).to(options.device) for seed in range(options.seeds)]
        return [network.to(memory_format=torch.channels_last) for network in built]

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.seeds, options.images, *shape, generator=generator).to(options.device)
    labels = (torch.arange(options.images) % 10).to(options.device)
    steps = {"sequential": one_after_the_other(networks(), images, labels)}
    row: dict[str, Any] = {"architecture": architecture}
    try:
        steps["vmap"] = together(networks(), images, labels)
        losses = [step() for step in steps.values()]
        row["loss_difference"] = float((losses[0] - losses[1]).abs().max())
    except RuntimeError as error:
        return {**row, "error": str(error).strip().splitlines()[0][:120]}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {**row, **{f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()}}


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=["conv:norm=none", "convnet:width=32", "unseen-small"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10, help="of a batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (1, 28, 28)
    rows = []
    for architecture in expand(options.architectures, shape):
        rows.append(measure(architecture, shape, options))
        print(json.dumps(rows[-1]), flush=True)
    settings = {name: getattr(options, name) for name in ("seeds", "images", "threads", "device")}
    write_text(RESULT, json.dumps({"made_with": environment(), **settings, "vectorised": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
