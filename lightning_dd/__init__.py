"""lightning_dd: dataset distillation as PyTorch Lightning modules.

What is most used, imported when it is first asked for, so that importing the package is cheap:

- :func:`distil` and :func:`evaluate`: the two stages, with the defaults of the command line;
- :func:`published_cell`: method, data and outer steps of one cell of a paper's table;
- :class:`DistilledSet`: what the first hands to the second, and the file it is kept in;
- :class:`Distiller`, :class:`PoolDistiller`, :class:`TeacherDistiller`: the bases of a method of one's own;
- :class:`MetaDD`: the callback that makes any method's result transfer to other architectures;
- :mod:`losses`: the formulas, as plain functions of tensors.

The methods are in :mod:`lightning_dd.distillers`, the data sets in :mod:`lightning_dd.data`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dd import losses
    from lightning_dd.api import distil, evaluate, published_cell
    from lightning_dd.callbacks import MetaDD
    from lightning_dd.distilled import DistilledSet
    from lightning_dd.distillers import Distiller, PoolDistiller, TeacherDistiller

__version__ = "0.1.0"
__all__ = [
    "DistilledSet",
    "Distiller",
    "MetaDD",
    "PoolDistiller",
    "TeacherDistiller",
    "distil",
    "evaluate",
    "losses",
    "published_cell",
]
_ROOMS = {
    "DistilledSet": "distilled",
    "Distiller": "distillers",
    "MetaDD": "callbacks",
    "PoolDistiller": "distillers",
    "TeacherDistiller": "distillers",
    "distil": "api",
    "evaluate": "api",
    "published_cell": "api",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("lightning_dd.losses")
    if name in _ROOMS:
        return getattr(import_module(f"lightning_dd.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'lightning_dd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
