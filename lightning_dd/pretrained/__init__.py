"""What is trained on the real data once, cached, and shared by runs: classifiers, expert trajectories, generators."""

from lightning_dd.pretrained.classifier import ClassifierRecipe, trained_classifier
from lightning_dd.pretrained.task import Task
from lightning_dd.pretrained.teacher import Committee, Teacher

__all__ = ["ClassifierRecipe", "Committee", "Task", "Teacher", "trained_classifier"]
