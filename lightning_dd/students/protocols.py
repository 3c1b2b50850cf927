"""Published evaluation protocols as named, frozen recipes.

The same distilled set scores differently under each of them, which is the largest source of numbers that do not
compare; a table of methods by protocols shows it. What belongs to the network (FRePo's students have no normalisation,
those of DC, DSA, DM and MTT instance normalisation) is said by the architecture, and what belongs to the labels (their
form, a teacher's temperature, replayed views) travels with the set.
"""

from dataclasses import replace
from typing import Any

from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import unknown_name

_GLAD_VGG = (("vgg", 1e-4),)
_RDED_RATES = (
    ("vgg", 5e-4),
    ("efficientnet", 2e-3),
    ("mobilenet", 2.5e-3),
    ("alexnet", 1e-4),
    ("vit", 1e-4),
    ("swin", 1e-4),
)

_SGD = Recipe(
    epochs=1000,
    lr=0.01,
    warmup=0,
    batch_size=256,
    augment="siamese",
    optimizer="sgd",
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
)
_ADAMW = Recipe(epochs=300, lr=1e-3, warmup=0, augment="none", optimizer="adamw", weight_decay=0.01)

PROTOCOLS: dict[str, Recipe] = {
    # Zhou et al. 2022, arXiv 2206.00719: Adam, warm-up 500 steps, cosine to 1 %, steps by the number of images.
    "frepo": Recipe(),
    # Zhao et al. 2021, arXiv 2006.05929: SGD, 300 epochs, a tenth at half of them, no augmentation.
    "dc": replace(_SGD, epochs=300, augment="none"),
    # Zhao & Bilen 2021, arXiv 2102.08259, and DM (2023): the same for 1,000 epochs with their augmentation.
    "dsa": _SGD,
    # Cazenavette et al. 2022, arXiv 2203.11932, and DATM (Guo et al. 2024): with the step size that was learned.
    "mtt": replace(_SGD, learned_lr=True),
    # Cazenavette et al. 2023, arXiv 2305.01649: warm-up for half of the run, then a cosine; a moving average is tested.
    "glad": replace(_SGD, lr=1e-3, warmup=10**9, final_lr=0.0, schedule="cosine", ema=0.995, lr_of=_GLAD_VGG),
    # Yin et al. 2023, arXiv 2306.13092: AdamW and a cosine on replayed views.
    "sre2l": replace(_ADAMW, final_lr=0.0, batch_size=1024),
    # Sun et al. 2024, arXiv 2312.03526: AdamW by architecture, half a cosine, on replayed views.
    "rded": replace(_ADAMW, batch_size=100, schedule="half_cosine", lr_of=_RDED_RATES),
}


def protocol(name: str, **changes: Any) -> Recipe:
    """Return a published recipe by name, with some of its settings replaced.

    Args:
        name: of the recipe.
        **changes: settings of :class:`~lightning_dd.students.recipe.Recipe`; ``None`` keeps the published value.

    Raises:
        UserError: the name is unknown, or a setting is out of range.

    Example:
        >>> protocol("dsa").steps_for(10), protocol("frepo").steps_for(10)
        (1000, 1000)
        >>> protocol("dsa", lr=0.1, warmup=None) == replace(protocol("dsa"), lr=0.1)
        True
    """
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return replace(PROTOCOLS[name], **{key: value for key, value in changes.items() if value is not None})
