"""ImageNet and the sets drawn from it: Tiny-ImageNet, ImageNette, ImageWoof, and the ten-class subsets.

They are looked for as folders per class or as parquet shards, and read the same from both: labels count the sorted
WordNet ids. Channel statistics are FRePo's (Zhou et al. 2022, arXiv 2206.00719) where it has some.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_dd.data.cache import Allocate, new_pixels
from lightning_dd.data.folder import ImageFolder
from lightning_dd.data.images import RawSplit
from lightning_dd.data.readers import CLASS_GROUPS, Classes, Encoded, EncodedImages, choose_classes
from lightning_dd.data.standard_sets import from_torchvision
from lightning_dd.data.tables import ParquetImages, where_to_look
from lightning_dd.utils.errors import UserError


class _FromImageNet(EncodedImages):
    """A published set in either of two layouts; the test split is the published validation split.

    It is looked for in ``root``, or in the working folder, ``data`` and the folder that ``LIGHTNING_DD_DATA`` names.
    """

    parquet: ClassVar[str]
    """Start of the names of its parquet files: ``<parquet>-train*.parquet`` and ``<parquet>-val*.parquet``."""
    archives: Sequence[str]
    """Names its folder may have, the best one first; it holds ``train`` and ``val``."""
    among_imagenet: Sequence[int] = range(1000)
    """Places of its classes among ImageNet's."""
    reader: ClassVar[type[ImageFolder]] = ImageFolder

    def __init__(self, image_size: int, classes: Classes = None, **kwargs: Any) -> None:
        super().__init__(image_size=image_size, channels=None, classes=classes, **kwargs)

    def named(self, found: Sequence[str]) -> Sequence[str]:
        """Return the names of all classes in label order, whatever the files call them: torchvision's."""
        if len(found) != len(self.among_imagenet):
            raise UserError(
                f"{self.name} has {len(self.among_imagenet):,} classes and {len(found)} were found; "
                "use ImageFolder for anything else"
            )
        names = imagenet_names()
        return [names[place] for place in self.among_imagenet]

    def all_class_names(self) -> tuple[str, ...]:
        """Return the names of all classes in label order."""
        return tuple(self.named(self._reader.all_class_names()))

    def source_key(self, *, train: bool) -> str:
        """Return the key of the files that were found."""
        return self._reader.source_key(train=train)

    def sources(self, rows: Tensor) -> Iterator[Encoded]:
        """Yield what was found of these rows of the training split."""
        return self._reader.sources(rows)

    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Decode the files that were found, uint8 ``(N, 3, image_size, image_size)``."""
        return self._reader.decode(train=train, allocate=allocate)

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, from the cache where it is there."""
        names = self.all_class_names()
        chosen = tuple(names[place] for place in choose_classes(self.classes, names))
        return super().read(train=train)._replace(class_names=chosen)

    @cached_property
    def _reader(self) -> ImageFolder | ParquetImages:
        """What reads the files that were found."""
        found = self._find()
        names = self.named(found.all_class_names())
        found.classes = None if self.classes is None else list(choose_classes(self.classes, names))
        return found

    def _find(self) -> ImageFolder | ParquetImages:
        places = where_to_look(self.root, ".", "data")
        shards = [(f"{self.parquet}-train*.parquet", f"{self.parquet}-val*.parquet")]
        if self.root is not None:  # the hub's names say nothing of the set: only where the folder is given
            shards += [(f"{inside}train-*.parquet", f"{inside}val*.parquet") for inside in ("", "data/")]
        settings: dict[str, Any] = {
            "image_size": self.image_size,
            "test_resize": self.test_resize,
            "channels": 3,
            "on_disk": self.on_disk,
        }
        for place in places:
            home = Path(place).expanduser()
            for folder in [home / name for name in self.archives] + ([home] if self.root is not None else []):
                if (folder / "train").is_dir():
                    return self.reader(str(folder), photos=False, **settings)  # as published numbers read them
            for train, test in shards:
                if any(home.glob(train)) and any(home.glob(test)):
                    return ParquetImages(train, test, root=str(home), **settings)
        where = " or ".join(f"'{place}'" for place in places)
        raise UserError(
            f"{self.name} was found neither as '{self.archives[0]}/train' nor as '{shards[0][0]}' in {where}; set "
            "data.root (or LIGHTNING_DD_DATA) to the folder that holds it"
        )


class _TinyFolder(ImageFolder):
    """Tiny-ImageNet's archive: its test images have no labels, and those of ``val`` are in a list."""

    test_folders = ("val",)

    def _listed(self, folder: Path) -> list[tuple[Path, int]]:
        list_of_labels = folder / "val_annotations.txt"
        if not list_of_labels.is_file() or not (folder / "images").is_dir():
            return super()._listed(folder)
        labels = {name: label for label, name in enumerate(self._names())}
        rows = (line.split("\t")[:2] for line in list_of_labels.read_text().splitlines() if line)
        return [(folder / "images" / file, labels[name]) for file, name in sorted(rows) if name in labels]


