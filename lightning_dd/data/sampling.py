"""Index streams: who sees which sample when, on the device and without a hidden random number."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_dd.data.images import Batch, Split
from lightning_dd.models.interface import logits_in_slices
from lightning_dd.utils.errors import UserError

Item = TypeVar("Item")


class ShuffledStream:
    """An endless stream of index batches: passes over ``range(size)``, each in a fresh order.

    The last, incomplete batch of a pass is dropped, so every batch has the same shape. A batch size of the
    whole set or more gives the whole set every time.

    Args:
        size: number of samples.
        batch_size: indices per batch.
        generator: source of the orders; its device is where the indices live.

    Example:
        >>> stream = ShuffledStream(4, 2, torch.Generator().manual_seed(0))
        >>> sorted(torch.cat([stream.next(), stream.next()]).tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, size: int, batch_size: int, generator: torch.Generator) -> None:
        self.size = size
        self.batch_size = min(batch_size, size)
        self.generator = generator
        self._order = torch.empty(0, dtype=torch.int64, device=generator.device)
        self._position = 0

    def next(self) -> Tensor:
        """Return the next ``(batch_size,)`` int64 indices."""
        if self._position + self.batch_size > len(self._order):
            self._order, self._position = self._new_order(self.generator), 0
        batch = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return batch

    def peek(self) -> Tensor:
        """Return what :meth:`next` is going to return, and leave the state as it is."""
        if self._position + self.batch_size <= len(self._order):
            return self._order[self._position : self._position + self.batch_size]
        twin = torch.Generator(self.generator.device)
        return self._new_order(twin.set_state(self.generator.get_state()))[: self.batch_size]

    def _new_order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.size, generator=generator, device=generator.device)

    def skip(self, batches: int) -> None:
        """Advance as if ``batches`` batches had been drawn."""
        for _ in range(batches):
            self.next()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed stream needs to go on exactly."""
        return {"order": self._order.cpu(), "position": self._position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._order = state["order"].to(self.generator.device)
        self._position = int(state["position"])
        self.generator.set_state(state["generator"].cpu())


def next_batch(split: Split, stream: ShuffledStream, device: torch.device | str) -> Batch:
    """Return the stream's next batch of a split on ``device``; threads begin to read the one after."""
    batch = split.take(stream.next(), device)
    if split.threads:
        split.read_ahead(stream.peek())
    return batch


class ClassBlocks:
    """Draws as many images of every class, without replacement within a draw, without a loop over classes.

    Args:
        labels: classes ``(N,)`` on the device the rows should live on.
        num_classes: number of classes C, each with at least one image.

    Example:
        >>> blocks = ClassBlocks(torch.tensor([0, 1, 0, 1, 1]), 2)
        >>> torch.tensor([0, 1, 0, 1, 1])[blocks.draw(2, torch.Generator().manual_seed(0))]
        tensor([0, 0, 1, 1])
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self.sizes = torch.bincount(labels, minlength=num_classes)
        """Images of every class, ``(C,)``."""
        self.smallest = int(self.sizes.min())
        """Images of the smallest class: the most that can be drawn of every class."""
        places = torch.arange(int(self.sizes.max()), device=labels.device)
        self._beyond = places >= self.sizes[:, None]
        starts = self.sizes.cumsum(0) - self.sizes
        self.rows = labels.argsort(stable=True)[(starts[:, None] + places).clamp(max=len(labels) - 1)]
        """Rows of every class in their order, ``(C, largest)``; those beyond a class's size mean nothing."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``min(count, smallest)`` rows of every class: int64 indices in blocks by class."""
        keys = torch.rand(self.rows.shape, generator=generator, device=self.rows.device)
        chosen = keys.masked_fill_(self._beyond, 2.0).topk(min(count, self.smallest), largest=False).indices
        return self.rows.gather(1, chosen).flatten()


def draw_per_class(
    labels: Tensor,
    count: int,
    num_classes: int,
    generator: torch.Generator,
    repeat: bool = False,
    names: Sequence[str] = (),
) -> Tensor:
    """Draw ``count`` rows of every class without replacement, by a CPU generator.

    Args:
        labels: classes ``(N,)``.
        count: rows of every class.
        num_classes: number of classes.
        generator: CPU generator.
        repeat: begin again with the rows of a class that has too few.
        names: of the classes, for the message; else they are numbers.

    Returns:
        ``(num_classes * count,)`` int64 indices on the CPU, in blocks by class.

    Raises:
        UserError: a class has fewer than ``count`` rows, or none that could be repeated.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    blocks = ClassBlocks(labels.cpu()[shuffled], num_classes)
    if blocks.smallest < (1 if repeat else count):
        raise UserError(
            f"ipc={count} is more than there are: {scarcest(labels.cpu(), num_classes, names)}; "
            f"the largest possible ipc is {blocks.smallest}"
        )
    return shuffled[blocks.rows.gather(1, torch.arange(count) % blocks.sizes[:, None])].flatten()


def stratified_cut(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut rows in two with the same share of every class, and return both parts: sorted int64 indices.

    Args:
        labels: classes ``(N,)`` on the CPU.
        held_out: size of the second part: a share in (0, 1), or a whole number of rows.
        seed: of the cut.

    Raises:
        ValueError: a part would lack a class.
    """
    rows = torch.arange(len(labels)).numpy()
    parts = train_test_split(rows, test_size=held_out, stratify=labels.numpy(), random_state=seed)
    kept, cut = (torch.from_numpy(part).sort().values for part in parts)
    return kept, cut


class EvalBatches(IterableDataset[Batch]):
    """Batches of a split for evaluation, each sample on exactly one rank.

    A ``DistributedSampler`` pads the last round with repeated samples, which biases accuracy; here rank r of w
    sees samples r, r + w, r + 2w, ... and nothing is repeated.
    """

    def __init__(self, split: Split, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.split = split
        starts = range(rank, len(split), batch_size * world_size)
        self._batches = [slice(start, start + batch_size * world_size, world_size) for start in starts]

    def __iter__(self) -> Iterator[Batch]:
        for place, rows in enumerate(self._batches, start=1):
            batch = self.split.take(rows)
            if place < len(self._batches):
                self.split.read_ahead(self._batches[place])
            yield batch


def scarcest(labels: Tensor, num_classes: int, names: Sequence[str] = ()) -> str:
    """Say which class has the fewest rows of ``labels (N,)``, for a message; by its number where names are not known.

    Example:
        >>> scarcest(torch.tensor([0, 0, 1]), 3, ["ant", "bee", "cow"])
        "class 'cow' has 0 images"
    """
    counts = torch.bincount(labels, minlength=num_classes)
    place = int(counts.argmin())
    called = f"'{names[place]}'" if names else place
    return f"class {called} has {int(counts[place])} images"


@torch.no_grad()
def answers(network: nn.Module, split: Split, device: torch.device) -> Tensor:
    """Return a network's logits on a whole split, ``(N, num_classes)`` float32 on the CPU."""
    return torch.cat(
        [logits_in_slices(network, images.to(device)).float().cpu() for images, _ in EvalBatches(split, 500)]
    )


class StepCounter(IterableDataset[int]):
    """The train loader of a module that draws its own batches: it only counts the steps of an epoch."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.steps))

    def __len__(self) -> int:
        return self.steps


def pass_through(batches: IterableDataset[Item]) -> DataLoader[Item]:
    """Return a loader that hands ready-made batches to Lightning unchanged.

    It has a generator of its own: a DataLoader otherwise takes a number from the global one at each pass.
    """
    return DataLoader(batches, batch_size=None, generator=torch.Generator())
