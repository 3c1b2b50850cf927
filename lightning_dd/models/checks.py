"""Small checks that every network shares; all compare static shapes or settings, so they cost nothing per step."""

from torch import Tensor

from lightning_dd.utils.errors import UserError


def check_images(images: Tensor, in_channels: int) -> None:
    """Refuse a batch that is not ``(N, in_channels, H, W)``.

    Raises:
        UserError: the batch has another number of axes or of channels.
    """
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise UserError(
            f"this network takes images (N, {in_channels}, H, W), got a tensor of shape {tuple(images.shape)}"
        )


def check_count(setting: str, value: object) -> int:
    """Return ``value`` if it is a whole number of at least 1.

    Raises:
        UserError: it is anything else.

    Example:
        >>> check_count("width", 32)
        32
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{setting} must be a whole number of at least 1, got {value!r}")
    return value
