"""Preprocessing: pixels in [0, 1] to the space networks see, and back.

Two kinds: channel standardisation, and ZCA whitening with FRePo's *relative* regulariser on top of it
(Zhou et al. 2022, arXiv 2206.00719). Images distilled in whitened space are worthless unless test images
are whitened with the same matrix, so the matrices travel with the distilled set.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_dd.errors import UserError

KINDS = ("standardise", "zca")


class Preprocessing:
    """An invertible map between pixels in [0, 1] and normalised images, both ``(N, C, H, W)`` float32.

    ``normalised = whiten((pixels - mean) / std)``; ``whiten`` is the identity for ``standardise``.
    Calling the object applies it; :meth:`inverse` undoes it.

    Args:
        mean: channel means, ``(C,)``, of pixels in [0, 1].
        std: channel standard deviations, ``(C,)``.
        zca_mean: mean of the flattened standardised images, ``(C*H*W,)``; ``None`` without whitening.
        zca_whiten: whitening matrix ``(C*H*W, C*H*W)``, symmetric.
        zca_unwhiten: its inverse, same shape.
    """

    def __init__(
        self,
        mean: Tensor | Sequence[float],
        std: Tensor | Sequence[float],
        zca_mean: Tensor | None = None,
        zca_whiten: Tensor | None = None,
        zca_unwhiten: Tensor | None = None,
    ) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float32)
        self.std = torch.as_tensor(std, dtype=torch.float32)
        self.zca_mean = zca_mean
        self.zca_whiten = zca_whiten
        self.zca_unwhiten = zca_unwhiten

    @property
    def kind(self) -> str:
        """``"standardise"`` or ``"zca"``."""
        return "standardise" if self.zca_whiten is None else "zca"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 1], ``(N, C, H, W)``, to normalised images on the same device.

        Example:
            >>> to_normalised = Preprocessing(mean=[0.5], std=[0.25])
            >>> to_normalised(torch.ones(1, 1, 2, 2)).unique()
            tensor([2.])
        """
        images = (pixels - self._channels(self.mean, pixels)) / self._channels(self.std, pixels)
        if self.zca_mean is None or self.zca_whiten is None:
            return images
        return _apply_rows(images, self.zca_mean, self.zca_whiten, before=True)

    def inverse(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` back to pixels (not clipped to [0, 1])."""
        if self.zca_mean is not None and self.zca_unwhiten is not None:
            images = _apply_rows(images, self.zca_mean, self.zca_unwhiten, before=False)
        return images * self._channels(self.std, images) + self._channels(self.mean, images)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that define this map, without the absent ones."""
        names = ("mean", "std", "zca_mean", "zca_whiten", "zca_unwhiten")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Preprocessing":
        """Rebuild the map from :meth:`state_dict`."""
        return cls(**dict(state))

    @staticmethod
    def _channels(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device).view(1, -1, 1, 1)


def fit_preprocessing(
    kind: str,
    pixels: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    zca_ridge: float = 0.1,
) -> Preprocessing:
    """Fit a preprocessing on training pixels, uint8 ``(N, C, H, W)`` or float in [0, 1].

    Args:
        kind: ``"standardise"`` or ``"zca"``.
        pixels: the training images.
        mean: channel means to use instead of the measured ones (published statistics).
        std: channel standard deviations, likewise.
        zca_ridge: FRePo's regulariser relative to the mean variance.

    Raises:
        UserError: ``kind`` is unknown.
    """
    if kind not in KINDS:
        raise UserError(f"preprocessing must be one of {', '.join(KINDS)}, got '{kind}'")
    scaled = to_unit(pixels)
    if mean is None or std is None:
        spread, centre = torch.std_mean(scaled.double(), dim=(0, 2, 3), correction=0)
        mean, std = centre.tolist(), spread.clamp_min(1e-8).tolist()
    channelwise = Preprocessing(mean, std)
    if kind == "standardise":
        return channelwise
    centre, whiten, unwhiten = fit_zca(channelwise(scaled), zca_ridge)
    return Preprocessing(mean, std, centre, whiten, unwhiten)


def fit_zca(images: Tensor, ridge: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Fit FRePo's ZCA: eigenvectors of ``cov + ridge * tr(cov)/d * I``.

    With ``cov + ridge * tr(cov)/d * I = U diag(s) U^T`` the whitening matrix is ``U diag(s^-1/2) U^T`` and its
    inverse ``U diag(s^1/2) U^T``. When there are fewer images than dimensions, eigenvalues beyond the number of
    images are replaced by 1, as FRePo does. Computed in float64, returned in float32.

    Args:
        images: standardised images, ``(N, C, H, W)``.
        ridge: regulariser relative to the mean variance ``tr(cov)/d``.

    Returns:
        mean ``(d,)``, whitening ``(d, d)`` and un-whitening ``(d, d)`` matrices, ``d = C*H*W``.
    """
    rows = images.flatten(1)
    count, dims = rows.shape
    mean = rows.double().mean(0)
    covariance = torch.zeros(dims, dims, dtype=torch.float64, device=rows.device)
    for block in torch.split(rows, 8192):  # float64 copies of the whole set would triple its memory
        centred = block.double() - mean
        covariance += centred.T @ centred
    covariance /= count
    regularised = covariance + ridge * covariance.trace() / dims * torch.eye(
        dims, dtype=torch.float64, device=rows.device
    )
    values, vectors = torch.linalg.eigh(regularised)
    values, vectors = values.flip(0), vectors.flip(1)  # descending, so that `count` cuts the smallest
    if count < dims:
        values = torch.where(torch.arange(dims, device=values.device) < count, values, torch.ones_like(values))
    whiten = (vectors * values.rsqrt()) @ vectors.T
    unwhiten = (vectors * values.sqrt()) @ vectors.T
    return mean.float(), whiten.float(), unwhiten.float()


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]; float pixels pass unchanged."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def _apply_rows(images: Tensor, mean: Tensor, matrix: Tensor, *, before: bool) -> Tensor:
    """Multiply flattened images by ``matrix``, with ``mean`` taken off before or added after (no autocast)."""
    with torch.autocast(images.device.type, enabled=False):
        rows = images.float().flatten(1)
        mean, matrix = mean.to(rows.device), matrix.to(rows.device)
        rows = (rows - mean) @ matrix if before else rows @ matrix + mean
    return rows.view_as(images)
