"""The synthetic set: what its images are learned through, and where its labels come from."""

from lightning_dd.synthetic.labels import Labels, TeacherLabels
from lightning_dd.synthetic.latents import Latents
from lightning_dd.synthetic.parameterisation import Parameterisation, Pixels, SyntheticSet

__all__ = ["Labels", "Latents", "Parameterisation", "Pixels", "SyntheticSet", "TeacherLabels"]
