"""What a student minimises, by the form of the labels that it learns from."""

from torch import Tensor
from torch.nn import functional as F

from lightning_dd.losses.krr import half_squared_error


def student_loss(
    logits: Tensor, labels: Tensor, label_kind: str, temperature: float = 1.0, temperature_squared: bool = False
) -> Tensor:
    """Loss of a student: half squared error for regression labels, cross-entropy for hard ones, KL for soft ones.

    Soft labels are a teacher's logits: the loss is the mean over rows of
    ``KL(softmax(labels / T) || softmax(logits / T))``, *without* the factor ``T^2`` of Hinton et al. (2015), as
    SRe2L and RDED train their students, unless it is asked for (SRe2L does for Tiny ImageNet).

    Args:
        logits: ``(N, C)``.
        labels: ``(N, C)`` in the form named by ``label_kind``.
        label_kind: ``learned``, ``centred``, ``hard`` or ``soft``.
        temperature: T, for soft labels.
        temperature_squared: multiply by ``T^2``, for soft labels.

    Example:
        >>> import torch
        >>> student_loss(torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]), "soft", temperature=20.0)
        tensor(0.)
    """
    if label_kind == "hard":
        return F.cross_entropy(logits.float(), labels)
    if label_kind == "soft":
        own, target = (F.log_softmax(rows.float() / temperature, dim=1) for rows in (logits, labels))
        scale = temperature**2 if temperature_squared else 1.0
        return scale * F.kl_div(own, target, reduction="batchmean", log_target=True)
    return half_squared_error(logits, labels)


def loss_name(label_kind: str, temperature: float = 1.0) -> str:
    """Say in words what :func:`student_loss` is for labels of a form.

    Example:
        >>> loss_name("learned")
        'half squared error (regression targets)'
    """
    if label_kind == "hard":
        return "cross-entropy"
    if label_kind == "soft":
        return f"KL divergence at temperature {temperature:g} (labels are logits)"
    return "half squared error (regression targets)"
