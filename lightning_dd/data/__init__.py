"""Real and distilled data as Lightning data modules."""

from lightning_dd.data.base import DataFacts, ImageTensors, RawSplit, RealData
from lightning_dd.data.distilled import DistilledSet
from lightning_dd.data.folder import ImageFolder
from lightning_dd.data.mnist5k import MNIST5k
from lightning_dd.data.parquet import ParquetImages
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.vision import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

DATA_SETS: dict[str, type[RealData]] = {
    data.__name__: data for data in (MNIST5k, MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN, ParquetImages, ImageFolder)
}
"""The real data sets by class name, the name under which a distilled set remembers them."""

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DATA_SETS",
    "MNIST",
    "SVHN",
    "DataFacts",
    "DistilledSet",
    "FashionMNIST",
    "ImageFolder",
    "ImageTensors",
    "MNIST5k",
    "ParquetImages",
    "Preprocessing",
    "RawSplit",
    "RealData",
]
