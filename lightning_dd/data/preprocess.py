"""Preprocessing: pixels in [0, 1] to the space networks see, and back."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.utils.errors import UserError

KINDS = ("standardise", "zca", "kornia-zca")
"""``zca`` is FRePo's; ``kornia-zca`` is what MTT, DATM and their kin call ZCA. Neither can stand for the other."""
LARGEST_BLOCK = 64
"""Side in pixels up to which images are whitened whole; FRePo whitens larger ones in blocks of at most this side."""
RIDGE = 0.1
"""The regulariser of the covariance that both papers take: FRePo relative to the mean variance, MTT as it stands."""

_SMALLEST_BLOCK = 16  # the side below which a block chosen for the user would hardly whiten anything
_FIT_NUMBERS = 8192 * 3072  # numbers in a block of a fit: float64 copies of the whole set would triple its memory


class Preprocessing:
    """An invertible map between pixels in [0, 1] and normalised images, both ``(N, C, H, W)`` float32.

    ``normalised = whiten((pixels - mean) / std)``, where only ZCA whitens. Images distilled in whitened space are
    worthless unless test images are whitened with the same matrix, so it travels with the distilled set.

    Images larger than the whitening matrix are whitened in blocks: with stride s, block (i, j) holds the pixels
    ``[i::s, j::s]`` of every channel (a checkerboard of s x s sub-images), and all blocks share the matrix. The
    stride follows from the shapes, so it is not stored.

    Args:
        mean: channel means, ``(C,)``, of pixels in [0, 1].
        std: channel standard deviations, ``(C,)``.
        zca_mean: mean of the flattened standardised images, ``(C*H*W,)``; ``None`` without whitening.
        zca_whiten: whitening matrix ``(d, d)``, symmetric, ``d = C*H*W / s**2``.
        zca_unwhiten: its inverse, same shape.

    Raises:
        UserError: the shapes of mean and matrices disagree, or a number is not finite or a deviation not positive.
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
        usable = torch.isfinite(self.mean).all() and torch.isfinite(self.std).all() and (self.std > 0).all()
        if self.mean.ndim != 1 or self.std.shape != self.mean.shape or not usable:
            raise UserError(
                "preprocessing: mean and std must be one finite number per channel, std above 0, "
                f"got {self.mean.tolist()} and {self.std.tolist()}"
            )
        self.zca_mean = zca_mean
        self.zca_whiten = zca_whiten
        self.zca_unwhiten = zca_unwhiten
        self.zca_stride = _stride_of(zca_mean, zca_whiten, zca_unwhiten)
        """Stride s of the blocks; 1 where images are whitened whole, or not at all."""

    @property
    def kind(self) -> str:
        """``"standardise"``, or ``"zca"`` where images are whitened, whoever fitted the matrix."""
        return "standardise" if self.zca_whiten is None else "zca"

    def __str__(self) -> str:
        return self.kind if self.zca_stride == 1 else f"{self.kind} in {self.zca_stride}x{self.zca_stride} blocks"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 1], ``(N, C, H, W)``, to normalised images on the same device.

        Example:
            >>> to_normalised = Preprocessing(mean=[0.5], std=[0.25])
            >>> to_normalised(torch.ones(1, 1, 2, 2)).unique()
            tensor([2.])
        """
        return self.whiten((pixels - self._channels(self.mean, pixels)).div_(self._channels(self.std, pixels)))

    def inverse(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` back to pixels (not clipped to [0, 1])."""
        images = self.unwhiten(images)
        return images * self._channels(self.std, images) + self._channels(self.mean, images)

    def whiten(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` standardised by channel to normalised ones: the same without ZCA."""
        if self.zca_mean is None or self.zca_whiten is None:
            return images
        with torch.autocast(images.device.type, enabled=False):
            rows = images.float().flatten(1) - self.zca_mean.to(images.device)
            return _times(rows.view_as(images), self.zca_whiten, self.zca_stride)

    def unwhiten(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to those standardised by channel."""
        if self.zca_mean is None or self.zca_unwhiten is None:
            return images
        with torch.autocast(images.device.type, enabled=False):
            rows = _times(images.float(), self.zca_unwhiten, self.zca_stride).flatten(1)
            return (rows + self.zca_mean.to(images.device)).view_as(images)

    def clipped(self, images: Tensor) -> Tensor:
        """Return normalised images ``(N, C, H, W)`` whose pixels are clipped to [0, 1]."""
        if self.kind == "zca":
            return self(self.inverse(images).clamp(0, 1))
        mean, std = (self._channels(values, images) for values in (self.mean, self.std))
        return images.clamp(-mean / std, (1 - mean) / std)

    def to(self, device: torch.device | str) -> "Preprocessing":
        """Return the same map with its tensors on a device, for many small batches there; itself if it is there."""
        if self.mean.device == torch.device(device):
            return self
        return Preprocessing(**{name: value.to(device) for name, value in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that define this map, without the absent ones."""
        names = ("mean", "std", "zca_mean", "zca_whiten", "zca_unwhiten")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Preprocessing":
        """Rebuild the map from :meth:`state_dict`.

        Raises:
            UserError: a tensor is missing, unknown, not float32, not finite, or does not fit the others.
        """
        known = {"mean", "std"} | ({"zca_mean", "zca_whiten", "zca_unwhiten"} if len(state) > 2 else set())
        if set(state) != known:
            raise UserError(f"preprocessing: expected {', '.join(sorted(known))}, got {', '.join(sorted(state))}")
        for name, value in state.items():
            if value.dtype != torch.float32 or not bool(torch.isfinite(value).all()):
                raise UserError(f"preprocessing: {name} must hold finite float32 numbers")
        return cls(**dict(state))

    @staticmethod
    def _channels(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device).view(1, -1, 1, 1)


def fit_preprocessing(
    kind: str,
    pixels: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    zca_ridge: float | None = None,
    zca_block: int | None = None,
    device: torch.device | str = "cpu",
    rows: Tensor | None = None,
) -> Preprocessing:
    """Fit a preprocessing on training pixels.

    - ``standardise``: channel means and deviations.
    - ``zca``: whitens standardised images with a regulariser *relative* to the mean variance, as FRePo (Zhou et al.
      2022, arXiv 2206.00719) does.
    - ``kornia-zca``: whitens raw pixels with an *absolute* regulariser, as MTT (Cazenavette et al. 2022, arXiv
      2203.11932) does by kornia. On CIFAR-10 its 0.1 is 1.6 times the mean variance, so it whitens far less.

    Pixels are read block by block, so they need not fit in memory. Computed in float64, returned in float32.

    Args:
        kind: one of :data:`KINDS`.
        pixels: the images, uint8 ``(N, C, H, W)`` or float in [0, 1].
        mean: channel means to use instead of the measured ones (published statistics).
        std: channel standard deviations, likewise.
        zca_ridge: regulariser of ZCA; ``None`` takes the published :data:`RIDGE`.
        zca_block: side in pixels of the blocks that are whitened; see :func:`block_stride`.
        device: where to compute; the result is on the CPU.
        rows: int64 indices of the training images among ``pixels``; ``None`` is all.

    Raises:
        UserError: ``kind`` is unknown, ``mean`` or ``std`` is not one number per channel, ``zca_block`` does not divide
            the images, or they are too large for ``kornia-zca``.
    """
    if kind not in KINDS:
        raise UserError(f"preprocessing must be one of {', '.join(KINDS)}, got '{kind}'")
    channels, height, width = pixels.shape[1:]
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise UserError(f"data.{name} must be one number per channel, {channels} here, got {len(values)}")
    stride = 1 if kind == "standardise" else block_stride(height, width, zca_block)
    ridge = RIDGE if zca_ridge is None else zca_ridge
    blocks = _Blocks(pixels, torch.arange(len(pixels)) if rows is None else rows, device)
    if kind == "kornia-zca":
        if stride > 1:
            raise UserError(f"data.preprocessing: kornia-zca whitens whole images, of up to {LARGEST_BLOCK} pixels")
        return _fit_zca(blocks, Preprocessing([0.0] * channels, [1.0] * channels), ridge, 1, absolute=True)
    if mean is None or std is None:
        measured = _channel_statistics(blocks)
        mean, std = measured[0] if mean is None else mean, measured[1] if std is None else std
    channelwise = Preprocessing(mean, std)
    return channelwise if kind == "standardise" else _fit_zca(blocks, channelwise, ridge, stride)


def block_stride(height: int, width: int, zca_block: int | None = None) -> int:
    """Return the stride of the blocks in which images of this size are whitened.

    Args:
        height: of the images, in pixels.
        width: likewise.
        zca_block: longer side of a block; ``None`` whitens images of up to 64 pixels whole, and larger ones in the
            largest blocks of at most 64 pixels.

    Raises:
        UserError: no such blocks fill the image.

    Example:
        >>> block_stride(32, 32), block_stride(128, 128), block_stride(224, 224), block_stride(64, 64, zca_block=32)
        (1, 2, 4, 2)
    """
    side = max(height, width)
    if zca_block is not None:
        stride = side // zca_block if 0 < zca_block <= side and side % zca_block == 0 else 0
        if stride == 0 or height % stride or width % stride:
            raise UserError(f"data.zca_block={zca_block} must divide the sides of the images, {height}x{width}")
        return stride
    strides = range(-(-side // LARGEST_BLOCK), side // _SMALLEST_BLOCK + 1) if side > LARGEST_BLOCK else [1]
    found = next((stride for stride in strides if height % stride == 0 and width % stride == 0), None)
    if found is None:
        raise UserError(
            f"images of {height}x{width} cannot be cut into equal blocks of {_SMALLEST_BLOCK} to {LARGEST_BLOCK} "
            "pixels for ZCA: set data.image_size or data.zca_block"
        )
    return found


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]; float pixels pass unchanged."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def to_blocks(images: Tensor, stride: int) -> Tensor:
    """Cut images ``(N, C, H, W)`` into blocks ``(N * stride**2, C, H/stride, W/stride)`` of pixels ``[i::s, j::s]``.

    Example:
        >>> to_blocks(torch.arange(16.0).view(1, 1, 4, 4), 2)[1, 0]
        tensor([[ 1.,  3.],
                [ 9., 11.]])
    """
    count, channels, height, width = images.shape
    blocks = F.pixel_unshuffle(images, stride).reshape(count, channels, stride**2, height // stride, width // stride)
    return blocks.transpose(1, 2).flatten(0, 1)


def from_blocks(blocks: Tensor, stride: int) -> Tensor:
    """Undo :func:`to_blocks`."""
    images = blocks.reshape(-1, stride**2, *blocks.shape[1:]).transpose(1, 2).flatten(1, 2)
    return F.pixel_shuffle(images, stride)


def _times(images: Tensor, matrix: Tensor, stride: int) -> Tensor:
    """Multiply flattened images, or their flattened blocks, by ``matrix``."""
    matrix = matrix.to(images.device)
    if stride == 1:
        return (images.flatten(1) @ matrix).view_as(images)
    blocks = to_blocks(images, stride)
    return from_blocks((blocks.flatten(1) @ matrix).view_as(blocks), stride)


def _stride_of(mean: Tensor | None, whiten: Tensor | None, unwhiten: Tensor | None) -> int:
    if mean is None or whiten is None or unwhiten is None:
        return 1
    if mean.ndim != 1 or whiten.ndim != 2:
        raise UserError(f"preprocessing: ZCA tensors of {tuple(mean.shape)} and {tuple(whiten.shape)} are no map")
    stride = math.isqrt(mean.numel() // max(1, len(whiten)))
    square = (mean.numel() // max(1, stride**2),) * 2
    if stride < 1 or stride**2 * square[0] != mean.numel() or whiten.shape != square or unwhiten.shape != square:
        raise UserError(
            f"preprocessing: a ZCA mean of {mean.numel()} numbers does not go with matrices {tuple(whiten.shape)} "
            f"and {tuple(unwhiten.shape)}"
        )
    return stride


class _Blocks:
    """Training pixels on a device, in blocks whose size follows from the image shape alone."""

    def __init__(self, pixels: Tensor, rows: Tensor, device: torch.device | str) -> None:
        self.pixels, self.rows, self.device = pixels, rows, device

    def __iter__(self) -> Iterator[Tensor]:
        for rows in torch.split(self.rows, max(1, _FIT_NUMBERS // self.pixels.shape[1:].numel())):
            yield self.pixels.index_select(0, rows).to(self.device)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros to sum into, float64."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


def _channel_statistics(blocks: _Blocks) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of every channel, in float64."""
    channels = blocks.pixels.shape[1]
    if blocks.pixels.dtype == torch.uint8:  # 256 different values: count them once
        counts = torch.zeros(channels, 256, dtype=torch.int64, device=blocks.device)
        for block in blocks:
            counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in block.transpose(0, 1)])
        values = to_unit(torch.arange(256, dtype=torch.uint8)).double()
        shares = counts.cpu().double() / counts[0].sum().item()
        mean = shares @ values
        variance = (shares * (values - mean[:, None]).square()).sum(1)
    else:
        count = len(blocks.rows) * blocks.pixels.shape[2:].numel()
        mean, variance = blocks.zeros(channels), blocks.zeros(channels)
        for block in blocks:
            mean += block.double().sum((0, 2, 3)) / count
        for block in blocks:
            variance += (block.double() - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3)) / count
    return mean.tolist(), variance.sqrt().clamp_min(1e-8).tolist()


