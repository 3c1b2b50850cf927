"""The synthetic set: what its images are learned through, and where its labels come from."""

from lightning_dd.synthetic.labels import Labels, TeacherLabels
from lightning_dd.synthetic.latents import Latents
from lightning_dd.synthetic.multiformation import MultiFormation
from lightning_dd.synthetic.parameterisation import ImageSpace, Parameterisation, Pixels, SyntheticSet
from lightning_dd.synthetic.pyramid import Pyramid

__all__ = [
    "ImageSpace",
    "Labels",
    "Latents",
    "MultiFormation",
    "Parameterisation",
    "Pixels",
    "Pyramid",
    "SyntheticSet",
    "TeacherLabels",
]
