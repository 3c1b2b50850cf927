"""Networks trained on the real data once, cached, and loaded: MetaDD's architectures, teachers."""

from lightning_dd.pretrained.architectures import ArchitectureRecipe, trained_architecture
from lightning_dd.pretrained.classifier import RealClassifier
from lightning_dd.pretrained.turns import accelerator_of, first_process_first

__all__ = [
    "ArchitectureRecipe",
    "RealClassifier",
    "accelerator_of",
    "first_process_first",
    "trained_architecture",
]
