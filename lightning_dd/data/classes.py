"""Choosing classes of a larger set: labels follow the order of the choice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dd.utils.errors import UserError

Classes = list[int | str] | str | None
"""Indices or names of classes, the name of a group of :data:`CLASS_GROUPS`, or ``None`` for all."""

CLASS_GROUPS: dict[str, tuple[int, ...]] = {
    "nette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "woof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "meow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "squawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "fruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "yellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
    "mammals": (386, 387, 354, 340, 338, 104, 103, 279, 334, 366),
    "a": (255, 376, 984, 364, 500, 986, 333, 576, 148, 135),
    "b": (129, 916, 90, 275, 995, 874, 102, 259, 685, 139),
    "c": (565, 94, 554, 535, 92, 392, 291, 136, 324, 11),
    "d": (9, 258, 13, 262, 19, 339, 321, 24, 93, 322),
    "e": (816, 96, 100, 145, 739, 713, 783, 76, 688, 326),
}
"""Ten-class subsets of ImageNet's 1,000 classes, in the published order (Howard 2019 for nette and woof; Cazenavette
et al. 2022, arXiv 2203.11932 and 2023, arXiv 2305.01649 for the others). Indices count the sorted WordNet ids."""


def choose_classes(classes: Classes, names: Sequence[str]) -> list[int]:
    """Return the indices of the chosen classes, in the order of the choice.

    Args:
        classes: indices or names, a group, or ``None`` for all.
        names: of all classes, in label order.

    Raises:
        UserError: a class or group does not exist, is named twice, or the set is not one with such groups.

    Example:
        >>> choose_classes(["cow", 0], ["ant", "bee", "cow"])
        [2, 0]
    """
    if classes is None:
        return list(range(len(names)))
    if isinstance(classes, str):
        if classes not in CLASS_GROUPS:
            raise UserError(f"data.classes must be a list or one of {', '.join(CLASS_GROUPS)}, got '{classes}'")
        if len(names) != 1000:
            raise UserError(f"data.classes='{classes}' chooses among ImageNet's 1,000 classes; here are {len(names)}")
        return list(CLASS_GROUPS[classes])
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    chosen = [places.get(item, -1) if isinstance(item, str) else item for item in classes]
    for item, place in zip(classes, chosen, strict=True):
        if not 0 <= place < len(names):
            raise UserError(f"data.classes: there is no class {item!r} among the {len(names)} classes")
        if chosen.count(place) > 1:
            raise UserError(f"data.classes names {item!r} twice")
    if not chosen:
        raise UserError("data.classes must name at least one class")
    return chosen


def relabel(labels: Tensor, chosen: Sequence[int], num_classes: int) -> Tensor:
    """Return labels in the order of a choice, -1 where a row's class is not chosen.

    Args:
        labels: ``(N,)`` int64 in ``[0, num_classes)``.
        chosen: from :func:`choose_classes`.
        num_classes: of the whole set.

    Raises:
        UserError: a label is out of range.

    Example:
        >>> relabel(torch.tensor([0, 1, 2]), [2, 0], 3)
        tensor([ 1, -1,  0])
    """
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise UserError(f"labels must be in [0, {num_classes}), found {int(labels.min())}..{int(labels.max())}")
    places = torch.full((num_classes,), -1)
    places[list(chosen)] = torch.arange(len(chosen))
    return places[labels]
