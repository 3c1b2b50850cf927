"""Tables of encoded images and labels, as parquet files hold them."""

import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_dd.data.cache import Allocate, content_key, new_pixels
from lightning_dd.data.images import RawSplit
from lightning_dd.data.readers import Encoded, EncodedImages, choose_classes, decode_images, relabel
from lightning_dd.utils.errors import UserError, first_line


class ImageTable(EncodedImages):
    """Encoded images in one column and integer labels in another.

    Args:
        image_column: name of the image column.
        label_column: name of the label column.
        **kwargs: the other arguments of :class:`~lightning_dd.data.readers.EncodedImages`.
    """

    arguments: ClassVar[tuple[str, str]]
    """Those that say what the train and what the test split is."""

    def __init__(self, image_column: str = "image", label_column: str = "label", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_column = image_column
        self.label_column = label_column

    @abstractmethod
    def labels(self, *, train: bool) -> Tensor:
        """Return the label column of a split, int64 ``(N,)``."""

    @abstractmethod
    def encoded(self, *, train: bool, rows: Tensor) -> Iterator[Encoded]:
        """Yield these rows ``(B,)``, sorted, of the image column."""

    @abstractmethod
    def declared_class_names(self) -> tuple[str, ...] | None:
        """Return the names of all classes in label order, ``None`` where the table does not say."""

    def all_class_names(self) -> tuple[str, ...]:
        """Return the names of all classes, else the label numbers seen in train."""
        names = self.declared_class_names()
        if names is not None:
            return names
        labels = self.labels(train=True)
        return tuple(str(label) for label in range(int(labels.max()) + 1 if len(labels) else 0))

    def check_columns(self, where: str, present: Sequence[str]) -> None:
        """Refuse a table that lacks one of the two columns."""
        for argument in ("image_column", "label_column"):
            if (column := getattr(self, argument)) not in present:
                raise UserError(
                    f"'{where}' has no column '{column}' (it has {', '.join(present)}); set data.{argument}"
                )

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data (never a path)."""
        return super().spec() | {"image_column": self.image_column, "label_column": self.label_column}

    def _chosen_rows(self, train: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return the rows of a split whose classes are chosen, the labels of these, and the classes' names."""
        names = self.all_class_names()
        chosen = choose_classes(self.classes, names)
        labels = relabel(self.labels(train=train), chosen, len(names))
        rows = (labels >= 0).nonzero().flatten()
        return rows, labels[rows], tuple(names[place] for place in chosen)

    def sources(self, rows: Tensor) -> Iterator[Encoded]:
        """Yield the images of these rows among the chosen ones of train; the table is read once."""
        return self.encoded(train=True, rows=self._chosen_rows(True)[0][rows])

    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Decode the rows whose classes are chosen, uint8 ``(N, C, H, W)``."""
        rows, labels, names = self._chosen_rows(train)
        if len(rows) == 0:
            raise UserError(f"data.{self.arguments[not train]}: there are no rows to read")
        images = decode_images(
            self.encoded(train=train, rows=rows), len(rows), self.size_of(train=train), self.channels, allocate
        )
        return RawSplit(images, labels, names)


class ParquetImages(ImageTable):
    """Encoded images and integer labels in parquet files, the layout of the Hugging Face hub.

    The image column is ``struct(bytes, path)`` or plain binary; ``path`` is not followed. Class names come from
    the schema metadata (key ``huggingface``), else they are the label numbers seen in train. Pixels are uint8
    ``(C, H, W)``: RGB as soon as one training image has colour (grayscale files are then converted), else one
    channel. Channel statistics are measured on the training split.

    File names may be patterns (``train-*.parquet``, ``**`` included), relative to ``root``. Without ``root`` they
    are looked up in the working folder, then in the folder that the environment variable ``LIGHTNING_DD_DATA``
    names.

    Args:
        train_files: name, pattern, or list of them; rows are taken in the order of the list, each pattern sorted.
        test_files: likewise.
        image_size: side of the images in pixels, ``None`` as they are.
        **kwargs: ``root`` and the other arguments of :class:`ImageTable`.

    Raises:
        UserError: an argument is out of range, or (in ``setup``) files, columns or images are not usable.
    """

    arguments = ("train_files", "test_files")

    def __init__(
        self,
        train_files: list[str] | str,
        test_files: list[str] | str,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, **kwargs)
        self.train_files = [train_files] if isinstance(train_files, str) else list(train_files)
        self.test_files = [test_files] if isinstance(test_files, str) else list(test_files)
        self._train_shape: torch.Size | None = None

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data; files by a name that needs no path."""
        return super().spec() | {
            "train_files": [portable(name) for name in self.train_files],
            "test_files": [portable(name) for name in self.test_files],
        }

    def source_key(self, *, train: bool) -> str:
        """Return the key of the columns, the size and the files' bytes (with ``on_disk``, their sizes and times)."""
        columns, files = (self.image_column, self.label_column), self._files(train)
        stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        content = stamps if self.on_disk else files
        chosen = () if self.classes is None and self.channels is None else (self.classes, self.channels)
        return content_key("parquet", self.size_of(train=train), columns, self.all_class_names(), *chosen, *content)

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, from the cache where it is there; both have one shape."""
        split = super().read(train=train)
        if train:
            self._train_shape = split.images.shape[1:]
            return split
        wanted = self._train_shape or self.read(train=True).images.shape[1:]
        images = split.images
        if images.shape[1] == 1 and wanted[0] == 3:  # a test split may happen to be all grayscale
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1:] != wanted:
            raise UserError(
                f"data.test_files: the images are {tuple(images.shape[1:])} and those of data.train_files "
                f"{tuple(wanted)} (channels, height, width); set data.image_size, or use files of one kind"
            )
        return split._replace(images=images)

    def declared_class_names(self) -> tuple[str, ...] | None:
        """Return the names all files agree on: label 3 means the same in train and test."""
        train, test = self._files(True), self._files(False)
        if both := {file.resolve() for file in train} & {file.resolve() for file in test}:
            raise UserError(f"'{min(both)}' is in data.train_files and in data.test_files")
        declared = {file: names for file in [*train, *test] if (names := self._declared_names(file)) is not None}
        if not declared:
            return None
        first, agreed = next(iter(declared.items()))
        for file, names in declared.items():
            if names != agreed:
                raise UserError(f"'{first.name}' and '{file.name}' disagree on the names of the classes")
        return agreed

    def labels(self, *, train: bool) -> Tensor:
        """Return the label columns of the files of a split, int64 ``(N,)``."""
        parts = []
        for file in self._files(train):
            with _opened(file) as parquet:
                column = parquet.read(columns=[self.label_column]).column(0)
            if column.null_count:
                raise UserError(f"'{file.name}': column '{self.label_column}' has rows without a label")
            parts.append(torch.from_numpy(column.to_numpy().astype(np.int64)))
        return torch.cat(parts)

    def encoded(self, *, train: bool, rows: Tensor) -> Iterator[Encoded]:
        """Yield the place and the encoded bytes of these rows of the files of a split."""
        first = 0  # rows of the batches before
        for file in self._files(train):
            start = first
            with _opened(file) as parquet:
                for batch in parquet.iter_batches(batch_size=1024, columns=[self.image_column]):
                    low, high = torch.searchsorted(rows, torch.tensor([first, first + len(batch)])).tolist()
                    places = rows[low:high]
                    values = batch.column(0).take((places - first).numpy()).to_pylist()
                    for row, value in zip((places - start).tolist(), values, strict=True):
                        yield f"in '{file.name}', row {row}", value["bytes"] if isinstance(value, dict) else value
                    if high == len(rows):  # the files may be many, and the rows few
                        return
                    first += len(batch)

    def _files(self, train: bool) -> list[Path]:
        argument = self.arguments[not train]
        patterns = self.train_files if train else self.test_files
        if not patterns:
            raise UserError(f"data.{argument} must name at least one file")
        # One file may match two patterns; its rows must not count twice. The name that was given is kept for
        # error messages, because links into a download cache resolve to names that say nothing.
        unique: dict[Path, Path] = {}
        for name in patterns:
            for file in self._find(name, argument):
                unique.setdefault(file.resolve(), file)
        return list(unique.values())

    def _find(self, pattern: str, argument: str) -> list[Path]:
        folders = where_to_look(self.root, ".")
        name = str(Path(pattern).expanduser())
        for folder in folders:
            home = Path(folder).expanduser()
            # Path.glob refuses absolute patterns. A name with brackets that exists is a name, not a pattern.
            found = [name] if (home / name).is_file() else glob(name, root_dir=home, recursive=True)  # noqa: PTH207
            if files := [home / item for item in sorted(found) if (home / item).is_file()]:
                return files
        where = " or ".join(f"'{folder}'" for folder in folders)
        raise UserError(f"data.{argument}: no file matches '{pattern}' in {where} (set data.root or LIGHTNING_DD_DATA)")

    def _declared_names(self, file: Path) -> tuple[str, ...] | None:
        """Check the columns of a file and return its class names, ``None`` if it does not say."""
        import pyarrow as pa

        with _opened(file) as parquet:
            schema = parquet.schema_arrow
        self.check_columns(file.name, schema.names)
        kind = schema.field(self.image_column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(f"'{file.name}': column '{self.image_column}' holds {kind}, not the bytes of images")
        kind = schema.field(self.label_column).type
        if not pa.types.is_integer(kind):
            raise UserError(f"'{file.name}': column '{self.label_column}' holds {kind}, not integers")
        try:
            metadata = json.loads((schema.metadata or {})[b"huggingface"])
            names = metadata["info"]["features"][self.label_column]["names"]
        except (ValueError, KeyError, TypeError):  # anything unexpected means that there are none
            return None
        return tuple(map(str, names)) if isinstance(names, list) and names else None


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a parquet file and turn Arrow's complaints, also those of later reads, into one line."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read '{file}' as parquet: {first_line(error)}") from error


def where_to_look(root: str | None, *defaults: str) -> list[str]:
    """Return the root, or else the defaults and the folder that ``LIGHTNING_DD_DATA`` names."""
    elsewhere = os.environ.get("LIGHTNING_DD_DATA")
    return [root] if root is not None else [*defaults, *([elsewhere] if elsewhere else [])]


def portable(name: str) -> str:
    """Drop the folders of a path that points elsewhere: they mean nothing on another machine."""
    path = Path(name)
    outside = path.is_absolute() or ".." in path.parts or name.startswith("~")
    return path.name if outside else path.as_posix()
