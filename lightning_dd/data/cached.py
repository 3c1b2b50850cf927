"""Real data that is decoded once: into memory, or into a file that is mapped."""

from abc import abstractmethod
from typing import ClassVar

from lightning_dd.data.base import RealData
from lightning_dd.data.cache import cached_split
from lightning_dd.data.decode import Allocate, new_pixels
from lightning_dd.data.images import RawSplit
from lightning_dd.data.mapped import mapped_split


class CachedData(RealData):
    """Real data whose decoding is worth keeping: a subclass gives :meth:`source_key` and :meth:`decode`.

    With ``on_disk`` it is decoded into a memory-mapped file in the cache folder, which
    ``LIGHTNING_DD_CACHE`` names; only the images that are drawn come into memory.
    """

    can_stay_on_disk: ClassVar[bool] = True

    @abstractmethod
    def source_key(self, *, train: bool) -> str:
        """Return the :func:`~lightning_dd.data.cache.content_key` of all that :meth:`decode` depends on.

        Raises:
            UserError: the files are missing.
        """

    @abstractmethod
    def decode(self, *, train: bool, allocate: Allocate = new_pixels) -> RawSplit:
        """Decode the train or the test split from its source, uint8 ``(N, C, H, W)``.

        Args:
            train: which split.
            allocate: makes the array for the pixels; without its use the split has to fit in memory once.

        Raises:
            UserError: the files are missing or not what this class reads.
        """

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, from the cache where it is there.

        Raises:
            UserError: the files are missing or not what this class reads.
        """
        key = self._key(train)
        if self.on_disk:
            return mapped_split(key, lambda allocate: self.decode(train=train, allocate=allocate))
        return cached_split(key, lambda: self.decode(train=train))

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
