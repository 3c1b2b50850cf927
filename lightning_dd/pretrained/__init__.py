"""What is trained on the real data once, cached, and shared by runs: classifiers, expert trajectories, generators."""

from lightning_dd.pretrained.classifier import ClassifierRecipe, Committee, Teacher, trained_classifier
from lightning_dd.pretrained.task import Task

__all__ = ["ClassifierRecipe", "Committee", "Task", "Teacher", "trained_classifier"]
