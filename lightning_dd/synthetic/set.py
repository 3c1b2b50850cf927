"""The synthetic set: learnable images and labels."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.losses.labels import LABEL_KINDS, initial_labels
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic.parameterisation import Parameterisation
from lightning_dd.utils.errors import UserError


class SyntheticSet(nn.Module):
    """Images that a parameterisation makes, and labels, in blocks of ``ipc`` rows per class, classes in order.

    Images live in normalised space. Labels start from :func:`~lightning_dd.losses.labels.initial_labels`; those of the
    kind ``learned`` are a parameter, the others are fixed.

    Args:
        parameterisation: what the images are learned through; its tensors are made here.
        ipc: images per class, at least 1.
        label_kind: ``learned``, ``centred`` or ``hard``.
        task: what is distilled.

    Attributes:
        labels: ``(C * ipc, C)`` parameter, or buffer when fixed.
        classes: ``(C * ipc,)`` int64 buffer, the class each row belongs to.

    Raises:
        UserError: ``ipc`` or ``label_kind`` is out of range.
    """

    labels: Tensor
    classes: Tensor

    def __init__(self, parameterisation: Parameterisation, ipc: int, label_kind: str, task: Task) -> None:
        super().__init__()
        check_synthetic(ipc, label_kind)
        num_classes = task.facts.num_classes
        self.ipc, self.label_kind = ipc, label_kind
        self.register_buffer("classes", torch.arange(num_classes).repeat_interleave(ipc), persistent=False)
        parameterisation.build(self.classes, task)
        self.parameterisation = parameterisation
        labels = initial_labels(self.classes, num_classes, label_kind)
        if label_kind == "learned":
            self.labels = nn.Parameter(labels)
        else:
            self.register_buffer("labels", labels)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def images(self) -> Tensor:
        """The images ``(n, C, H, W)``, normalised, with graph to what is learned."""
        return self.parameterisation.render()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return images ``(n, C, H, W)``, normalised, and labels ``(n, num_classes)``."""
        return self.images, self.labels

    def parameter_groups(self, lr: float, label_lr: float | None = None) -> list[dict[str, Any]]:
        """Return all that is learned as an outer optimizer's parameter groups, each with its learning rate.

        Args:
            lr: the outer learning rate.
            label_lr: that of learned labels; ``None`` is the same.
        """
        groups = self.parameterisation.parameter_groups(lr)
        if self.label_kind != "learned":
            return groups
        if label_lr is None and len(groups) == 1:
            return [{**groups[0], "params": [*groups[0]["params"], self.labels]}]
        return [*groups, {"params": [self.labels], "lr": lr if label_lr is None else label_lr, "name": "labels"}]


def check_synthetic(ipc: int, label_kind: str) -> None:
    """Refuse settings that no synthetic set can have.

    Raises:
        UserError: ``ipc`` is below 1 or ``label_kind`` is unknown.
    """
    if ipc < 1:
        raise UserError(f"ipc (images per class) must be at least 1, got {ipc}")
    if label_kind not in LABEL_KINDS:
        raise UserError(f"labels must be one of {', '.join(LABEL_KINDS)}, got '{label_kind}'")
