"""Real image sets as Lightning data modules."""

from lightning_dd.data.base import RealData
from lightning_dd.data.folder import ImageFolder
from lightning_dd.data.hub import HuggingFace
from lightning_dd.data.imagenet import ImageNet, ImageNette, ImageWoof, TinyImageNet
from lightning_dd.data.images import Batch, DataFacts, RawSplit, Split
from lightning_dd.data.parts import ClassSubset, RealRows
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.standard_sets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, MNIST5k
from lightning_dd.data.tables import ParquetImages

DATA_SETS: dict[str, type[RealData]] = {
    data.__name__: data
    for data in (
        MNIST5k,
        MNIST,
        FashionMNIST,
        CIFAR10,
        CIFAR100,
        SVHN,
        TinyImageNet,
        ImageNette,
        ImageWoof,
        ImageNet,
        ParquetImages,
        ImageFolder,
        HuggingFace,
    )
}
"""The real data sets by class name, the name under which a distilled set remembers them."""
DATA_PARTS: dict[str, type[RealData]] = {part.__name__: part for part in (RealRows, ClassSubset)}
"""Parts of these sets: a set distilled from one remembers the whole set's name, and the part in its ``spec``."""

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DATA_PARTS",
    "DATA_SETS",
    "MNIST",
    "SVHN",
    "Batch",
    "ClassSubset",
    "DataFacts",
    "FashionMNIST",
    "HuggingFace",
    "ImageFolder",
    "ImageNet",
    "ImageNette",
    "ImageWoof",
    "MNIST5k",
    "ParquetImages",
    "Preprocessing",
    "RawSplit",
    "RealData",
    "RealRows",
    "Split",
    "TinyImageNet",
]
