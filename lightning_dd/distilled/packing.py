"""Whitening matrices in a distilled-set file: a third of their bytes.

Both are symmetric, so their lower halves are enough. The one that test images go through stays in float32, for results
depend on it. The other one only brings images back to pixels, for looking at and for clipping: half precision will do
where it undoes the first one well.
"""

import torch
from torch import Tensor

from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.utils.errors import UserError

_WHITEN, _UNWHITEN, _LOWER = "zca_whiten", "zca_unwhiten", "_lower"
_CLOSE = 2e-3  # of the images' norm


def packed(preprocessing: Preprocessing, images: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a map for a file, whitening matrices as their lower halves ``(d (d + 1) / 2,)``.

    Args:
        preprocessing: of the set.
        images: the set's, ``(n, C, H, W)`` normalised, on which half precision is tried.
    """
    whole = preprocessing.to("cpu").state_dict()
    if _WHITEN not in whole:
        return whole
    lower = {name: _lower(whole[name]) for name in (_WHITEN, _UNWHITEN)}
    state = {name: value for name, value in whole.items() if name not in lower}
    half = {**lower, _UNWHITEN: lower[_UNWHITEN].half()}
    for tried in (half, lower):
        file = state | {name + _LOWER: values for name, values in tried.items()}
        again = Preprocessing.from_state_dict(unpacked(file))
        some = images[:100].cpu()
        if float((again(again.inverse(some)) - some).norm()) <= _CLOSE * float(some.norm()):
            return file
    return whole


def unpacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a map as :meth:`~lightning_dd.data.preprocess.Preprocessing.from_state_dict` takes them.

    Raises:
        UserError: a packed matrix has a length that no matrix has, is of another type, or stands there whole as well.
    """
    if twice := [name for name in state if name + _LOWER in state]:
        raise UserError(f"preprocessing: {twice[0]} stands there twice")
    return {name.removesuffix(_LOWER): _whole(name, value) for name, value in state.items()}


def _lower(matrix: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*matrix.shape)
    return matrix[rows, columns].contiguous()


def _whole(name: str, values: Tensor) -> Tensor:
    if not name.endswith(_LOWER):
        return values
    side = int(((8 * values.numel() + 1) ** 0.5 - 1) / 2)
    if values.ndim != 1 or side * (side + 1) // 2 != values.numel() or values.dtype not in (torch.half, torch.float):
        raise UserError(f"preprocessing: {name} of {tuple(values.shape)} {values.dtype} is no packed matrix")
    matrix = torch.zeros(side, side)
    rows, columns = torch.tril_indices(side, side)
    matrix[rows, columns] = values.float()
    matrix[columns, rows] = values.float()
    return matrix