def _fit_zca(
    blocks: _Blocks, channelwise: Preprocessing, ridge: float, stride: int, absolute: bool = False
) -> Preprocessing:
    """Fit ZCA on ``channelwise`` images, two passes over the pixels.

    With ``cov + ridge * tr(cov)/d * I = U diag(s) U^T`` the whitening matrix is ``U diag(s^-1/2) U^T`` and its
    inverse ``U diag(s^1/2) U^T``. When there are fewer images than dimensions, eigenvalues beyond the number of
    images are replaced by 1, as FRePo does. With blocks, ``cov`` is the mean over the ``stride**2`` blocks of their
    covariances, each about its own mean. ``absolute`` is kornia's form: ``cov`` is unbiased, ``ridge * I`` is added,
    and no eigenvalue is replaced.
    """
    count, shape = len(blocks.rows), blocks.pixels.shape[1:]
    size = shape.numel() // stride**2
    mean = blocks.zeros(shape.numel())
    for block in blocks:
        mean += channelwise(to_unit(block)).flatten(1).double().sum(0)
    mean /= count
    covariance = blocks.zeros(size, size)
    for block in blocks:
        rows = to_blocks(channelwise(to_unit(block)).double() - mean.view(shape), stride).flatten(1)
        covariance += rows.T @ rows
    covariance /= max(1, count - 1) if absolute else count * stride**2
    identity = torch.eye(size, dtype=torch.float64, device=blocks.device)
    added = ridge if absolute else ridge * covariance.trace() / size
    values, vectors = torch.linalg.eigh(covariance + added * identity)
    values, vectors = values.flip(0), vectors.flip(1)  # descending, so that `count` cuts the smallest
    if not absolute:
        values[count:] = 1
    matrices = ((vectors * root) @ vectors.T for root in (values.rsqrt(), values.sqrt()))
    return Preprocessing(
        channelwise.mean, channelwise.std, mean.float().cpu(), *(matrix.float().cpu() for matrix in matrices)
    )
