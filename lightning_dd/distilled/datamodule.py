"""The evaluation DataModule: train on the distilled-set file, score on the real data it stands for."""

from collections.abc import Iterator
from typing import Any

from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_dd.data import DATA_PARTS, DATA_SETS, RealData
from lightning_dd.data.memory import recall
from lightning_dd.data.registry import DataChoice, build_data
from lightning_dd.data.sampling import ShuffledStream, pass_through
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.views import SoftViews
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator


class SyntheticBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """An epoch of shuffled batches of a small set that lives on the device; each rank gets its share of a batch.

    Batch k is a function of seed and k alone, so a resumed run that starts at k continues exactly. A set with views
    is seen through them: pass e over the set takes its stored epoch e.

    Args:
        images: ``(n, C, H, W)``.
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


class DistilledData(LightningDataModule):
    """Train batches from a distilled set; validation and test batches from real data.

    The real data goes through the preprocessing stored with the distilled set, whatever its own would be.

    Args:
        file: a distilled-set file.
        real: the real data; ``None`` rebuilds the one named in the file.
        batch_size: synthetic images per step and process, at most the whole set.
        seed: of the batch order.

    Raises:
        UserError: the file is unusable, names no known data set, or disagrees with the real data.
    """

    def __init__(self, file: str, real: RealData | None = None, batch_size: int = 500, seed: int = 0) -> None:
        super().__init__()
        self._assemble(DistilledSet.load(file), real, batch_size, seed)

    @classmethod
    def from_set(
        cls, distilled: DistilledSet, real: RealData | None = None, batch_size: int = 500, seed: int = 0
    ) -> "DistilledData":
        """Build from a set in memory instead of a file."""
        data = cls.__new__(cls)
        LightningDataModule.__init__(data)
        data._assemble(distilled, real, batch_size, seed)
        return data

    def _assemble(self, distilled: DistilledSet, real: RealData | None, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise UserError(f"data.batch_size must be at least 1, got {batch_size}")
        self.distilled = distilled
        self.real = real if real is not None else real_data_of(distilled)
        self.real.use_preprocessing(distilled.preprocessing)
        self.batch_size = batch_size
        self.seed = seed

    def prepare_data(self) -> None:
        """Let the real data download what it needs."""
        self.real.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the real data and put both sets on the device.

        Raises:
            UserError: number of classes or image shape differ between file and data.
        """
        self.real.trainer = self.trainer
        self.real.setup(stage)
        check_match(self.distilled, self.real)
        assert self.real.train is not None
        device = self.real.train.device
        self._images, self._labels = self.distilled.images.to(device), self.distilled.labels.to(device)
        self._views = self.distilled.views and self.distilled.views.to(device)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches ``(images (B, C, H, W) normalised, labels (B, num_classes))``; one epoch is the whole run."""
        trainer = self.trainer
        steps, start, rank, world = 1000, 0, 0, 1
        if trainer is not None:
            steps = trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps > 0 else steps
            start = trainer.global_step * trainer.accumulate_grad_batches
            rank, world = trainer.global_rank, trainer.world_size
        batches = SyntheticBatches(
            self._images, self._labels, self.batch_size, steps, self.seed, start, rank, world, self._views
        )
        return pass_through(batches)

    def val_dataloader(self) -> Any:
        """Batches ``(images, classes)`` of the real validation split."""
        return self.real.val_dataloader()

    def test_dataloader(self) -> Any:
        """Batches ``(images, classes)`` of the real test split."""
        return self.real.test_dataloader()

    def predict_dataloader(self) -> Any:
        """The test split again."""
        return self.real.test_dataloader()


def real_data_of(distilled: DistilledSet, choice: DataChoice = DataChoice()) -> RealData:  # noqa: B008  (frozen)
    """Build the real data that a distilled set stands for.

    What the user chose comes first, then what this machine remembers of data with the set's fingerprint, then what the
    set says of itself. From a file's word only the project's own data sets are built, and no path is taken.

    Args:
        distilled: the set.
        choice: what the user said of the data.

    Raises:
        UserError: nothing says how to build it, or the arguments do not fit.
    """
    origin = distilled.data
    arguments = {key: value for key, value in origin.get("spec", {}).items() if key not in ("preprocessing", "part")}
    if choice.name is not None:
        return build_data(choice.name, choice.arguments, choice.root)
    note = None if choice.root else recall(str(origin.get("fingerprint")))
    if note is not None:
        return build_data(note["class_path"], {**note["init_args"], **choice.arguments})
    name, part = origin.get("name", "nothing"), origin.get("spec", {}).get("part")
    if name not in DATA_SETS or part not in (None, *DATA_PARTS):
        raise UserError(
            f"the distilled set was made from '{name}', which is none of {', '.join(sorted(DATA_SETS))}: "
            "say which real data to score on (--data and --root)"
        )
    try:
        return build_data(part or name, {**arguments, **choice.arguments}, choice.root)
    except UserError as error:
        raise UserError(f"the distilled set's data cannot be rebuilt from the file alone: {error}") from None


def check_match(distilled: DistilledSet, real: RealData) -> None:
    """Refuse to score a set on data it cannot stand for.

    Raises:
        UserError: number of classes, image shape or class names differ.
    """
    facts = real.facts
    if distilled.num_classes != facts.num_classes:
        raise UserError(
            f"num_classes disagree: the distilled set has {distilled.num_classes}, {facts.name} has {facts.num_classes}"
        )
    if distilled.image_shape != facts.image_shape:
        raise UserError(
            f"image shapes disagree: {distilled.image_shape} in the distilled set, {facts.image_shape} in {facts.name}"
        )
    if distilled.class_names != facts.class_names:
        raise UserError(f"class names or their order disagree between the distilled set and {facts.name}")
