"""What all readers of image files share: a cache of what was decoded, the choice of classes, the decoder."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.data.cache import Allocate, PixelArray, cached_split, new_pixels
from lightning_dd.data.images import RawSplit, Split
from lightning_dd.utils.errors import UserError, check_range, first_line

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"""Files that count as images, whatever the case of their letters; all others are passed over."""

_TASK = 64  # images per task: one small JPEG takes less time than handing it to a thread
_ROUND = 2048  # images in flight, so that encoded bytes do not pile up

Classes = list[int | str] | str | None
"""Indices or names of classes, the name of a group of :data:`CLASS_GROUPS`, or ``None`` for all."""

CLASS_GROUPS: dict[str, tuple[int, ...]] = {
    "nette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "woof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "meow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "squawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "fruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "yellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
    "mammals": (386, 387, 354, 340, 338, 104, 103, 279, 334, 366),
    "a": (255, 376, 984, 364, 500, 986, 333, 576, 148, 135),
    "b": (129, 916, 90, 275, 995, 874, 102, 259, 685, 139),
    "c": (565, 94, 554, 535, 92, 392, 291, 136, 324, 11),
    "d": (9, 258, 13, 262, 19, 339, 321, 24, 93, 322),
    "e": (816, 96, 100, 145, 739, 713, 783, 76, 688, 326),
}
"""Ten-class subsets of ImageNet's 1,000 classes, in the published order (Howard 2019 for nette and woof; Cazenavette
et al. 2022, arXiv 2203.11932 and 2023, arXiv 2305.01649 for the others). Indices count the sorted WordNet ids."""
ImageSize = int | tuple[int, int] | None
"""Side of images in pixels, or the short side they are resized to and the side that is cropped; ``None`` keeps them."""
Encoded = tuple[str, bytes | Path | None]
"""How an error should call an image, and its bytes or its file, if it has any."""


class CachedData(RealData):
    """Real data whose decoding is worth keeping: a subclass gives :meth:`source_key` and :meth:`decode`.

    With ``on_disk`` it is decoded into a memory-mapped file in the cache folder, which
    ``LIGHTNING_DD_CACHE`` names; only the images that are drawn come into memory.
    """

    can_stay_on_disk: ClassVar[bool] = True

    @abstractmethod
    def source_key(self, *, train: bool) -> str:
        """Return the :func:`~lightning_dd.data.cache.content_key` of all that :meth:`decode` depends on."""

    @abstractmethod
    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Decode the train or the test split from its source, uint8 ``(N, C, H, W)``.

        ``allocate`` makes the array for the pixels; without its use the split has to fit in memory once.
        """

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, from the cache where it is there."""
        return cached_split(
            self._key(train), lambda allocate: self.decode(train=train, allocate=allocate), self.on_disk
        )

    def prepare_data(self) -> None:
        """Fill the cache on one process of each node, so that the others need not decode as well."""
        if self.trainer is None or self.trainer.world_size == 1:
            return  # setup() reads it in a moment, and a lone process would do the work twice without a cache
        self.read(train=True)
        if self.trainer.testing or self.trainer.predicting:
            self.read(train=False)

    def train_key(self) -> str | None:
        """Return a key of the training split where reading its pixels for one would take long."""
        return self._key(True) if self.on_disk else None

    def _key(self, train: bool) -> str:
        """Return :meth:`source_key`, asked for once: looking at a million files takes a while."""
        keys: dict[bool, str] = self.__dict__.setdefault("_keys", {})
        if train not in keys:
            keys[train] = self.source_key(train=train)
        return keys[train]


class EncodedImages(CachedData):
    """Encoded images of any size, some of whose classes may be chosen.

    Args:
        image_size: side of the square images: short side resized (bilinear, anti-aliased), centre cropped. ``None``
            keeps the images, which must then all have one size.
        test_resize: what the short side of test images is resized to instead, before the centre is cropped: the usual
            evaluation of ImageNet has 256 for ``image_size`` 224, and RDED's 8/7 of any size.
        channels: 3 for RGB, 1 for grayscale; ``None`` gives one channel where all images are grayscale.
        classes: class names or labels to keep, in this order, or a group of
            :data:`~lightning_dd.data.readers.CLASS_GROUPS`; ``None`` takes all.
        **kwargs: the other arguments of :class:`~lightning_dd.data.base.RealData`.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        classes: Classes = None,
        test_resize: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_range("at least 1", "data.", image_size=image_size)
        if test_resize is not None and (image_size is None or test_resize < image_size):
            raise UserError(f"data.test_resize must be at least data.image_size ({image_size}), got {test_resize}")
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels must be 1 or 3, got {channels}")
        self.image_size = image_size
        self.test_resize = test_resize
        self.channels = channels
        self.classes = classes
        self.photos, self.skip_broken = False, False

    @abstractmethod
    def sources(self, rows: Tensor) -> Iterator[Encoded]:
        """Yield the encoded images of these rows ``(B,)``, in rising order, of what :meth:`decode` makes of train."""

    @abstractmethod
    def all_class_names(self) -> tuple[str, ...]:
        """Return the names of all classes there are, before any are chosen."""

    def size_of(self, *, train: bool) -> ImageSize:
        """Return how large the images of a split are made."""
        if train or self.test_resize is None or self.image_size is None:
            return self.image_size
        return self.test_resize, self.image_size

    def _split_of(self, raw: RawSplit, rows: Tensor) -> Split:
        split, channels = super()._split_of(raw, rows), raw.images.shape[1]
        first = self.train is None  # which is the training split
        if first and self.image_size is not None and not self.skip_broken:  # else rows would not be places of files
            split.whole = lambda places: self._whole_images(rows[places.cpu()], channels)
        return split

    def _whole_images(self, rows: Tensor, channels: int) -> Iterator[Tensor]:
        """Decode training images neither resized nor cropped, uint8 ``(C, h, w)``, a task at a time."""

        def whole(image: Encoded) -> Tensor:
            return torch.from_numpy(_decode(image, None, channels, self.photos)[0].copy())

        remaining = iter(self.sources(rows))
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(remaining, _TASK)):
                yield from pool.map(whole, batch)

    def spec(self) -> dict[str, Any]:
        """Arguments another machine needs to rebuild this data (never a path)."""
        chosen = {"channels": self.channels, "classes": self.classes, "test_resize": self.test_resize}
        spec = super().spec() | {"image_size": self.image_size}
        return spec | {name: value for name, value in chosen.items() if value is not None}


