"""The standard sets that torchvision can download: MNIST, FashionMNIST, CIFAR-10, CIFAR-100 and SVHN.

Channel statistics are FRePo's (Zhou et al. 2022, arXiv 2206.00719), which differ from those of other
repositories for CIFAR-10; SVHN has none there and is measured on the training split.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_dd.data.base import RealData
from lightning_dd.data.images import RawSplit
from lightning_dd.utils.errors import UserError

_DIGITS = tuple("0123456789")


class _TorchvisionData(RealData):
    """A set of ``torchvision.datasets``, downloaded in ``prepare_data``; subclasses only hold constants.

    Args:
        root: folder the set is downloaded to, or already lies in.
        **kwargs: the other arguments of :class:`~lightning_dd.data.base.RealData`.
    """

    dataset: ClassVar[str]
    """Name in ``torchvision.datasets``."""
    layout: ClassVar[Literal["NHW", "NHWC", "NCHW"]] = "NHWC"
    """Axes of the array that torchvision keeps."""
    class_names: ClassVar[tuple[str, ...] | None] = None
    """Name of each label; ``None`` for those torchvision gives."""

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)

    def prepare_data(self) -> None:
        """Download both splits where they are missing.

        Raises:
            UserError: the download failed.
        """
        for train in (True, False):
            self._open(train, download=True)

    def read(self, *, train: bool) -> RawSplit:
        """Return the train or the test split, uint8 ``(N, C, H, W)``.

        Raises:
            UserError: the files are not in ``root``.
        """
        opened = self._open(train, download=False)
        labels = opened.targets if hasattr(opened, "targets") else opened.labels
        return RawSplit(
            self._to_nchw(torch.as_tensor(opened.data)),
            torch.as_tensor(labels, dtype=torch.int64),
            self.class_names or tuple(opened.classes),
        )

    def _to_nchw(self, pixels: Tensor) -> Tensor:
        if self.layout == "NHW":
            return pixels.unsqueeze(1)
        return pixels.permute(0, 3, 1, 2).contiguous() if self.layout == "NHWC" else pixels.contiguous()

    def _which(self, train: bool) -> dict[str, Any]:
        """Return the argument by which torchvision tells train from test."""
        return {"train": train}

    def _open(self, train: bool, *, download: bool) -> Any:
        from torchvision import datasets  # a second of importing, only for those who use these sets

        try:
            return getattr(datasets, self.dataset)(self.root, download=download, **self._which(train))
        # Network errors are OSErrors; torchvision says "not found or corrupted" with a RuntimeError, and an
        # unreadable file can come out as an EOFError or ValueError of its parser.
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            what = "could not be downloaded to" if download else "was not found in"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.name} {what} data.root='{self.root}' ({reason}); "
                "set data.root to the folder that holds it, or run prepare_data() with a network"
            ) from error


class MNIST(_TorchvisionData):
    """Handwritten digits, ``(1, 28, 28)``, 60,000 + 10,000 (LeCun et al. 1998)."""

    dataset = "MNIST"
    layout = "NHW"
    class_names = _DIGITS
    can_be_mirrored = False
    channel_mean: Sequence[float] | None = (0.1307,)
    channel_std: Sequence[float] | None = (0.3081,)


class FashionMNIST(_TorchvisionData):
    """Clothes, ``(1, 28, 28)``, 60,000 + 10,000 (Xiao et al. 2017, arXiv 1708.07747)."""

    dataset = "FashionMNIST"
    layout = "NHW"
    channel_mean: Sequence[float] | None = (0.2861,)
    channel_std: Sequence[float] | None = (0.3530,)


class CIFAR10(_TorchvisionData):
    """Photographs of 10 kinds of things, ``(3, 32, 32)``, 50,000 + 10,000 (Krizhevsky 2009)."""

    dataset = "CIFAR10"
    channel_mean: Sequence[float] | None = (0.4914, 0.4822, 0.4465)
    channel_std: Sequence[float] | None = (0.2470, 0.2435, 0.2616)


class CIFAR100(_TorchvisionData):
    """Photographs of 100 kinds of things, ``(3, 32, 32)``, 50,000 + 10,000 (Krizhevsky 2009)."""

    dataset = "CIFAR100"
    channel_mean: Sequence[float] | None = (0.5071, 0.4866, 0.4409)
    channel_std: Sequence[float] | None = (0.2673, 0.2564, 0.2762)


class SVHN(_TorchvisionData):
    """House numbers, ``(3, 32, 32)``, 73,257 + 26,032 without the extra images (Netzer et al. 2011)."""

    dataset = "SVHN"
    layout = "NCHW"
    class_names = _DIGITS
    can_be_mirrored = False

    def _which(self, train: bool) -> dict[str, Any]:
        return {"split": "train" if train else "test"}
