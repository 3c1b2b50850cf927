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

from lightning_dd.losses.cam import CAM_KINDS, NORMALISATIONS
from lightning_dd.losses.gradients import wide
from lightning_dd.losses.krr import LABEL_KINDS
from lightning_dd.losses.meta_features import POSITIVITY_FORMS, map_entropy, map_variance, meta_partition, positivity
from lightning_dd.utils.errors import UserError, check_count, check_range, unknown_name

KL_DIRECTIONS = ("reverse", "forward")
LAYERS = {"last": (False,), "shallow": (True,), "both": (False, True)}
"""Of which layers maps are made by name: whether each is shallow."""
_NAMES = {
    "kl_direction": KL_DIRECTIONS,
    "consensus": ("ensemble", "distiller"),
    "positivity_form": POSITIVITY_FORMS,
    "cam": CAM_KINDS,
    "cam_class": ("label", "prediction"),
    "layers": tuple(LAYERS),
    "normalisation": NORMALISATIONS,
}
_SMALLEST = 1e-12
_DOUBT = 0.01
"""Share of a regression network's prediction that is spread over all classes, so that no class is impossible."""


@dataclass(frozen=True)
class MetaOptions:
    """The switches of the loss, and the weights of its terms.

    ``variance * V + mean over m of (cross_entropy * CE_m + kl * KL_m) + positivity * P``. The paper sums over
    architectures; with the mean, weights mean the same for any number of them.

    Args:
        variance: weight of the maps' variance over architectures.
        cross_entropy: weight of the architectures' cross-entropy on the labels.
        kl: weight of the divergence between each architecture's prediction and the common one; a negative one drives
            them apart, for the reviews leave the sign open.
        positivity: weight of :func:`positivity`.
        positivity_form: its ``form``: ``meta``, ``heterogeneous`` or ``position``.
        temperature: of the divergence.
        kl_direction: ``reverse`` is KL(architecture || consensus), ``forward`` KL(consensus || architecture).
        consensus: the common prediction: ``ensemble`` is the architectures' mean, ``distiller`` that of the network
            the method itself looks through, as the reviews have it.
        detach_consensus: take the common prediction for a constant target.
        detach_architectures: take the architectures' predictions for constant in the divergence, so that only the
            common one is moved.
        threshold: from where on a map value is high, in (0, 1].
        cam: ``gradcam``, ``attention`` or ``auto``.
        cam_class: maps are of the ``label`` of an image, or of each architecture's own ``prediction``.
        normalisation: of maps, ``minmax`` or ``max``.
        detach_weights: take Grad-CAM's weights for constant; False is the exact derivative.
        grid: side of the grid that maps are compared on.
        layers: maps are of the ``last`` one of a network, of a ``shallow`` one
            (:func:`~lightning_dd.losses.cam_layers.find_layer`), or of ``both``, each compared with its like, which
            takes a pass for each.

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
    positivity_form: str = "meta"
    temperature: float = 1.0
    kl_direction: str = "reverse"
    consensus: str = "ensemble"
    detach_consensus: bool = True
    detach_architectures: bool = False
    threshold: float = 0.5
    cam: str = "auto"
    cam_class: str = "label"
    normalisation: str = "minmax"
    detach_weights: bool = True
    grid: int = 14
    layers: str = "last"

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("variance", "cross_entropy", "positivity")}
        check_range("at least 0", "the metadd weight ", **weights)
        if not math.isfinite(self.kl):
            raise UserError(f"the metadd weight kl must be a finite number, got {self.kl}")
        check_range("positive", "metadd ", temperature=self.temperature)
        check_range("in (0, 1]", "metadd ", threshold=self.threshold)
        if self.kl and self.detach_consensus and self.detach_architectures:
            raise UserError(
                "metadd detach_consensus and detach_architectures leave kl nothing to move: set one to false"
            )
        for name, known in _NAMES.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"metadd {name}", str(getattr(self, name)), known)
        if check_count("metadd grid", self.grid) < 2:
            raise UserError(f"metadd grid must be at least 2, got {self.grid}")

    @property
    def uses_maps(self) -> bool:
        """Whether a term with weight depends on the maps."""
        return self.variance > 0 or self.positivity > 0

    @property
    def needs_maps(self) -> bool:
        """Whether the loss cannot be had without maps: :meth:`more_terms` of a subclass is given them, too."""
        return self.uses_maps or type(self).more_terms is not MetaOptions.more_terms

    @property
    def fewest(self) -> int:
        """How many architectures must look together for every term with weight to say something."""
        return 2 if self.uses_maps or (self.kl and self.consensus == "ensemble") else 1

    def more_terms(self, maps: Tensor, alive: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return terms of a subclass's own, scalars by name; each is weighted by the field of its name.

        A subclass whose term depends on the maps while ``variance`` may be 0 overrides :attr:`uses_maps`, too.

        Args:
            maps: ``(M, N, I, J)`` normalised, of M architectures; those of a second layer follow as further N.
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
    maps: Tensor | None,
    alive: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    label_kind: str,
    options: MetaOptions,
    consensus_logits: Tensor | None = None,
) -> WeightedTerms:
    """Return the weighted sum of the terms, and each of them.

    Args:
        maps: ``(M, N, I, J)`` normalised; ``None`` leaves out what is said of maps, where nothing with weight is.
        alive: ``(M, N)`` bool, with the maps.
        logits: ``(M, N, C)``.
        labels: ``(N, C)`` rows.
        label_kind: ``learned``, ``centred`` or ``hard``.
        options: weights and switches.
        consensus_logits: ``(N, C)``, what the distiller's own network returned, for ``consensus: distiller``; they
            become logits by :func:`prediction_logits`.

    Raises:
        UserError: the distiller's logits are asked for and missing.
    """
    if options.consensus == "distiller" and consensus_logits is None:
        raise UserError("metadd consensus 'distiller' needs the logits of the distiller's own network")
    with torch.autocast(logits.device.type, enabled=False):
        if options.consensus == "ensemble":
            teacher = ensemble_logits(logits, options.temperature)
        else:
            teacher = prediction_logits(cast(Tensor, consensus_logits), label_kind)
        teacher = teacher.detach() if options.detach_consensus else teacher
        students = logits.detach() if options.detach_architectures else logits
        fits = [architecture_cross_entropy(one, labels, label_kind) for one in logits]
        divergences = [agreement_kl(one, teacher, options.temperature, options.kl_direction) for one in students]
        terms = {"cross_entropy": torch.stack(fits).mean(), "kl": torch.stack(divergences).mean()}
        watched: dict[str, Tensor] = {}
        if maps is not None and alive is not None:
            part = meta_partition(maps, options.threshold, alive)
            terms = {"variance": map_variance(maps, alive), **terms}
            terms["positivity"] = positivity(maps, part, alive, options.positivity_form)
            terms |= options.more_terms(maps, alive, logits, labels)
            dead = 1 - alive.to(maps.dtype).mean()
            watched = {"meta_ratio": part.ratio.mean(), "map_entropy": map_entropy(maps), "dead_maps": dead}
        # A term without weight is left out, not multiplied by 0: it needs no graph, and 0 x inf is NaN.
        weighted = [getattr(options, name) * term for name, term in terms.items() if getattr(options, name)]
        total = torch.stack(weighted).sum() if weighted else logits.new_zeros(())
    return WeightedTerms(total, {name: value.detach() for name, value in (terms | watched).items()})


def label_distribution(labels: Tensor, label_kind: str) -> Tensor:
    """Turn label rows ``(N, C)`` of a kind into distributions over classes, with graph to learned labels.

    ``hard`` rows are distributions, ``soft`` ones logits. ``centred`` and ``learned`` ones are regression targets
    around FRePo's ``(onehot - 1/C) / sqrt(C/10)``: that map is undone, what is negative cut off, and the rest scaled to
    sum 1. A start label gives back its one-hot row exactly (to rounding), learned soft labels keep what they say of
    other classes, and no temperature is needed, as a softmax would.

    Raises:
        UserError: the kind is unknown.

    Example:
        >>> label_distribution(torch.tensor([[1.118, -1.118], [0.5, 0.0]]), "learned").round(decimals=2)
        tensor([[1.0000, 0.0000],
                [0.5900, 0.4100]])
    """
    if label_kind not in (*LABEL_KINDS, "soft"):
        raise unknown_name("label kind", label_kind, (*LABEL_KINDS, "soft"))
    rows = wide(labels)
    if label_kind in ("hard", "soft"):
        return rows if label_kind == "hard" else rows.softmax(1)
    count = rows.shape[1]
    positive = (rows * math.sqrt(count / 10) + 1 / count).clamp(min=0)
    return positive / positive.sum(1, keepdim=True).clamp(min=_SMALLEST)


def prediction_logits(outputs: Tensor, label_kind: str) -> Tensor:
    """Return logits whose softmax is what a network trained on labels of a kind predicts, ``(N, C)``, with graph.

    Trained on ``hard`` or ``soft`` labels, it returns logits. Trained by regression on ``learned`` or ``centred`` ones
    (FRePo), it does not: the softmax of a perfect answer, .95 for the class and -.05... for nine others, peaks at .23.
    Its answer is read as its labels are, by :func:`label_distribution`, with a hundredth of it spread evenly: the
    perfect answer peaks at .99, that of a network which knows nothing, zeros, is even, and no divergence is infinite. A
    temperature would serve one number of classes and one peak alone.

    Example:
        >>> outputs = torch.tensor([[0.9, *[-0.1] * 9], [0.0] * 10])
        >>> prediction_logits(outputs, "learned").softmax(1).amax(1).round(decimals=3).tolist()
        [0.9909999966621399, 0.10000000149011612]
    """
    if label_kind in ("hard", "soft"):
        return outputs
    return ((1 - _DOUBT) * label_distribution(outputs, label_kind) + _DOUBT / outputs.shape[1]).log()


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
