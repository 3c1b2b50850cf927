"""The frozen architectures MetaDD compares: trained on the real data once, cached, and loaded."""

from lightning_dd.invariance.architectures import ArchitectureRecipe, trained_architecture
from lightning_dd.invariance.classifier import RealClassifier

__all__ = ["ArchitectureRecipe", "RealClassifier", "trained_architecture"]
