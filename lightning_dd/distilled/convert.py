"""Turning distilled sets of other projects into the distilled-set file.

The tensors of another project say nothing about the preprocessing they live in, and a set is worth nothing on test
images that went through another one. So whoever converts states it. Projects that say "ZCA" do not mean the same: FRePo
standardises channels first and takes a regulariser relative to the mean variance (``zca``); MTT, DATM and their kin
whiten raw pixels with an absolute one, by kornia (``kornia-zca``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_dd.data.base import RealData
from lightning_dd.data.images import DataFacts
from lightning_dd.data.parts import build_data
from lightning_dd.data.preprocess import KINDS, to_unit
from lightning_dd.distilled.foreign import LAYOUTS, ForeignSet
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.utils.errors import UserError, unknown_name

SPACES = ("pixels", *KINDS)
"""Preprocessings that images may be in: pixels in [0, 1], or one that is undone by the same name."""

_SMALLEST_PIXEL, _LARGEST_PIXEL = -1.0, 2.0  # learned pixels leave [0, 1] a little; standardised images by far


def convert_set(
    layout: str,
    images: Path | str,
    data: str,
    preprocessing: str,
    labels: Path | str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    experiment: int = 0,
    architecture: str | None = None,
    method: str | None = None,
    root: str | None = None,
    data_args: Mapping[str, Any] | None = None,
) -> DistilledSet:
    """Read a distilled set of another project and return it as one of this project.

    The set is taken to be made from the whole training split, so ``val_fraction`` is 0 unless ``data_args`` says other.

    Args:
        layout: ``frepo`` (.npz, or .pt of its PyTorch branch), ``dc`` (res_*.pt of DC, DSA and DM), ``mtt``
            (images_*.pt and labels_*.pt; DATM's logits become soft labels; images_zca_*.pt holds pixels), ``sre2l`` or
            ``rded`` (folders of images, with hard labels).
        images: the file or folder.
        data: name or class path of the data set the images stand for.
        preprocessing: the space the images are in, one of :data:`SPACES`. Images of ``pixels`` are standardised.
        labels: the second file of ``mtt``.
        mean: channel means of ``pixels`` and ``standardise``; the project's own if None.
        std: channel standard deviations, likewise.
        experiment: which of the sets of a ``dc`` file.
        architecture: what the set was distilled with, as the factory names it, so that tables can say ``seen``.
        method: what made the set, if not the project that the layout is named after.
        root: folder of the data set.
        data_args: further arguments of the data set.

    Raises:
        UserError: a setting, the file or its content does not fit.
    """
    files = Path(images), None if labels is None else Path(labels)
    _check_stated(layout, preprocessing, *files)
    real = _real_data(layout, data, preprocessing, {"mean": mean, "std": std}, data_args or {}, root)
    real.prepare_data()
    real.setup("fit")
    found = LAYOUTS[layout].read(*files, experiment, real.facts)
    _check(found, real.facts, preprocessing, f"images '{images}'")
    training = {"converted_from": layout, "preprocessing": preprocessing, "versions": library_versions()}
    config = {"architecture": architecture} if architecture else {}
    return _converted(found, real, preprocessing, method or LAYOUTS[layout].method, config, training)


def summary(distilled: DistilledSet) -> str:
    """Say in one line what a converted set holds and which preprocessing it has."""
    into, stated = distilled.preprocessing, distilled.training["preprocessing"]
    mean, std = (", ".join(f"{value:.4g}" for value in part.tolist()) for part in (into.mean, into.std))
    return (
        f"{len(distilled)} images of {distilled.data['name']}, {distilled.ipc} per class, {distilled.label_kind} "
        f"labels; {stated}, as {into} with mean ({mean}) and std ({std})"
    )


def _check_stated(layout: str, space: str, images: Path, labels: Path | None) -> None:
    """Refuse what can be seen to be wrong before the real data is read."""
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    if space not in SPACES:
        raise unknown_name("preprocessing", space, SPACES)
    folder, two_files = LAYOUTS[layout].in_folders, layout == "mtt"
    if folder and space != "pixels":
        raise UserError(f"preprocessing must be pixels for layout {layout}, whose files hold 8-bit pixels")
    if layout in ("dc", "mtt") and space == "zca":
        raise UserError(f"preprocessing zca is FRePo's; what layout {layout} calls ZCA is kornia-zca")
    if (labels is not None) != two_files:
        needs = "needs its labels as a second file" if two_files else "holds its labels: leave 'labels' out"
        raise UserError(f"labels: layout {layout} {needs}")
    if not (images.is_dir() if folder else images.is_file()):
        wanted = "a folder with one folder of image files per class" if folder else "a file"
        raise UserError(f"images '{images}': layout {layout} is {wanted}, and there is none")
    if labels is not None and not labels.is_file():
        raise UserError(f"labels '{labels}': no such file")


def _real_data(
    layout: str,
    data: str,
    space: str,
    statistics: dict[str, Sequence[float] | None],
    arguments: Mapping[str, Any],
    root: str | None,
) -> RealData:
    """Build the real data with the preprocessing that the other project used."""
    given = {name: list(values) for name, values in statistics.items() if values is not None}
    if len(given) == 1:
        raise UserError("mean and std must be given together")
    kind = "standardise" if space == "pixels" else space
    real = build_data(data, {"val_fraction": 0.0, **arguments, "preprocessing": kind, **given}, root)
    published = LAYOUTS[layout].statistics
    if space == "standardise" and not given and published is not None:
        mean, std = published.get(real.name, real.statistics)
        if mean is None or std is None:
            raise UserError(f"mean and std: no numbers are published for {real.name} in layout {layout}; give both")
        real.mean, real.std = list(mean), list(std)
    return real


def _check(found: ForeignSet, facts: DataFacts, space: str, where: str) -> None:
    """Refuse images and labels that fit neither the data nor each other, or cannot be in the space that was stated."""
    images, labels = found.images, found.labels
    if tuple(images.shape[1:]) != facts.image_shape:
        raise UserError(
            f"{where}: they are {tuple(images.shape[1:])} and those of {facts.name} {facts.image_shape} "
            "(channels, height, width)"
        )
    if len(images) != len(labels):
        raise UserError(f"{where}: {len(images)} images and {len(labels)} labels")
    if not bool(torch.isfinite(images.float()).all() and torch.isfinite(labels.float()).all()):
        raise UserError(f"{where}: images or labels hold NaN or infinite values")
    first, last = (0, labels.shape[1] - 1) if labels.ndim == 2 else map(int, labels.aminmax())
    if first < 0 or last != facts.num_classes - 1:
        raise UserError(f"{where}: labels of classes {first} to {last}, {facts.name} has {facts.num_classes}")
    low, high = (float(value) for value in images.aminmax())
    shown, whole = f"found {low:.3g} to {high:.3g}", images.dtype == torch.uint8
    if space == "pixels" and not whole and (low < _SMALLEST_PIXEL or high > _LARGEST_PIXEL):
        others = ", ".join(SPACES[1:])
        raise UserError(f"{where}: pixels must lie in [0, 1], {shown}; state their preprocessing: {others}")
    if space != "pixels" and (whole or (low >= 0 and high <= 1)):
        raise UserError(f"{where}: images after {space} have both signs, {shown}: state preprocessing pixels")


def _converted(
    found: ForeignSet, real: RealData, space: str, method: str, config: dict[str, Any], training: dict[str, Any]
) -> DistilledSet:
    """Bring the rows into blocks by class, and the images into the space of the data's preprocessing."""
    facts, into, classes = real.facts, real.preprocessing, _classes_of(found, real.facts.num_classes)
    assert into is not None
    sizes = torch.bincount(classes, minlength=facts.num_classes)
    if bool((sizes != sizes[0]).any()):
        raise UserError(
            f"labels: every class needs equally many images, found {int(sizes.min())} to {int(sizes.max())}"
        )
    order = classes.argsort(stable=True)
    images, labels, classes = found.images[order], found.labels[order], classes[order]
    return DistilledSet(
        images=into(to_unit(images)) if space == "pixels" else images,
        labels=one_hot(classes, facts.num_classes).float() if found.label_kind == "hard" else labels,
        classes=classes,
        label_kind=found.label_kind,
        class_names=facts.class_names,
        preprocessing=into,
        data=real.origin(),
        method=method,
        config=config,
        training=training,
    )


def _classes_of(found: ForeignSet, count: int) -> Tensor:
    """Return the class each row stands for ``(n,)``: what its label says or favours, or the block it is in."""
    if found.labels.ndim == 1:
        return found.labels
    ipc, rest = divmod(len(found.labels), count)
    if rest == 0:
        # Learned rows may come to favour another class than their own, but not most blocks as a whole.
        favoured = found.labels.view(count, ipc, count).mean(1).argmax(1)
        if int((favoured == torch.arange(count)).sum()) * 2 > count:
            return torch.arange(count).repeat_interleave(ipc)
    return found.labels.argmax(1)
