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

from lightning_dd.data import DATA_SETS, RealData
from lightning_dd.data.facts import DataFacts
from lightning_dd.data.preprocess import Pixels, Preprocessing, to_unit
from lightning_dd.distilled.foreign import ForeignSet, check_foreign, read_foreign
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.utils.errors import UserError, unknown_name

SPACES = ("pixels", "standardise", "zca", "kornia-zca")
"""Preprocessings that images may be in: pixels in [0, 1], or one that is undone by the same name."""

METHODS = {"frepo": "FRePo", "dc": "DC", "mtt": "MTT", "sre2l": "SRe2L", "rded": "RDED"}
KORNIA_RIDGE = 0.1
"""The absolute regulariser that MTT and DATM give to kornia."""

_Statistics = tuple[tuple[float, ...], tuple[float, ...]]
_CIFAR10: _Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
# Where a project divides by other numbers than the data set's own here. MTT takes CIFAR-10's for CIFAR-100 as well.
_STATISTICS: dict[str, dict[str, _Statistics]] = {
    "dc": {"CIFAR10": _CIFAR10, "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))},
    "mtt": {"CIFAR10": _CIFAR10, "CIFAR100": _CIFAR10},
}
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
        data: name of the data set the images stand for.
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
    _check_stated(layout, preprocessing)
    first, second = Path(images), None if labels is None else Path(labels)
    check_foreign(layout, first, second)
    real = _real_data(data, root, data_args or {}, "zca" if preprocessing == "zca" else "standardise")
    if preprocessing == "kornia-zca":
        _fit_kornia(real, mean, std)
    else:
        _set_statistics(real, layout, preprocessing, mean, std)
    real.setup("fit")
    facts, into = real.facts, real.preprocessing
    assert into is not None
    if len(into.mean) != facts.image_shape[0]:
        raise UserError(f"mean and std: {len(into.mean)} numbers for {facts.image_shape[0]} channels of {facts.name}")
    found = read_foreign(layout, first, second, experiment, facts)
    _check(found, facts, f"images '{images}'")
    classes, order = _order_of(found, facts, f"labels of '{images}'")
    pixels = found.images[order]
    _check_space(pixels, preprocessing, f"images '{images}'")
    rows = found.labels[order]
    return DistilledSet(
        images=into(to_unit(pixels)) if preprocessing == "pixels" else pixels,
        labels=one_hot(classes, facts.num_classes).float() if found.label_kind == "hard" else rows,
        classes=classes,
        label_kind=found.label_kind,
        class_names=facts.class_names,
        preprocessing=into,
        data=real.origin(),
        method=method or METHODS[layout],
        config={"architecture": architecture} if architecture else {},
        training={"converted_from": layout, "preprocessing": preprocessing, "versions": library_versions()},
    )


def summary(distilled: DistilledSet) -> str:
    """Say in one line what a converted set holds and what its preprocessing is."""
    into, stated = distilled.preprocessing, distilled.training["preprocessing"]
    mean, std = (", ".join(f"{value:.4g}" for value in part.tolist()) for part in (into.mean, into.std))
    return (
        f"{len(distilled)} images of {distilled.data['name']}, {distilled.ipc} per class, {distilled.label_kind} "
        f"labels; {stated}, as {into} with mean ({mean}) and std ({std})"
    )


def fit_kornia_zca(pixels: Pixels, ridge: float = KORNIA_RIDGE) -> Preprocessing:
    """Fit the ZCA of kornia as MTT (Cazenavette et al. 2022, arXiv 2203.11932) and DATM use it.

    On pixels in [0, 1], not standardised: with the unbiased covariance ``U diag(s) U^T`` the whitening matrix is
    ``U diag((s + ridge)^-1/2) U^T``. Flat images are in the order channel, row, column.

    Args:
        pixels: training images ``(N, C, H, W)``, uint8 or float in [0, 1].
        ridge: added to every eigenvalue.
    """
    count, channels = len(pixels), pixels.shape[1]
    blocks = [range(start, min(start + 4096, count)) for start in range(0, count, 4096)]

    def rows(block: range) -> Tensor:
        return to_unit(pixels[block.start : block.stop]).flatten(1).double()

    mean = torch.stack([rows(block).sum(0) for block in blocks]).sum(0) / count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in blocks:
        centred = rows(block) - mean
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / max(1, count - 1))
    values = values.clamp_min(0) + ridge
    whiten, unwhiten = ((vectors * scale) @ vectors.T for scale in (values.rsqrt(), values.sqrt()))
    return Preprocessing([0.0] * channels, [1.0] * channels, mean.float(), whiten.float(), unwhiten.float())


