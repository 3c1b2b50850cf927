"""What MetaDD measures and minimises: the terms, their sum, and every switch (arXiv 2410.05103, our reading).

MetaDD (Zhao et al. 2024) has no public code and no full formula. *Meta features* are where the normalised
class-activation maps of all architectures are high, *heterogeneous features* where only some are. Everything here is a
pure function of maps and logits: M architectures, N images, maps ``(M, N, I, J)`` in [0, 1], logits ``(M, N, C)``.
Nothing is computed in half precision: values are float32, or float64 when they come so.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dd.losses.cam import CAM_KINDS
from lightning_dd.losses.gradients import wide
from lightning_dd.losses.krr import LABEL_KINDS
from lightning_dd.utils.errors import UserError, check_count, unknown_name

KL_DIRECTIONS = ("reverse", "forward")
CONSENSUS = ("ensemble", "distiller")
_SMALLEST = 1e-12


@dataclass(frozen=True)
class MetaOptions:
    """The switches of the loss, and the weights of its terms.

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

    Example:
        A term of one's own is a subclass with a field for its weight; ``loss: {class_path: my_package.Sharp}`` uses it.

        >>> @dataclass(frozen=True)
        ... class Sharp(MetaOptions):
        ...     sharp: float = 0.1
        ...
        ...     def more_terms(self, maps, alive, logits, labels):
        ...         return {"sharp": maps.mean()}
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

    def more_terms(self, maps: Tensor, alive: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return terms of a subclass's own, scalars by name; each is weighted by the field of its name.

        A subclass whose term depends on the maps while ``variance`` may be 0 overrides :attr:`uses_maps`, too.

        Args:
            maps: ``(M, N, I, J)`` normalised, of M architectures.
            alive: ``(M, N)`` bool; the maps that are not are zeros.
            logits: ``(M, N, C)``.
            labels: ``(N, C)`` rows.
        """
        return {}


class WeightedTerms(NamedTuple):
    """The loss and what it is made of."""

    total: Tensor
    """Weighted sum, a scalar with graph."""
    terms: dict[str, Tensor]
    """Scalars without graph: the unweighted terms ``variance``, ``cross_entropy``, ``kl``, ``positivity``, and
    ``meta_ratio``, ``map_entropy`` (mean over live maps) and ``dead_maps`` (share of them)."""


def metadd_loss(
    maps: Tensor,
    alive: Tensor,
    logits: Tensor,
    labels: Tensor,
    label_kind: str,
    options: MetaOptions,
    consensus_logits: Tensor | None = None,
) -> WeightedTerms:
    """Return the weighted sum of the terms, and each of them.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        alive: ``(M, N)`` bool.
        logits: ``(M, N, C)``.
        labels: ``(N, C)`` rows.
        label_kind: ``learned``, ``centred`` or ``hard``.
        options: weights and switches.
        consensus_logits: ``(N, C)`` of the distiller's own network, for ``consensus: distiller``.

    Raises:
        UserError: the distiller's logits are asked for and missing.
    """
    if options.consensus == "distiller" and consensus_logits is None:
        raise UserError("metadd consensus 'distiller' needs the logits of the distiller's own network")
    with torch.autocast(logits.device.type, enabled=False):
        teacher = ensemble_logits(logits, options.temperature) if options.consensus == "ensemble" else consensus_logits
        teacher = cast(Tensor, teacher)
        if options.detach_consensus:
            teacher = teacher.detach()
        part = meta_partition(maps, options.threshold, alive)
        fits = [architecture_cross_entropy(one, labels, label_kind) for one in logits]
        divergences = [agreement_kl(one, teacher, options.temperature, options.kl_direction) for one in logits]
        terms = {
            "variance": map_variance(maps, alive),
            "cross_entropy": torch.stack(fits).mean(),
            "kl": torch.stack(divergences).mean(),
            "positivity": positivity(maps, part.meta, alive),
            **options.more_terms(maps, alive, logits, labels),
        }
        # A term without weight is left out, not multiplied by 0: it needs no graph, and 0 x inf is NaN.
        weighted = [getattr(options, name) * term for name, term in terms.items() if getattr(options, name)]
        total = torch.stack(weighted).sum() if weighted else logits.new_zeros(())
        watched = {
            "meta_ratio": part.ratio.mean(),
            "map_entropy": map_entropy(maps),
            "dead_maps": 1 - alive.to(maps.dtype).mean(),
        }
    return WeightedTerms(total, {name: value.detach() for name, value in (terms | watched).items()})


class Partition(NamedTuple):
    """Which pixels the architectures agree on."""

    meta: Tensor
    """``(N, I, J)`` bool: high in all maps."""
    heterogeneous: Tensor
    """``(M, N, I, J)`` bool: high in this map but not in all."""
    ratio: Tensor
    """``(N,)`` ``|meta| / |high in any|``; 0 where no map is high anywhere."""


def meta_partition(maps: Tensor, threshold: float = 0.5, alive: Tensor | None = None) -> Partition:
    """Split the pixels into meta and heterogeneous ones; high is ``>= threshold``. Without gradient.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        threshold: the paper's is 0.5.
        alive: ``(M, N)`` bool; dead maps are left out of "all". None takes every map for live. An image with fewer
            than two live maps has no meta pixel: one architecture agrees with nobody.

    Example:
        >>> maps = torch.tensor([[[[0.9, 0.7, 0.1]]], [[[0.8, 0.2, 0.3]]]])
        >>> part = meta_partition(maps)
        >>> part.meta.tolist(), part.heterogeneous[0].tolist(), part.ratio.tolist()
        ([[[True, False, False]]], [[[False, True, False]]], [0.5])
    """
    live = torch.ones_like(maps[:, :, :1, :1], dtype=torch.bool) if alive is None else alive[:, :, None, None]
    high = (maps.detach() >= threshold) & live
    meta = (high | ~live).all(0) & (live.sum(0) >= 2)
    union = high.any(0).sum((1, 2))
    ratio = meta.sum((1, 2)) / union.clamp(min=1)
    return Partition(meta, high & ~meta, ratio)


def map_variance(maps: Tensor, alive: Tensor) -> Tensor:
    """Variance over architectures of the map value at the same pixel, averaged over pixels and images.

    ``1/N sum_n 1/(I J) sum_ij 1/M_n sum_m (C^m_nij - mean_nij)^2`` over the ``M_n`` live maps of image n; an image
    with fewer than two of them counts as 0. The derivative is ``2/(M_n N I J) (C^m - mean)``: the deviations sum to
    zero, so architectures are coupled through the mean alone.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        alive: ``(M, N)`` bool.

    Example:
        >>> map_variance(torch.tensor([[[[0.0]]], [[[1.0]]]]), torch.ones(2, 1, dtype=torch.bool))
        tensor(0.2500)
    """
    counts = alive.sum(0)
    values = wide(maps)
    weight = ((alive & (counts >= 2)).to(values.dtype) / counts.clamp(min=1))[:, :, None, None]
    mean = (weight * values).sum(0)
    return (weight * (values - mean).square()).sum(0).mean()


def label_distribution(labels: Tensor, label_kind: str) -> Tensor:
    """Turn label rows ``(N, C)`` of a kind into distributions over classes, with graph to learned labels.

    ``hard`` rows are distributions. ``centred`` and ``learned`` ones are regression targets around FRePo's
    ``(onehot - 1/C) / sqrt(C/10)``: that map is undone, what is negative cut off, and the rest scaled to sum 1. A
    start label gives back its one-hot row exactly (to rounding), learned soft labels keep what they say of other
    classes, and no temperature is needed, as a softmax would.

    Raises:
        UserError: the kind is unknown.

    Example:
        >>> label_distribution(torch.tensor([[1.118, -1.118], [0.5, 0.0]]), "learned").round(decimals=2)
        tensor([[1.0000, 0.0000],
                [0.5900, 0.4100]])
    """
    if label_kind not in LABEL_KINDS:
        raise unknown_name("label kind", label_kind, LABEL_KINDS)
    rows = wide(labels)
    if label_kind == "hard":
        return rows
    count = rows.shape[1]
    positive = (rows * math.sqrt(count / 10) + 1 / count).clamp(min=0)
    return positive / positive.sum(1, keepdim=True).clamp(min=_SMALLEST)


def architecture_cross_entropy(logits: Tensor, labels: Tensor, label_kind: str) -> Tensor:
    """Cross-entropy of one architecture's logits ``(N, C)`` against label rows ``(N, C)``, mean over rows.

    The rows become distributions by :func:`label_distribution`; gradient reaches logits and learned labels.

    Raises:
        UserError: the kind is unknown.
    """
    return F.cross_entropy(wide(logits), label_distribution(labels, label_kind).to(wide(logits).dtype))


def agreement_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, direction: str) -> Tensor:
    """``T^2`` times the Kullback-Leibler divergence between two softened predictions, mean over rows.

    With ``p = softmax(student / T)`` and ``q = softmax(teacher / T)``, ``forward`` is distillation's ``KL(q || p)``
    (Hinton et al. 2015, arXiv 1503.02531), ``reverse`` is ``KL(p || q)``. The factor keeps gradients the same size at
    every temperature. Nothing is detached here: give a detached teacher for a constant target.

    Args:
        student_logits: of one architecture, ``(N, C)``.
        teacher_logits: of the common prediction, ``(N, C)``.
        temperature: T, positive.
        direction: ``forward`` or ``reverse``.

    Raises:
        UserError: the direction is unknown.
    """
    if direction not in KL_DIRECTIONS:
        raise unknown_name("kl_direction", str(direction), KL_DIRECTIONS)
    student = F.log_softmax(wide(student_logits) / temperature, 1)
    teacher = F.log_softmax(wide(teacher_logits) / temperature, 1)
    of, towards = (teacher, student) if direction == "forward" else (student, teacher)
    return (of.exp() * (of - towards)).sum(1).mean() * temperature**2


def ensemble_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits ``(N, C)`` whose softmax at the temperature is the mean of the architectures' ones, ``(M, N, C)``.

    The mean over architectures of ``KL(p_m || mean p)`` (``reverse``) is their Jensen-Shannon divergence, and its
    gradient through the mean is zero: there, a detached consensus and an attached one are the same.
    """
    log_p = F.log_softmax(wide(logits) / temperature, 2)
    return temperature * (log_p.logsumexp(0) - math.log(len(logits)))


def positivity(maps: Tensor, meta: Tensor, alive: Tensor) -> Tensor:
    """How far the maps are from 1 inside the meta mask: mean over live maps, meta pixels and images of ``1 - C``.

    The paper's third term is not public; this is the reading that works against maps that agree by being empty.
    Images without meta pixels count as 0.

    Args:
        maps: ``(M, N, I, J)`` normalised.
        meta: ``(N, I, J)`` bool, a constant.
        alive: ``(M, N)`` bool.
    """
    inside = meta & alive[:, :, None, None]
    missing = torch.where(inside, 1 - wide(maps), 0.0).sum((0, 2, 3))
    return (missing / inside.sum((0, 2, 3)).clamp(min=1)).mean()


def map_entropy(maps: Tensor) -> Tensor:
    """Mean entropy of maps ``(..., I, J)`` read as distributions, relative to ``log(I J)``. Without gradient.

    1 is a map that is the same everywhere, 0 a single pixel. The variance alone is smallest when all maps collapse to
    the same, and a jump to either end gives that away. Maps of zeros are left out; 0 if there is no other.
    """
    flat = wide(maps.detach()).flatten(-2).flatten(0, -2)
    total = flat.sum(1)
    shares = flat / total.clamp(min=_SMALLEST)[:, None]
    entropy = torch.special.entr(shares).sum(1) / math.log(flat.shape[1])
    counted = total > 0
    return torch.where(counted, entropy, 0.0).sum() / counted.sum().clamp(min=1)
