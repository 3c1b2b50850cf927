"""The evaluation DataModule: train on the distilled-set file, score on the real data it stands for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dd.data import DATA_PARTS, DATA_SETS, RealData
from lightning_dd.data.cache import recall
from lightning_dd.data.parts import DataChoice, build_data
from lightning_dd.data.sampling import pass_through
from lightning_dd.data.tables import portable
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.views import SyntheticBatches
from lightning_dd.losses.krr import initial_labels
from lightning_dd.utils.arguments import nothing_imported
from lightning_dd.utils.errors import UserError, check_range

_SAY = "say which real data to score on (--data and --root, or --data.real of fit and test)"


class DistilledData(LightningDataModule):
    """Train batches from a distilled set; validation and test batches from real data.

    The real data goes through the preprocessing stored with the distilled set, whatever its own would be.

    Args:
        file: a distilled-set file.
        real: the real data; ``None`` rebuilds the one named in the file.
        batch_size: synthetic images per step and process, at most the whole set; ``None`` takes what the student's
            protocol says.
        seed: of the batch order; ``None`` takes the student's.

    Raises:
        UserError: the file is unusable, names no known data set, or disagrees with the real data.
    """

    def __init__(
        self, file: str, real: RealData | None = None, batch_size: int | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        check_range("at least 1", "data.", batch_size=batch_size)
        self.distilled = file if isinstance(file, DistilledSet) else DistilledSet.load(file)
        self._says_what_differs = isinstance(file, str | Path)  # whoever brings sets says it once for all students
        self.real = real_data_of(self.distilled) if real is None else _like(self.distilled, real)
        self.batch_size, self.seed = batch_size, seed
        self.suit(500, 0)

    @classmethod
    def from_set(
        cls,
        distilled: DistilledSet,
        real: RealData | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> "DistilledData":
        """Build from a set in memory instead of a file."""
        return cls(cast(str, distilled), real, batch_size, seed)  # a configuration can name a file only

    def suit(self, batch_size: int, seed: int) -> None:
        """Let a student say what was not given: images per step and process, and the seed of the batch order."""
        self._batch_size = batch_size if self.batch_size is None else self.batch_size
        self._seed = seed if self.seed is None else self.seed

    def rows_per_step(self, world_size: int) -> int:
        """Return how many synthetic images a step has on all processes together."""
        return min(self._batch_size * world_size, len(self.distilled))

    def prepare_data(self) -> None:
        """Let the real data download what it needs."""
        self.real.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the real data, see that the sets fit together, and put both on the device."""
        self.real.trainer = self.trainer
        self.real.setup(stage)
        check_match(self.distilled, self.real)
        if self._says_what_differs and (difference := other_data(self.distilled, self.real)):
            rank_zero_warn(difference)
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
            self._images, self._labels, self._batch_size, steps, self._seed, start, rank, world, self._views
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
    """Build the real data that a distilled set stands for, with the preprocessing of the set.

    The user's choice comes first, then what this machine remembers of data with the set's fingerprint, then what the
    set says of itself; a file alone can name only the project's own data sets, and no path.

    Raises:
        UserError: nothing says how to build it, or the arguments do not fit.
    """
    note = None if choice.name or choice.root else recall(str(distilled.data.get("fingerprint")))
    if choice.name is not None:
        real = build_data(choice.name, choice.arguments, choice.root)
    elif note is not None:
        real = build_data(note["class_path"], {**note["init_args"], **choice.arguments})
    else:
        real = _real_data_named_in(distilled, choice)
    return _like(distilled, real)


def _real_data_named_in(distilled: DistilledSet, choice: DataChoice) -> RealData:
    spec, name = distilled.data.get("spec", {}), distilled.data.get("name", "nothing")
    part = spec.get("part")
    if name not in DATA_SETS or part not in (None, *DATA_PARTS):
        raise UserError(
            f"the distilled set was made from '{name}', which is none of {', '.join(sorted(DATA_SETS))}: {_SAY}"
        )
    if place := next(_places_in(spec), None):
        raise UserError(f"the distilled set names {place}, which is not opened for a file: {_SAY}")
    arguments = {key: value for key, value in spec.items() if key not in ("preprocessing", "part")}
    try:
        with nothing_imported():
            return build_data(part or name, {**arguments, **choice.arguments}, choice.root)
    except UserError as error:
        raise UserError(f"the distilled set's data cannot be rebuilt from the file alone: {_SAY} ({error})") from None


def _places_in(spec: Any, key: str = "") -> Iterator[str]:
    """Yield what in a file's arguments says where something lies: other than our own data sets write, or on a hub."""
    inside = (
        spec.items() if isinstance(spec, dict) else [(key, item) for item in spec] if isinstance(spec, list) else []
    )
    for name, value in inside:
        yield from _places_in(value, name)
    outside = isinstance(spec, str) and (portable(spec) != spec or "://" in spec)
    if spec is not None and (outside or key in ("root", "path", "preprocessing_file")):
        yield f"{key}={spec!r}"


def _like(distilled: DistilledSet, real: RealData) -> RealData:
    """Preprocess real data as a set was, and let nobody mirror its images where the set or the data forbids it."""
    real.use_preprocessing(distilled.preprocessing)
    real.mirror = real.mirror and distilled.mirror
    return real


def real_set(real: RealData, images: Tensor, classes: Tensor, label_kind: str, method: str) -> DistilledSet:
    """Return real images as a set to learn from, in place of synthetic ones.

    Args:
        real: where they come from; set up.
        images: ``(n, C, H, W)``, normalised.
        classes: ``(n,)`` int64.
        label_kind: ``learned``, ``centred`` or ``hard``: the labels are those a synthetic set of this kind starts from.
        method: what the set is called.
    """
    facts, preprocessing = real.facts, real.preprocessing
    assert preprocessing is not None
    classes = classes.cpu()
    labels = initial_labels(classes, facts.num_classes, label_kind)
    names, origin = facts.class_names, real.origin()
    return DistilledSet(images.cpu(), labels, classes, label_kind, names, preprocessing, origin, method)


def check_match(distilled: DistilledSet, real: RealData) -> None:
    """Refuse to score a set on data of other classes or another image shape."""
    facts = real.facts
    for what, ours, theirs in (
        ("num_classes", distilled.num_classes, facts.num_classes),
        ("image shapes", distilled.image_shape, facts.image_shape),
    ):
        if ours != theirs:
            raise UserError(f"{what} disagree: the distilled set has {ours}, {facts.name} has {theirs}")
    if distilled.class_names != facts.class_names:
        raise UserError(f"class names or their order disagree between the distilled set and {facts.name}")


def other_data(distilled: DistilledSet, real: RealData) -> str | None:
    """Say in one line that a set is scored on other data than it was made from; ``None`` where that is not known."""
    made_from, here = distilled.data.get("fingerprint"), real.facts.fingerprint
    if made_from in (None, here):
        return None
    return (
        f"scored on other data than the set was made from: the training images of {real.facts.name} here (fingerprint "
        f"{here}) are not the set's ({made_from}); another folder, or other arguments as val_fraction"
    )
