"""Image sets of the Hugging Face hub, through its library ``datasets`` (optional)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_dd.data.cache import content_key
from lightning_dd.data.readers import Encoded
from lightning_dd.data.tables import ImageTable, portable
from lightning_dd.utils.errors import UserError, first_line


class HuggingFace(ImageTable):
    """A set of the Hugging Face hub with a column of images and one of labels.

    Needs the library ``datasets`` (``pip install datasets``), which downloads the set and keeps it in its own cache.
    No code of the set is run. Pixels are uint8 ``(C, H, W)``; channel statistics are measured on the training split.

    Args:
        path: name on the hub (``uoft-cs/cifar10``) or a local folder, as ``datasets.load_dataset`` takes it.
        subset: configuration of the set, where it has several.
        train_split: name of the split to train on.
        test_split: name of the split to test on.
        image_size: side of the images in pixels, ``None`` as they are.
        channels: 3 for RGB, 1 for grayscale.
        revision: branch, tag or commit of the set.
        **kwargs: ``root``, the folder ``datasets`` downloads to (``None`` is its own cache), and the other arguments of
            :class:`~lightning_dd.data.tables.ImageTable`.

    Raises:
        UserError: an argument is out of range, or (in ``setup``) the library or the set is not there or not usable.
    """

    arguments = ("train_split", "test_split")

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, channels=channels, **kwargs)
        self.path, self.subset, self.revision = path, subset, revision
        self.train_split, self.test_split = train_split, test_split
        self._opened: dict[str, Any] = {}

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data; a local folder by its name."""
        own = ("subset", "train_split", "test_split", "revision", "classes")
        return super().spec() | {"path": portable(self.path)} | {name: getattr(self, name) for name in own}

    def source_key(self, *, train: bool) -> str:
        """Return the key of the names, sizes and times of the library's files, and of what is read of them."""
        table = self._table(train)
        files = [Path(file["filename"]) for file in table.cache_files]
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        read = (self.image_column, self.label_column, self.size_of(train=train), self.channels, self.classes)
        return content_key("huggingface", self.path, self.subset, self.revision, self._split_name(train), read, stamps)

    def declared_class_names(self) -> tuple[str, ...] | None:
        """Return the names the library gives."""
        names = getattr(self._table(True).features[self.label_column], "names", None)
        return None if names is None else tuple(names)

    def labels(self, *, train: bool) -> Tensor:
        """Return the label column of a split, int64 ``(N,)``."""
        try:
            return torch.tensor(list(self._table(train)[self.label_column]), dtype=torch.int64)
        except (TypeError, ValueError) as error:
            raise UserError(f"'{self.path}': column '{self.label_column}' does not hold integers ({error})") from None

    def encoded(self, *, train: bool, rows: Tensor) -> Iterator[Encoded]:
        """Yield the place and the encoded bytes, or the file, of each of these rows."""
        table = self._table(train).select_columns([self.image_column])
        for row in rows.tolist():
            image = table[row][self.image_column] or {}
            where = f"in '{self.path}', split '{self._split_name(train)}', row {row}"
            yield where, image.get("bytes") or (Path(image["path"]) if image.get("path") else None)

    def _split_name(self, train: bool) -> str:
        return self.train_split if train else self.test_split

    def _table(self, train: bool) -> Any:
        """Return the library's table of a split, its images not decoded; loaded once."""
        split = self._split_name(train)
        if split not in self._opened:
            self._opened[split] = self._load(split)
        return self._opened[split]

    def _load(self, split: str) -> Any:
        try:
            from datasets import Image, load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            raise UserError("data: HuggingFace needs the library 'datasets' (pip install datasets)") from None
        try:
            table = load_dataset(self.path, self.subset, split=split, revision=self.revision, cache_dir=self.root)
        except Exception as error:  # the library raises its own and everybody else's
            raise UserError(f"cannot load split '{split}' of '{self.path}': {first_line(error)}") from error
        self.check_columns(self.path, table.column_names)
        if not isinstance(table.features[self.image_column], Image):
            raise UserError(f"'{self.path}': column '{self.image_column}' does not hold images")
        return table.cast_column(self.image_column, Image(decode=False))
