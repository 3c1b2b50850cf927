"""What the learnable tensors of a synthetic set are, said in one line: ``pixels`` or ``latents:level=2,...``."""

from dataclasses import dataclass, fields
from typing import Any

from lightning_dd.models.checks import check_count
from lightning_dd.models.factory import ArchitectureSpec
from lightning_dd.utils.errors import UserError, unknown_name

PARAMETERISATIONS = ("pixels", "latents")


@dataclass(frozen=True)
class LatentOptions:
    """Options of ``latents``: images are what a frozen generator makes of learnable latents (GLaD).

    Args:
        generator: file of a generator of the user's own (:class:`~lightning_dd.models.exported.ExportedGenerator`);
            ``None`` trains the small one (:class:`~lightning_dd.models.generator.Generator`) on the run's data.
        level: the block from which on the generator is used: its input map and the styles from there on are learned.
            0 learns all styles and no map (of a generator of the user's own: its z), and the highest level is the
            generator's last block. ``None`` is block 2, or what there is.
        lr_features: learning rate of maps relative to the distiller's.
        lr_styles: learning rate of styles, or z, relative to the distiller's: a style acts on whole maps, so its
            gradient is larger than that of a map's entries (GLaD takes 0.001). Where styles are all that is learned and
            steps do not grow with the gradient (Adam, LAMB), 1 is right.
        slice: images per slice when the generator is run again for the gradient; memory grows with it, not with the
            size of the set.
        latent_size: entries of z.
        width: channels of the small generator's last block.
        steps: training steps of the small generator.
        lr: their peak learning rate.
        seed: of the small generator's weights and batches; kept apart from the run's seed, so that runs share it.

    Raises:
        UserError: a value is out of range.
    """

    generator: str | None = None
    level: int | None = None
    lr_features: float = 1.0
    lr_styles: float = 0.1
    slice: int = 50
    latent_size: int = 16
    width: int = 16
    steps: int = 2000
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.generator is not None and not isinstance(self.generator, str):
            raise UserError(f"latents: generator must be the path of a file, got {self.generator!r}")
        for name in ("slice", "latent_size", "width", "steps"):
            check_count(f"latents: {name}", getattr(self, name))
        for name in ("lr_features", "lr_styles", "lr"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise UserError(f"latents: {name} must be a positive number, got {getattr(self, name)!r}")
        if not _is_whole(self.seed):
            raise UserError(f"latents: seed must be a whole number, got {self.seed!r}")
        if self.level is not None and (not _is_whole(self.level) or self.level < 0):
            raise UserError(f"latents: level must be a whole number of at least 0, got {self.level!r}")
        if self.generator is not None and self.level:
            raise UserError(
                f"latents: level must be 0 with a generator of your own, which cannot be cut, got {self.level}"
            )


def parse_parameterisation(text: str) -> LatentOptions | None:
    """Read ``pixels`` (``None``) or ``latents:option=value,...``.

    Raises:
        UserError: the parameterisation or one of its options is unknown, or a value is out of range.

    Example:
        >>> parse_parameterisation("pixels")
        >>> parse_parameterisation("latents:level=1,steps=500").level
        1
    """
    try:
        spec = ArchitectureSpec.parse(text)
    except UserError:
        raise UserError(
            f"cannot read parameterisation '{text}': write pixels, latents or latents:option=value,option=value"
        ) from None
    if spec.name not in PARAMETERISATIONS:
        raise unknown_name("parameterisation", spec.name, PARAMETERISATIONS)
    accepted = [field.name for field in fields(LatentOptions)] if spec.name == "latents" else []
    for option in spec.options:
        if option not in accepted:
            raise unknown_name(f"option of {spec.name}", option, accepted)
    return LatentOptions(**spec.options) if spec.name == "latents" else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
