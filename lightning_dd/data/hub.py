"""Image sets of the Hugging Face hub, through its library ``datasets`` (optional)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_dd.data.cache import content_key
from lightning_dd.data.cached import CachedData
from lightning_dd.data.classes import Classes, choose_classes, relabel
from lightning_dd.data.decode import Allocate, check_image_size, decode_images, new_pixels
from lightning_dd.data.images import RawSplit
from lightning_dd.utils.errors import UserError


class HuggingFace(CachedData):
    """A set of the Hugging Face hub with a column of images and one of labels.

    Needs the library ``datasets`` (``pip install datasets``), which downloads the set and keeps it in its own cache.
    No code of the set is run. Pixels are uint8 ``(C, H, W)``; channel statistics are measured on the training split.

    Args:
        path: name on the hub (``uoft-cs/cifar10``) or a local folder, as ``datasets.load_dataset`` takes it.
        subset: configuration of the set, where it has several.
        train_split: name of the split to train on.
        test_split: name of the split to test on.
        image_size: side of the square images: short side resized, centre cropped. ``None`` keeps the images, which
            must then all have one size.
        image_column: name of the image column.
        label_column: name of the label column.
        channels: 3 for RGB, 1 for grayscale.
        classes: class names or labels to keep, in this order, or a group of ImageNet's; ``None`` takes all.
        revision: branch, tag or commit of the set.
        root: folder ``datasets`` downloads to; ``None`` is its own cache.
        **kwargs: the other arguments of :class:`~lightning_dd.data.base.RealData`.

    Raises:
        UserError: an argument is out of range, or (in ``setup``) the library or the set is not there or not usable.
    """

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        image_size: int | None = None,
        image_column: str = "image",
        label_column: str = "label",
        channels: Literal[1, 3] = 3,
        classes: Classes = None,
        revision: str | None = None,
        root: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        if image_size is not None:
            check_image_size(image_size)
        self.path, self.subset, self.revision = path, subset, revision
        self.train_split, self.test_split = train_split, test_split
        self.image_size, self.channels, self.classes = image_size, channels, classes
        self.image_column, self.label_column = image_column, label_column
        self._opened: dict[bool, Any] = {}

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data; a local folder by its name."""
        outside = Path(self.path).expanduser().is_absolute() or ".." in Path(self.path).parts
        return super().spec() | {
            "path": Path(self.path).name if outside else self.path,
            "subset": self.subset,
            "train_split": self.train_split,
            "test_split": self.test_split,
            "image_size": self.image_size,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "channels": self.channels,
            "classes": self.classes,
            "revision": self.revision,
        }

    def source_key(self, *, train: bool) -> str:
        """Return the key of the names, sizes and times of the library's files, and of what is read of them."""
        table = self._table(train)
        files = [Path(file["filename"]) for file in table.cache_files]
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        read = (self.image_column, self.label_column, self.image_size, self.channels, self.classes)
        return content_key("huggingface", self.path, self.subset, self.revision, self._split_name(train), read, stamps)

    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Decode a split, uint8 ``(N, C, H, W)``."""
        names, labels = self._names(), self._labels(train)
        chosen = choose_classes(self.classes, names)
        if self.classes is not None:
            labels = relabel(labels, chosen, len(names))
        rows = torch.arange(len(labels)) if self.classes is None else (labels >= 0).nonzero().flatten()
        if len(rows) == 0:
            raise UserError(f"data.{_argument(train)}: split '{self._split_name(train)}' of '{self.path}' has no rows")
        images = decode_images(self._encoded(train, rows), len(rows), self.image_size, self.channels, allocate)
        return RawSplit(images, labels[rows], tuple(names[place] for place in chosen))

    def _split_name(self, train: bool) -> str:
        return self.train_split if train else self.test_split

    def _table(self, train: bool) -> Any:
        """Return the library's table of a split, its images not decoded."""
        if train not in self._opened:
            self._opened[train] = self._load(train)
        return self._opened[train]

    def _load(self, train: bool) -> Any:
        try:
            from datasets import Image, load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            raise UserError("data: HuggingFace needs the library 'datasets' (pip install datasets)") from None
        split = self._split_name(train)
        try:
            table = load_dataset(self.path, self.subset, split=split, revision=self.revision, cache_dir=self.root)
        except Exception as error:  # the library raises its own and everybody else's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot load split '{split}' of '{self.path}': {reason}") from error
        for column, argument in ((self.image_column, "image_column"), (self.label_column, "label_column")):
            if column not in table.column_names:
                present = ", ".join(table.column_names)
                raise UserError(f"'{self.path}' has no column '{column}' (it has {present}); set data.{argument}")
        if not isinstance(table.features[self.image_column], Image):
            raise UserError(f"'{self.path}': column '{self.image_column}' does not hold images")
        return table.cast_column(self.image_column, Image(decode=False))

    def _names(self) -> tuple[str, ...]:
        names = getattr(self._table(True).features[self.label_column], "names", None)
        if names is not None:
            return tuple(names)
        return tuple(str(label) for label in range(int(self._labels(True).max()) + 1))

    def _labels(self, train: bool) -> Tensor:
        """Return the label column, int64 ``(N,)``."""
        try:
            return torch.tensor(list(self._table(train)[self.label_column]), dtype=torch.int64)
        except (TypeError, ValueError) as error:
            raise UserError(f"'{self.path}': column '{self.label_column}' does not hold integers ({error})") from None

    def _encoded(self, train: bool, rows: Tensor) -> Iterator[tuple[str, bytes | Path]]:
        """Yield the place and the encoded bytes, or the file, of each of these rows."""
        table = self._table(train).select_columns([self.image_column])
        for row in rows.tolist():
            image = table[row][self.image_column] or {}
            where = f"in '{self.path}', split '{self._split_name(train)}', row {row}"
            payload = image.get("bytes") or (Path(image["path"]) if image.get("path") else None)
            if payload is None:
                raise UserError(f"cannot decode the image {where}: it has no bytes")
            yield where, payload


def _argument(train: bool) -> str:
    return "train_split" if train else "test_split"
