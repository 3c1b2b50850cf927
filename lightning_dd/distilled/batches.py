"""Batches of a synthetic set, drawn where its images lie. Plain torch."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_dd.data.sampling import ShuffledStream
from lightning_dd.distilled.views import SoftViews
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator


class SyntheticBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """An epoch of shuffled batches of a small set that lives on the device; each rank gets its share of a batch.

    Batch k is a function of seed and k alone, so a resumed run that starts at k continues exactly. A set with views
    is seen through them: pass e over the set takes its stored epoch e.

    Args:
        images: ``(n, C, H, W)``, normalised.
        labels: ``(n, num_classes)``.
        batch_size: rows per batch and rank; together the ranks use at most the whole set.
        steps: batches in the epoch.
        seed: of the order.
        start: batches already used.
        rank: this process.
        world_size: number of processes.
        views: of the images, on their device; their logits then stand for ``labels``.

    Raises:
        UserError: there are more processes than images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        views: SoftViews | None = None,
    ) -> None:
        if world_size > len(images):
            raise UserError(f"{world_size} processes cannot share {len(images)} synthetic images")
        self.images, self.labels = images, labels
        self.rows_per_step = batch_size * world_size
        self.steps, self.seed, self.start = steps, seed, start
        self.rank, self.world_size, self.views = rank, world_size, views

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = make_generator(self.seed, "order", device=self.images.device)
        stream = ShuffledStream(len(self.images), self.rows_per_step, order)
        stream.skip(self.start)
        for step in range(self.start, self.start + self.steps):
            rows = stream.next()[self.rank :: self.world_size]
            if self.views is None:
                yield self.images[rows], self.labels[rows]
            else:
                yield self.views.replay(self.images, step // (stream.size // stream.batch_size), rows)
