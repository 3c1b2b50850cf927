"""The settings of the MetaDD loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_dd.losses.architecture_invariant import KL_DIRECTIONS
from lightning_dd.losses.cam import CAM_KINDS
from lightning_dd.models.checks import check_count
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError, unknown_name

CONSENSUS = ("ensemble", "distiller")


@dataclass(frozen=True)
class Architecture:
    """One of MetaDD's frozen architectures.

    Attributes:
        network: in inference mode, its parameters without gradient.
        adapt: from the images given to the loss, ``(N, C, H, W)``, to the network's own preprocessing,
            differentiable; None if they are the same.
        layer: the module that its map is made of; None finds it.
        cam: overrides the options' kind of map for this network.
        name: put before error messages.
    """

    network: Network
    adapt: Callable[[Tensor], Tensor] | None = None
    layer: str | None = None
    cam: str | None = None
    name: str = ""


@dataclass(frozen=True)
class MetaOptions:
    """The switches of the loss.

    ``variance * V + mean over m of (cross_entropy * CE_m + kl * KL_m) + positivity * P``. The paper sums over
    architectures; with the mean, weights mean the same for any number of them.

    Args:
        variance: weight of the maps' variance over architectures.
        cross_entropy: weight of the architectures' cross-entropy on the labels.
        kl: weight of the divergence between each architecture's prediction and the common one.
        positivity: weight of the term that wants maps high inside the meta mask.
        temperature: of the divergence.
        kl_direction: ``reverse`` is KL(architecture || consensus), ``forward`` KL(consensus || architecture).
        consensus: ``ensemble`` is the mean prediction, ``distiller`` the logits given from outside.
        detach_consensus: take the common prediction for a constant target.
        threshold: from where on a map value is high, in (0, 1].
        cam: ``gradcam``, ``attention`` or ``auto``.
        detach_weights: take Grad-CAM's weights for constant; False is the exact derivative.
        grid: side of the grid that maps are compared on.

    Raises:
        UserError: a setting is out of range.
    """

    variance: float = 1.0
    cross_entropy: float = 1.0
    kl: float = 1.0
    positivity: float = 0.0
    temperature: float = 1.0
    kl_direction: str = "reverse"
    consensus: str = "ensemble"
    detach_consensus: bool = True
    threshold: float = 0.5
    cam: str = "auto"
    detach_weights: bool = True
    grid: int = 14

    def __post_init__(self) -> None:
        for name in ("variance", "cross_entropy", "kl", "positivity"):
            weight = getattr(self, name)
            if not (0 <= weight < math.inf):
                raise UserError(f"the metadd weight {name} must be at least 0, got {weight}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"metadd temperature must be positive, got {self.temperature}")
        if not 0 < self.threshold <= 1:
            raise UserError(f"metadd threshold must be in (0, 1], got {self.threshold}")
        for name, known in (("kl_direction", KL_DIRECTIONS), ("consensus", CONSENSUS), ("cam", CAM_KINDS)):
            if getattr(self, name) not in known:
                raise unknown_name(f"metadd {name}", str(getattr(self, name)), known)
        if check_count("metadd grid", self.grid) < 2:
            raise UserError(f"metadd grid must be at least 2, got {self.grid}")

    @property
    def uses_maps(self) -> bool:
        """Whether a term with weight depends on the maps."""
        return self.variance > 0 or self.positivity > 0
