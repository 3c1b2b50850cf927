"""One distilled set from several: what a learner keeps after some steps of class-incremental learning.

Each step distils its k classes alone, with labels ``(n, k)``. The union has the columns of all C classes, so every
row needs values for classes its step knew nothing of. They are chosen so that a row says of a foreign class exactly
what it says, on average, of a wrong class of its own step (:func:`embed_labels`).
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_dd.distilled.multiformation import MultiFormed
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.distilled.views import SoftViews
from lightning_dd.losses.krr import initial_labels
from lightning_dd.utils.errors import UserError

_NEVER = 30.0
"""Logits (in units of the temperature) by which a foreign class lies below the best own one: a chance of 1e-13."""


def union(sets: Sequence[DistilledSet]) -> DistilledSet:
    """Unite distilled sets of different classes of one data set; the classes keep the order of the sets.

    Args:
        sets: at least one; distilled from :class:`~lightning_dd.data.ClassSubset` of one data set.

    Returns:
        A set whose ``data`` names all the classes, so that it can be scored like any other.

    Raises:
        UserError: two sets hold the same class, or anything but classes, images and labels disagrees.
    """
    if not sets:
        raise UserError("a union needs at least one distilled set")
    first, names = sets[0], tuple(name for part in sets for name in part.class_names)
    _check_alike(sets, names)
    starts = list(accumulate((part.num_classes for part in sets), initial=0))[:-1]

    def embedded(labels: Iterable[Tensor]) -> list[Tensor]:
        return [
            embed_labels(rows, part.classes, part.label_kind, start, len(names), part.temperature)
            for rows, part, start in zip(labels, sets, starts, strict=True)
        ]

    views = [part.views for part in sets if part.views is not None]
    stored = [part.stored for part in sets if part.stored is not None]
    return DistilledSet(
        images=torch.cat([part.images for part in sets]),
        labels=torch.cat(embedded(part.labels for part in sets)),
        classes=torch.cat([part.classes + start for part, start in zip(sets, starts, strict=True)]),
        label_kind=first.label_kind,
        class_names=names,
        preprocessing=first.preprocessing,
        data=_united_data(sets),
        method="+".join(dict.fromkeys(part.method for part in sets)),
        config=first.config,
        training={"united": [part.training for part in sets], "versions": library_versions()},
        temperature=first.temperature,
        views=_united_views(views, embedded(view.logits.float() for view in views)) if views else None,
        stored=MultiFormed(torch.cat([part.images for part in stored]), stored[0].factor) if stored else None,
    )


def embed_labels(
    labels: Tensor, classes: Tensor, label_kind: str, start: int, total: int, temperature: float = 1.0
) -> Tensor:
    """Place labels of k classes among those of ``total`` classes.

    * ``hard``: one-hot rows get zeros.
    * ``centred``: the fixed values of FRePo for ``total`` classes, ``(onehot - 1/C) / sqrt(C/10)``.
    * ``learned``: regression targets ``y = a (p - 1/k)`` of what FRePo starts from with ``p`` one-hot and
      ``a = 1/sqrt(k/10)``; learning changes both. The amplitude ``a`` of a set is measured as the mean gap between a
      row's own class and its other k - 1 ones; then ``p = y/a + 1/k`` is on average one-hot, foreign classes get
      ``p = 0``, and the row becomes ``(p - 1/C) / sqrt(C/10)``. Start values thus become the start values of C classes,
      an average wrong class of the own step and a foreign one get the same value ``-1/C`` (scaled), and sets that
      learned other amplitudes are brought to one, so that none drowns the others.
    * ``soft``: a teacher's logits; foreign ones lie 30 temperatures below the row's best, which leaves the softmax
      over the own classes as it was.

    FRePo's code (Zhou et al. 2022) gives every step all C label columns instead; its targets for a foreign class are
    the constant ``-1/C``, which is what this embedding writes there without knowing C while distilling.

    Args:
        labels: ``(n, k)``, or ``(E, n, k)`` for the logits of views.
        classes: ``(n,)`` int64 in ``[0, k)``.
        label_kind: form of the labels.
        start: column of the first of the k classes.
        total: number of columns C.
        temperature: of soft labels.

    Returns:
        ``(n, total)`` or ``(E, n, total)``.
    """
    if label_kind == "centred":
        return initial_labels(classes + start, total, "centred")
    own, rows = labels.shape[-1], labels.new_zeros(*labels.shape[:-1], total)
    columns = slice(start, start + own)
    if label_kind == "soft":
        rows += labels.max(-1, keepdim=True).values - _NEVER * temperature
    if label_kind != "learned":
        rows[..., columns] = labels
        return rows
    rows[..., columns] = labels / _amplitude(labels, classes) + 1 / own
    return (rows - 1 / total) / math.sqrt(total / 10)


def _amplitude(labels: Tensor, classes: Tensor) -> float:
    """Mean gap between a row's own class and the mean of its others."""
    count = labels.shape[1]
    if count < 2:
        raise UserError("learned labels of one class cannot be united: a step needs at least 2 classes")
    right = labels.gather(1, classes[:, None]).squeeze(1)
    gap = float((right - (labels.sum(1) - right) / (count - 1)).mean())
    if gap <= 0:
        raise UserError(
            f"learned labels that do not tell their classes apart cannot be united (mean gap {gap:g}): "
            "a smaller learning rate may help"
        )
    return gap


