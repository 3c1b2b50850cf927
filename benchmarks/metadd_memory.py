"""Measure the peak memory of the MetaDD gradient: gathered one architecture at a time, and as one graph.

    python benchmarks/metadd_memory.py                            # M = 2, 4, 8 copies of convnet:width=64
    python benchmarks/metadd_memory.py --architecture resnet18 --networks 2 8 --exact --output memory.json

Prints a table and, with ``--output``, writes the rows as JSON (those of docs/results.md went to
``benchmarks/results/metadd_memory.json``). One row is the loss and its gradient by a batch of
random images and learned labels. Every configuration runs in a process of its own, and the peak of one that only
loads the networks and runs a single image through them is taken off: what is left is what the gradient costs. On a
CPU the peak is the resident memory of the process, on a GPU what torch allocated. So that the former measures the
program and not what glibc keeps for later, freed blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_); that
makes the times longer than they are in training. The gradients' norms show that the two ways compute the same.
"""

import argparse
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

from environment import write_record

WAYS = ("load", "gathered", "naive")


def measure(
    way: str, architecture: str, networks: int, images: int, exact: bool, repeats: int, threads: int, device: str
) -> dict[str, Any]:
    """Compute loss and gradient ``repeats`` times and return peak memory, the median time and the gradient's norm."""
    import torch

    from lightning_dd.losses.krr import initial_labels
    from lightning_dd.losses.metadd import MetaOptions
    from lightning_dd.losses.metadd_gradient import Architecture, gathered_loss, naive_loss
    from lightning_dd.models import build_network
    from lightning_dd.models.pool import rest

    torch.set_num_threads(threads)
    architectures = []
    for seed in range(networks):
        network = build_network(architecture, 10, (3, 32, 32), seed=seed).to(device)
        rest(network)
        architectures.append(Architecture(network))
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    labels = initial_labels(torch.arange(images) % 10, 10, "learned").to(device).requires_grad_()
    loss = naive_loss if way == "naive" else gathered_loss
    options = MetaOptions(positivity=1.0, detach_weights=not exact)
    rows, seconds = 1 if way == "load" else images, []
    gradient = torch.zeros(())
    for _ in range(1 if way == "load" else repeats):
        start = time.perf_counter()
        total = loss(architectures, pixels[:rows], labels[:rows], "learned", options).loss
        gradient = torch.autograd.grad(total, pixels)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    on_gpu = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak_mb": peak / 2**20,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "gradient_norm": float(gradient.norm()),
    }


def run_apart(*args: Any) -> dict[str, Any]:
    """Run :func:`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architecture", default="convnet:width=64")
    parser.add_argument("--networks", type=int, nargs="+", default=[2, 4, 8], help="numbers of copies M")
    parser.add_argument("--images", type=int, default=64, help="rows of the batch")
    parser.add_argument("--exact", action="store_true", help="second-order maps: detach_weights=False")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    settings = (options.images, options.exact, options.repeats, options.threads, options.device)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # read when a child process starts
    rows = []
    print("| M | way | peak MB above loading | of M = first | median s | gradient norm |\n|---|---|---|---|---|---|")
    first: dict[str, float] = {}
    for networks in options.networks:
        found = {way: run_apart(way, options.architecture, networks, *settings) for way in WAYS}
        for way in WAYS[1:]:
            extra = found[way]["peak_mb"] - found["load"]["peak_mb"]
            ratio = extra / first.setdefault(way, extra)
            row = {"networks": networks, "way": way, "extra_mb": extra, "relative_to_first": ratio, **found[way]}
            rows.append(row)
            print(
                f"| {networks} | {way} | {extra:.1f} | {ratio:.2f} | {row['seconds']:.3f} | "
                f"{row['gradient_norm']:.6g} |",
                flush=True,
            )
    write_record(options.output, memory=rows)


if __name__ == "__main__":
    main()
