"""lightning_dd: dataset distillation as PyTorch Lightning modules.

Importing the package is cheap; import what you need from its subpackages::

    from lightning_dd.data import MNIST5k
from lightning_dd.distilled import DistilledSet
    from lightning_dd.distillers import FRePo
    from lightning_dd.callbacks import PoolAlternation
"""

__version__ = "0.1.0"