class TinyImageNet(_FromImageNet):
    """200 classes of ImageNet at 64 x 64 pixels, 100,000 + 10,000 images (Le & Yang 2015).

    Read from the archive's folder ``tiny-imagenet-200`` (as it is, or with ``val`` sorted into folders per class), or
    from ``tiny-imagenet-train*.parquet`` and ``tiny-imagenet-val*.parquet``. Classes are called by their WordNet id.

    Args:
        image_size: side of the images in pixels.
        classes: WordNet ids or labels to keep, in this order; ``None`` takes all.
        **kwargs: ``root``, its folder, and the other arguments of :class:`~lightning_dd.data.base.RealData`.
    """

    parquet = "tiny-imagenet"
    archives = ("tiny-imagenet-200", "tiny-imagenet")
    reader = _TinyFolder
    channel_mean: Sequence[float] | None = (0.4759, 0.4481, 0.3926)
    channel_std: Sequence[float] | None = (0.2763, 0.2687, 0.2813)

    def __init__(self, image_size: int = 64, classes: Classes = None, **kwargs: Any) -> None:
        super().__init__(image_size, classes, **kwargs)

    def named(self, found: Sequence[str]) -> Sequence[str]:
        """Return the WordNet ids: parquet files often have a word after them."""
        ids = [name.split(" ")[0] for name in found]
        if ids != sorted(ids):
            raise UserError(
                f"{self.name}: the classes are not in the order of their WordNet ids, so labels would mean others"
            )
        return ids


class ImageNet(_FromImageNet):
    """ImageNet-1K (Deng et al. 2009), or classes of it, at any size: short side resized, centre cropped.

    Read from ``imagenet`` (or ``ILSVRC2012``, or the archive's ``ILSVRC/Data/CLS-LOC``) with one folder per class in
    ``train`` and ``val``, or from ``imagenet-train*.parquet`` and ``imagenet-val*.parquet``; with ``root`` also from
    the hub's ``train-*.parquet`` and ``val*.parquet``. Classes are called by torchvision's names. Images of 64 pixels
    in this way are not those of the down-sampled archive, which does not crop. At 64 pixels the training split takes
    16 GB as decoded, at 224 pixels 190 GB: set ``on_disk``.

    Args:
        image_size: side of the images in pixels.
        classes: names or indices to keep, in this order, or a group of
            :data:`~lightning_dd.data.readers.CLASS_GROUPS`; ``None`` takes all 1,000.
        **kwargs: ``root``, its folder, and the other arguments of :class:`~lightning_dd.data.base.RealData`.
    """

    parquet = "imagenet"
    archives = ("imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
    channel_mean: Sequence[float] | None = (0.485, 0.456, 0.406)
    channel_std: Sequence[float] | None = (0.229, 0.224, 0.225)
    small_statistics: ClassVar = {
        32: ((0.4811, 0.4575, 0.4079), (0.2604, 0.2532, 0.2682)),
        64: ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    }
    """Channel means and standard deviations of the down-sampled images, by their side."""

    def __init__(self, image_size: int = 64, classes: Classes = None, **kwargs: Any) -> None:
        super().__init__(image_size, classes, **kwargs)
        if image_size in self.small_statistics:
            self.channel_mean, self.channel_std = self.small_statistics[image_size]
        if isinstance(classes, str):
            choose_classes(classes, [""] * 1000)  # a group that does not exist is refused before any file is read


class _TenClasses(_FromImageNet):
    """Ten classes of ImageNet as an archive of their own (Howard 2019), labelled in the published order.

    Args:
        image_size: side of the images in pixels, 128 in most papers.
        **kwargs: ``root``, its folder, and the other arguments of :class:`~lightning_dd.data.base.RealData`.
    """

    def __init__(self, image_size: int = 128, **kwargs: Any) -> None:
        group = CLASS_GROUPS[self.parquet.removeprefix("image")]
        self.among_imagenet = sorted(group)  # in the archive: as the WordNet ids sort, so do the places
        published: Classes = [self.among_imagenet.index(place) for place in group]
        super().__init__(image_size=image_size, classes=published, **kwargs)
        sizes = [f"-{side}" for side in (160, 320) if image_size <= side]  # large enough, smallest first
        self.archives = [f"{self.parquet}2{size}" for size in [*sizes, ""]]

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data, all but ``root``."""
        return {key: value for key, value in super().spec().items() if key != "classes"}


class ImageNette(_TenClasses):
    """Ten easy classes of ImageNet, 9,469 + 3,925 images (Howard 2019), downloaded to ``root`` or ``data``.

    Read from the archives' folders ``imagenette2-160``, ``imagenette2-320`` or ``imagenette2``, or from
    ``imagenette-train*.parquet`` and ``imagenette-val*.parquet``.
    """

    parquet = "imagenette"
    channel_mean: Sequence[float] | None = (0.4626, 0.4588, 0.4251)
    channel_std: Sequence[float] | None = (0.2790, 0.2745, 0.2973)

    def prepare_data(self) -> None:
        """Download the smallest archive that is large enough, if there is none."""
        try:
            self._find()
        except UserError:
            size = self.archives[0].partition("-")[2]
            from_torchvision(self.name, self.root or "data", True, "Imagenette", size=f"{size}px" if size else "full")
        super().prepare_data()


class ImageWoof(_TenClasses):
    """Ten breeds of dogs in ImageNet, 9,025 + 3,929 images (Howard 2019).

    Read from the archives' folders ``imagewoof2-160``, ``imagewoof2-320`` or ``imagewoof2``, or from
    ``imagewoof-train*.parquet`` and ``imagewoof-val*.parquet``.
    """

    parquet = "imagewoof"
    channel_mean: Sequence[float] | None = (0.4917, 0.4613, 0.3931)
    channel_std: Sequence[float] | None = (0.2513, 0.2442, 0.2530)


def imagenet_names() -> list[str]:
    """Return torchvision's names of ImageNet's 1,000 classes, in label order."""
    from torchvision.models import ResNet50_Weights  # a second of importing, only for those who use these sets

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