def choose_classes(classes: Classes, names: Sequence[str]) -> list[int]:
    """Return the indices of the chosen ones among all class names, in the order of the choice.

    Raises:
        UserError: a class or group does not exist, is named twice, or the set is not one with such groups.

    Example:
        >>> choose_classes(["cow", 0], ["ant", "bee", "cow"])
        [2, 0]
    """
    if classes is None:
        return list(range(len(names)))
    if isinstance(classes, str):
        if classes not in CLASS_GROUPS:
            raise UserError(f"data.classes must be a list or one of {', '.join(CLASS_GROUPS)}, got '{classes}'")
        if len(names) != 1000:
            raise UserError(f"data.classes='{classes}' chooses among ImageNet's 1,000 classes; here are {len(names)}")
        return list(CLASS_GROUPS[classes])
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    chosen = [places.get(item, -1) if isinstance(item, str) else item for item in classes]
    for item, place in zip(classes, chosen, strict=True):
        if not 0 <= place < len(names):
            raise UserError(f"data.classes: there is no class {item!r} among the {len(names)} classes")
        if chosen.count(place) > 1:
            raise UserError(f"data.classes names {item!r} twice")
    if not chosen:
        raise UserError("data.classes must name at least one class")
    return chosen


def relabel(labels: Tensor, chosen: Sequence[int], num_classes: int) -> Tensor:
    """Return labels ``(N,)`` in the order of a choice of ``num_classes`` classes, -1 where a row's is not chosen.

    Raises:
        UserError: a label is out of range.

    Example:
        >>> relabel(torch.tensor([0, 1, 2]), [2, 0], 3)
        tensor([ 1, -1,  0])
    """
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise UserError(f"labels must be in [0, {num_classes}), found {int(labels.min())}..{int(labels.max())}")
    places = torch.full((num_classes,), -1)
    places[list(chosen)] = torch.arange(len(chosen))
    return places[labels]


