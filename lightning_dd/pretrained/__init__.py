"""Networks trained on the real data once, cached, and loaded: MetaDD's architectures, teachers, generators."""

from lightning_dd.pretrained.architectures import ArchitectureRecipe, trained_architecture
from lightning_dd.pretrained.classifier import RealClassifier
from lightning_dd.pretrained.generator import GeneratorRecipe, GeneratorTask, prepare_generator
from lightning_dd.pretrained.turns import accelerator_of, first_process_first

__all__ = [
    "ArchitectureRecipe",
    "GeneratorRecipe",
    "GeneratorTask",
    "RealClassifier",
    "accelerator_of",
    "first_process_first",
    "prepare_generator",
    "trained_architecture",
]
