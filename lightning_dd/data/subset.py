"""Some classes of a data set as a data set of their own."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_dd.data.base import RealData
from lightning_dd.data.images import RawSplit
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.registry import build_data
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import write_atomically


class ClassSubset(RealData):
    """The images of some classes of another data set, renumbered ``0..k-1`` in the order they are named.

    Images of other classes are left out before anything looks at a pixel: they reach neither the split, the
    preprocessing nor the fingerprint. The subset keeps its source's name, by which methods know digits from
    photographs, its channel statistics and its settings; a distilled set remembers the classes beside them.

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
        whole = build_data(source, source_args, root)
        super().__init__(
            root=whole.root,
            preprocessing=whole.preprocessing_kind,
            val_fraction=whole.val_fraction,
            eval_batch_size=whole.eval_batch_size,
            split_seed=whole.split_seed,
            keep_on_device=whole.keep_on_device and not whole.on_disk,  # what is chosen is a copy in memory
            workers=whole.workers,
            zca_block=whole.zca_block,
        )
        if not classes or min(classes) < 0 or len(set(classes)) < len(classes):
            raise UserError(f"classes must be different labels, at least one, got {list(classes)}")
        self.source, self.classes = whole, list(classes)
        self.name = source
        self.mirror = whole.mirror
        # Statistics are the class's elsewhere; a part takes those of whatever it is a part of.
        vars(self).update(channel_mean=whole.channel_mean, channel_std=whole.channel_std)
        if preprocessing_file is not None:
            self.use_preprocessing(load_preprocessing(preprocessing_file))

    def prepare_data(self) -> None:
        """Let the source download what it needs."""
        self.source.prepare_data()

    def read(self, *, train: bool) -> RawSplit:
        """Return the images of the chosen classes, in the source's order.

        Raises:
            UserError: the source cannot be read, or has no such class.
        """
        images, labels, names = self.source.read(train=train)
        if max(self.classes) >= len(names):
            raise UserError(f"classes must be below {len(names)} for {self.name}, got {max(self.classes)}")
        renumber = torch.full((len(names),), -1)
        renumber[self.classes] = torch.arange(len(self.classes))
        renumbered = renumber[labels]
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