def decode_images(
    sources: Iterable[Encoded],
    count: int,
    image_size: ImageSize = None,
    channels: int | None = None,
    allocate: Allocate = new_pixels,
    photos: bool = False,
    broken: dict[int, str] | None = None,
) -> Tensor:
    """Decode encoded images in a pool of threads.

    ``image_size`` and ``channels`` are those of :class:`EncodedImages`; ``allocate`` is called once, with the shape of
    the result, for the array to decode into.

    Args:
        sources: the images.
        count: how many they are.
        image_size: how large they are made.
        channels: 1 or 3; ``None`` gives one channel where all images are grayscale.
        allocate: makes the array.
        photos: turn them as their EXIF says, and lay transparent ones on white.
        broken: where given, images that cannot be decoded are left out, and their places and faults written here.

    Returns:
        uint8 ``(count, channels, H, W)``, in the order of ``sources``, fewer where some are ``broken``.

    Raises:
        UserError: an image cannot be decoded or the sizes differ, or all are broken.
    """

    def decode_task(task: Sequence[Encoded]) -> list[tuple[PixelArray, bool] | UserError]:
        return [_attempt(image, image_size, channels, photos) for image in task]

    remaining = iter(sources)
    pixels: PixelArray | None = None
    all_grey, position, seen = True, 0, 0
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(remaining, _ROUND)):
            tasks = [batch[start : start + _TASK] for start in range(0, len(batch), _TASK)]
            decoded = (image for images in pool.map(decode_task, tasks) for image in images)
            for (where, _), found in zip(batch, decoded, strict=True):
                seen += 1
                if isinstance(found, UserError):
                    if broken is None:
                        raise found
                    broken[seen - 1] = str(found)
                    continue
                image, grey = found
                if pixels is None:
                    pixels = allocate((count, *image.shape))
                if image.shape != pixels.shape[1:]:
                    raise _of_other_size(where, image.shape, pixels.shape[1:])
                pixels[position] = image
                all_grey, position = all_grey and grey, position + 1
    if pixels is None:
        raise UserError(f"none of the {count} images can be decoded: {(broken or {}).get(0, 'there are none')}")
    assert seen == count
    images = torch.from_numpy(pixels[:position])
    return images[:, :1].clone() if channels is None and all_grey else images


def _of_other_size(where: str, found: Sequence[int], first: Sequence[int]) -> UserError:
    sizes = [f"{width}x{height}" for _, height, width in (found, first)]
    return UserError(
        f"the images differ in size ({where} is {sizes[0]}, the first one {sizes[1]}); set data.image_size to bring "
        "them to one size"
    )


def _attempt(*settings: Any) -> tuple[PixelArray, bool] | UserError:
    try:
        return _decode(*settings)
    except UserError as error:
        return error


def _decode(image: Encoded, image_size: ImageSize, channels: int | None, photo: bool) -> tuple[PixelArray, bool]:
    """Decode one image to ``(C, H, W)`` and say whether it was grayscale."""
    from torchvision.transforms import functional  # a second of importing, only where something is decoded

    where, payload = image
    try:
        if payload is None:
            raise ValueError("it has no bytes")
        with Image.open(payload if isinstance(payload, Path) else BytesIO(payload)) as opened:
            if opened.mode.startswith(("I", "F")):  # Pillow would clip these to 255 without a word
                raise ValueError(f"mode {opened.mode} has more than 8 bits per channel")
            grey = opened.mode in ("1", "L", "LA")
            picture = (_as_seen(opened) if photo else opened).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError:  # its message shows a memory address instead of the cause
        raise UserError(f"cannot decode the image {where}: not a known image format") from None
    except Exception as error:  # Pillow's plugins raise whatever they like on broken files, SyntaxError included
        raise UserError(f"cannot decode the image {where}: {first_line(error)}") from error
    if image_size is not None:
        short, side = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        picture = functional.center_crop(functional.resize(picture, [short]), [side])
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1), grey


def _as_seen(opened: Image.Image) -> Image.Image:
    """Return a photo as a viewer shows it: turned as its EXIF says, and on white where it is transparent."""
    turned = ImageOps.exif_transpose(opened)
    if not turned.has_transparency_data:
        return turned
    layers = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
