"""MetaDD's settings as the experiments' YAML files and the recorded rows say them: one flat line each.

``relative: false`` is ``scale: absolute``; ``relative: true`` is ``norm``, or ``steady`` with ``steady: true``, the
default. Switches of the loss and ``train_steps`` (or ``training``, a whole recipe) stand beside the others.
"""

from collections.abc import Mapping
from typing import Any

from lightning_dd.callbacks import MetaDD
from lightning_dd.callbacks.architectures import Look
from lightning_dd.losses.metadd import MetaOptions
from lightning_dd.pretrained import ClassifierRecipe

LOSS = tuple(MetaOptions.__dataclass_fields__)


def metadd(flat: Mapping[str, Any]) -> MetaDD:
    """Build the callback of a flat setting."""
    own = {
        name: value
        for name, value in flat.items()
        if name not in (*LOSS, "relative", "steady", "train_steps", "training")
    }
    loss = MetaOptions(**{name: flat[name] for name in LOSS if name in flat})
    training = ClassifierRecipe(**flat.get("training", {"steps": flat.get("train_steps", 1000)}))
    relative, steady = flat.get("relative", True), flat.get("steady", True)
    own["looks"] = {name: Look(**look) for name, look in flat.get("looks", {}).items()}
    own["scale"] = "absolute" if not relative else "steady" if steady else "norm"
    return MetaDD(loss=loss, training=training, **own)
