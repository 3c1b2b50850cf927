"""Networks: the field's own, and any of timm or torchvision fitted to small images."""

from lightning_dd.models.convnet import ConvNet, FRePoConv
from lightning_dd.models.factory import ArchitectureSpec, build_network, known_architectures
from lightning_dd.models.interface import Network

__all__ = ["ArchitectureSpec", "ConvNet", "FRePoConv", "Network", "build_network", "known_architectures"]