def _check_stated(layout: str, space: str) -> None:
    if space not in SPACES:
        raise unknown_name("preprocessing", space, SPACES)
    if layout in ("sre2l", "rded") and space != "pixels":
        raise UserError(f"preprocessing must be pixels for layout {layout}, whose files hold 8-bit pixels")
    if layout in ("dc", "mtt") and space == "zca":
        raise UserError(f"preprocessing zca is FRePo's; what layout {layout} calls ZCA is kornia-zca")


def _real_data(name: str, root: str | None, given: Mapping[str, Any], preprocessing: str) -> RealData:
    if name not in DATA_SETS:
        raise unknown_name("data", name, DATA_SETS)
    settings = {"val_fraction": 0.0, **given, "preprocessing": preprocessing}
    try:
        real = DATA_SETS[name](**settings) if root is None else DATA_SETS[name](root=root, **settings)
    except TypeError as error:
        raise UserError(f"data_args do not build {name}: {error}") from None
    real.prepare_data()
    return real


def _fit_kornia(real: RealData, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if mean is not None or std is not None:
        raise UserError("mean and std: kornia-zca whitens raw pixels; leave them out")
    images = real.read(train=True).images
    if images.shape[2] * images.shape[3] > 64 * 64:
        raise UserError("preprocessing kornia-zca whitens images of up to 64x64 pixels")
    real.use_preprocessing(fit_kornia_zca(images))


def _set_statistics(
    real: RealData, layout: str, space: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Say which statistics the real data is standardised with."""
    if (mean is None) != (std is None):
        raise UserError("mean and std must be given together")
    if mean is None or std is None:
        mean, std = _STATISTICS.get(layout, {}).get(real.name, (None, None)) if space == "standardise" else (None, None)
    if mean is None or std is None:
        if space == "standardise" and layout in _STATISTICS and real.channel_mean is None:
            raise UserError(f"mean and std: no numbers are published for {real.name} in layout {layout}; give both")
        return
    if len(mean) != len(std) or min(std, default=0) <= 0:
        raise UserError(f"mean and std must be one number per channel, std above 0, got {list(mean)} and {list(std)}")
    real.channel_mean, real.channel_std = tuple(mean), tuple(std)


def _check(found: ForeignSet, facts: DataFacts, where: str) -> None:
    if tuple(found.images.shape[1:]) != facts.image_shape:
        raise UserError(
            f"{where}: they are {tuple(found.images.shape[1:])} and those of {facts.name} {facts.image_shape} "
            "(channels, height, width)"
        )
    if len(found.images) != len(found.labels):
        raise UserError(f"{where}: {len(found.images)} images and {len(found.labels)} labels")
    if not bool(torch.isfinite(found.images.float()).all() and torch.isfinite(found.labels.float()).all()):
        raise UserError(f"{where}: images or labels hold NaN or infinite values")
    low, high = (0, found.labels.shape[1] - 1) if found.labels.ndim == 2 else found.labels.aminmax()
    if low < 0 or int(high) != facts.num_classes - 1:
        raise UserError(f"{where}: labels of classes {int(low)} to {int(high)}, {facts.name} has {facts.num_classes}")


def _order_of(found: ForeignSet, facts: DataFacts, where: str) -> tuple[Tensor, Tensor]:
    """Return the classes of the rows, in blocks by class, and the order that brings the rows there."""
    count = facts.num_classes
    ipc, rest = divmod(len(found.labels), count)
    classes = found.labels if found.labels.ndim == 1 else found.labels.argmax(1)
    if found.labels.ndim == 2 and rest == 0:
        # Learned rows may come to favour another class than their own, but not most blocks as a whole.
        favoured = found.labels.view(count, ipc, count).mean(1).argmax(1)
        if int((favoured == torch.arange(count)).sum()) * 2 > count:
            classes = torch.arange(count).repeat_interleave(ipc)
    sizes = torch.bincount(classes, minlength=count)
    if bool((sizes != ipc).any()) or rest:
        raise UserError(
            f"{where}: every class needs equally many images, found {int(sizes.min())} to {int(sizes.max())}"
        )
    order = classes.argsort(stable=True)
    return classes[order], order


def _check_space(images: Tensor, space: str, where: str) -> None:
    """Refuse images that cannot be in the space they are said to be in."""
    low, high = (float(value) for value in images.aminmax())
    shown = f"found {low:.3g} to {high:.3g}"
    if space == "pixels" and images.dtype != torch.uint8 and (low < _SMALLEST_PIXEL or high > _LARGEST_PIXEL):
        others = ", ".join(SPACES[1:])
        raise UserError(f"{where}: pixels must lie in [0, 1], {shown}; state their preprocessing: {others}")
    if space != "pixels" and (images.dtype == torch.uint8 or (low >= 0 and high <= 1)):
        raise UserError(f"{where}: images after {space} have both signs, {shown}: state preprocessing pixels")
