"""The forms that labels of a synthetic set have."""

import math

import torch
from torch import Tensor

from lightning_dd.losses.krr import centred_one_hot

LABEL_KINDS = ("learned", "centred", "hard")
"""``learned`` and ``centred`` rows are regression targets around 0, ``hard`` ones are one-hot."""


def initial_labels(classes: Tensor, num_classes: int, label_kind: str) -> Tensor:
    """Return label rows ``(n, num_classes)`` of a kind for class indices ``(n,)``.

    ``learned`` and ``centred`` labels start from FRePo's ``(onehot - 1/C) / sqrt(C/10)`` (Zhou et al. 2022), ``hard``
    ones are one-hot.

    Example:
        >>> initial_labels(torch.tensor([0]), 2, "hard")
        tensor([[1., 0.]])
    """
    if label_kind == "hard":
        one_hot: Tensor = torch.eye(num_classes, device=classes.device)[classes]
        return one_hot
    return centred_one_hot(classes, num_classes) / math.sqrt(num_classes / 10)