def _united_data(sets: Sequence[DistilledSet]) -> dict[str, Any]:
    """Name the data set and all the classes."""
    data = sets[0].data
    classes = [label for part in sets for label in part.data["spec"]["classes"]]
    digest = hashlib.blake2b("/".join(part.data["fingerprint"] for part in sets).encode(), digest_size=16)
    return {**data, "spec": {**data["spec"], "classes": classes}, "fingerprint": digest.hexdigest()}


def _united_views(views: Sequence[SoftViews], logits: Sequence[Tensor]) -> SoftViews:
    """Put the views of all rows side by side; mixtures stay within a set.

    A stored order is kept within each set. The sets are interleaved evenly, so that every batch sees all of them.
    """
    before = list(accumulate((len(view) for view in views), initial=0))[:-1]
    parts = {
        name: [getattr(view, name) for view in views]
        for name in views[0].state_dict()
        if name not in ("outside", "order")
    }
    parts["partners"] = [view.partners + rows for view, rows in zip(views, before, strict=True)]
    parts["logits"] = [rows.half() for rows in logits]
    orders = [view.order + rows for view, rows in zip(views, before, strict=True) if view.order is not None]
    if orders:
        places = torch.cat([(torch.arange(len(view)) + 0.5) / len(view) for view in views]).argsort(stable=True)
        parts["order"] = [torch.cat(orders, 1)[:, places]]
    return replace(views[0], **{name: torch.cat(tensors, 1) for name, tensors in parts.items()})


def _check_alike(sets: Sequence[DistilledSet], names: Sequence[str]) -> None:
    """Refuse sets that cannot be united, naming the first reason."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sets hold the class '{name}': a union takes each class once")
    if not all("classes" in part.data.get("spec", {}) for part in sets):
        raise UserError("a union takes sets distilled from ClassSubset data, which remember their classes")
    ours, state = _common(sets[0]), sets[0].preprocessing.state_dict()
    for part in sets[1:]:
        for what, theirs in _common(part).items():
            if ours[what] != theirs:
                raise UserError(f"sets to be united have different {what}: {ours[what]} and {theirs}")
        other = part.preprocessing.state_dict()
        if state.keys() != other.keys() or not all(torch.equal(state[name], other[name]) for name in state):
            raise UserError("sets to be united have different preprocessing: later steps must reuse the first one's")


def _common(part: DistilledSet) -> dict[str, Any]:
    """Return what must be equal in all sets, by the name a message gives it."""
    settings = {key: value for key, value in part.data["spec"].items() if key != "classes"}
    return {
        "data": (part.data.get("name"), settings),
        "image shapes": part.image_shape,
        "images per class": part.ipc,
        "images shown per class": part.shown_ipc,
        "forms of labels": part.label_kind,
        "temperatures": part.temperature,
        "numbers of stored views": part.views.epochs if part.views is not None else 0,
        "kinds of views": sorted(part.views.state_dict()) if part.views is not None else [],
    }
