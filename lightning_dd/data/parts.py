"""Real data by name, and parts of it as data sets of their own: some rows, or some classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.data.images import RawSplit
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.readers import relabel
from lightning_dd.utils.arguments import find_class
from lightning_dd.utils.errors import UserError, check_range
from lightning_dd.utils.files import write_atomically
from lightning_dd.utils.seeding import make_generator


@dataclass(frozen=True)
class DataChoice:
    """Real data as a user names it. Everything left out is taken from where a distilled set says it came from."""

    name: str | None = None
    """Class name of a data set, or the class path of any other :class:`~lightning_dd.data.RealData`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments other than ``root``."""
    root: str | None = None
    """Its folder on this machine; ``None`` is its default."""


def build_data(name: str, arguments: Mapping[str, Any] | None = None, root: str | None = None) -> RealData:
    """Build real data as the user named it: see :class:`DataChoice`.

    Raises:
        UserError: there is no such data set, or the arguments do not fit it.
    """
    cls: type[RealData] = find_class(name, RealData, "data set")  # type: ignore[type-abstract]
    place: dict[str, Any] = {} if root is None else {"root": root}
    try:
        return cls(**{**(arguments or {}), **place})
    except TypeError as error:
        raise UserError(f"the arguments do not fit data set '{name}': {error}") from None


class _Part(RealData):
    """A part keeps its source's name, its channel statistics, and whether its images may be mirrored."""

    def __init__(self, name: str, source: RealData, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name, self.source = name, source
        self.mirror = source.mirror
        # Statistics are the class's elsewhere; a part takes those of whatever it is a part of.
        vars(self).update(zip(("channel_mean", "channel_std"), source.statistics, strict=True))

    def prepare_data(self) -> None:
        """Let the source download what it needs."""
        self.source.prepare_data()


class RealRows(_Part):
    """Some rows of another data set's training split as training data, and held-out images as test data.

    The training split is shuffled once by ``rows_seed`` and cut into chunks of ``rows`` images; ``chunk`` says which
    one is meant, so chunks are disjoint. Held-out images are the source's test split, or the last ``held_out`` of
    the shuffled training split. Chunk and held-out images together, in this order, are the *pool*; shadow models of
    a membership attack train on random halves of it (Carlini et al. 2022, arXiv 2112.03570): ``half`` 2k and 2k + 1
    are the k-th random half and its complement.

    Args:
        source: class name of the data set.
        rows: training images of a chunk, at least 1.
        chunk: which chunk, from 0.
        held_out: held-out images cut from the training split; 0 takes the source's test split.
        half: train on this half of the pool instead of on the chunk.
        rows_seed: of the shuffle and the halves, kept apart from the run's seed.
        source_args: arguments of the source other than ``root``.
        root: folder of the source; ``None`` is its default.
        **kwargs: the other arguments of :class:`~lightning_dd.data.base.RealData`.

    Raises:
        UserError: an argument is out of range, or (when read) the source has too few images.
    """

    tests_every_class = False  # rows are drawn, whatever their class

    def __init__(
        self,
        source: str,
        rows: int,
        chunk: int = 0,
        held_out: int = 0,
        half: int | None = None,
        rows_seed: int = 0,
        source_args: dict[str, Any] | None = None,
        root: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_range("at least 1", "data.", rows=rows)
        check_range("at least 0", "data.", chunk=chunk, held_out=held_out, half=half)
        super().__init__(source, build_data(source, source_args, root), root=root, **kwargs)
        self.rows, self.chunk, self.held_out, self.half, self.rows_seed = rows, chunk, held_out, half, rows_seed

    def pool(self) -> RawSplit:
        """Return the pool: the chunk's ``rows`` images and then the held-out ones, as the source reads them."""
        train = self.source.read(train=True)
        chunk, held_out = self._cut(len(train.labels))
        if self.held_out:
            return train.take(torch.cat([chunk, held_out]))
        members, test = train.take(chunk), self.source.read(train=False)
        return RawSplit(
            torch.cat([members.images, test.images]), torch.cat([members.labels, test.labels]), test.class_names
        )

    def read(self, *, train: bool) -> RawSplit:
        """Return the chunk (or half of the pool), or the held-out images."""
        if train and self.half is None:  # held-out images are not even read
            whole = self.source.read(train=True)
            return whole.take(self._cut(len(whole.labels))[0])
        pool = self.pool()
        size = len(pool.labels)
        return pool.take(self._training_rows(size) if train else torch.arange(self.rows, size))

    def trained_on(self, labels: Tensor) -> Tensor:
        """Return which images of a pool of classes ``(P,)`` are trained on, without those for validation: ``(P,)``."""
        rows = self._training_rows(len(labels))
        kept, _ = self._split(labels[rows])
        inside = torch.zeros(len(labels), dtype=torch.bool)
        inside[rows[kept]] = True
        return inside

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs, and which class they are for (the name is the source's)."""
        own = super().spec()
        return {
            **own,
            "part": type(self).__name__,
            "source": self.name,
            **{name: getattr(self, name) for name in ("rows", "chunk", "held_out", "half", "rows_seed")},
            "source_args": {key: value for key, value in self.source.spec().items() if key not in own},
        }

    def _cut(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the chunk's and the held-out rows of a training split of ``size`` images."""
        last = (self.chunk + 1) * self.rows
        if last + self.held_out > size:
            raise UserError(
                f"{self.name} has {size} training images: too few for chunk {self.chunk} of {self.rows} rows and "
                f"{self.held_out} held-out ones"
            )
        order = torch.randperm(size, generator=make_generator(self.rows_seed, "rows"))
        return order[last - self.rows : last], order[size - self.held_out :]

    def _training_rows(self, size: int) -> Tensor:
        """Return the sorted places, in the pool of ``size`` images, of what is trained on."""
        if self.half is None:
            return torch.arange(self.rows)
        order = torch.randperm(size, generator=make_generator(self.rows_seed, "half", self.half // 2))
        middle = size // 2
        return (order[:middle] if self.half % 2 == 0 else order[middle:]).sort().values


class ClassSubset(_Part):
    """The images of some classes of another data set, renumbered ``0..k-1`` in the order they are named.

    Images of other classes are left out before anything looks at a pixel: they reach neither the split, the
    preprocessing nor the fingerprint. The subset takes over its source's settings; a distilled set remembers the
    classes beside them.

    Args:
        source: class name of the data set.
        classes: the source's labels to keep, each once.
        source_args: arguments of the source other than ``root``.
        preprocessing_file: a map written by :func:`save_preprocessing`, applied instead of fitting one.
        root: folder of the source; ``None`` is its default.

    Raises:
        UserError: ``classes`` is empty, repeats one or names none of the source's, or the file is unusable.
    """

    def __init__(
        self,
        source: str,
        classes: list[int],
        source_args: dict[str, Any] | None = None,
        preprocessing_file: str | None = None,
        root: str | None = None,
    ) -> None:
        if not classes or min(classes) < 0 or len(set(classes)) < len(classes):
            raise UserError(f"classes must be different labels, at least one, got {list(classes)}")
        whole = build_data(source, source_args, root)
        taken_over = ["root", "val_fraction", "eval_batch_size", "split_seed", "workers", "zca_block"]
        taken_over += ["mean", "std", "zca_ridge"]
        super().__init__(
            source,
            whole,
            preprocessing=whole.preprocessing_kind,
            keep_on_device=whole.keep_on_device and not whole.on_disk,  # what is chosen is a copy in memory
            **{setting: getattr(whole, setting) for setting in taken_over},
        )
        self.classes = list(classes)
        if preprocessing_file is not None:
            self.use_preprocessing(load_preprocessing(preprocessing_file))

    def read(self, *, train: bool) -> RawSplit:
        """Return the images of the chosen classes, in the source's order."""
        images, labels, names = self.source.read(train=train)
        if max(self.classes) >= len(names):
            raise UserError(f"classes must be below {len(names)} for {self.name}, got {max(self.classes)}")
        renumbered = relabel(labels, self.classes, len(names))
        kept = renumbered >= 0
        return RawSplit(images[kept], renumbered[kept], tuple(names[label] for label in self.classes))

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs, and which class they are for (the name is the source's)."""
        return {
            "part": type(self).__name__,
            "source": self.name,
            "classes": self.classes,
            "source_args": self.source.spec(),
        }


def save_preprocessing(preprocessing: Preprocessing, path: Path | str) -> Path:
    """Write a map atomically as safetensors and return the path."""
    state = {name: value.cpu().contiguous() for name, value in preprocessing.state_dict().items()}
    return write_atomically(path, lambda temporary: save_file(state, temporary))


def load_preprocessing(path: Path | str) -> Preprocessing:
    """Read a map written by :func:`save_preprocessing`.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        return Preprocessing.from_state_dict(load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"preprocessing file '{path}': missing, or not one of lightning_dd ({error})") from None
