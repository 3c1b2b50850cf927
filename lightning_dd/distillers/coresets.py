"""Coresets: real images chosen at random, by herding or as k-centers. The baselines of every table."""

import torch
from torch import Tensor

from lightning_dd.data.images import Split
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distillers.selection import SelectionDistiller
from lightning_dd.losses.coresets import herding, k_center
from lightning_dd.models.interface import features_in_slices
from lightning_dd.utils.seeding import make_generator


class Random(SelectionDistiller):
    """Real images drawn uniformly, ``ipc`` per class without replacement."""

    def select(self, train: Split) -> Tensor:
        """Draw by the run's seed."""
        rows = draw_per_class(train.labels, self.ipc, self.facts.num_classes, make_generator(self.seed, "init"))
        return train.take(rows).images


class _FeatureCoreset(SelectionDistiller):
    """A coreset chosen class by class in the feature space of the teacher.

    Features are the teacher's penultimate ones, scaled to unit length.
    """

    def select(self, train: Split) -> Tensor:
        """Choose rows of every class."""
        draw_per_class(train.labels, self.ipc, self.facts.num_classes, make_generator(0))  # refuses an ipc too large
        chosen = []
        for label in range(self.facts.num_classes):
            rows = (train.labels == label).nonzero().flatten()
            features = features_in_slices(self.network, train.take(rows, self.task.device).images)
            features = torch.nn.functional.normalize(features.flatten(1).float(), dim=1)
            chosen.append(rows[self.choose(features).to(rows.device)])
        return train.take(torch.cat(chosen)).images

    def choose(self, features: Tensor) -> Tensor:
        """Return ``ipc`` row indices of features ``(N, p)`` of one class."""
        raise NotImplementedError


class Herding(_FeatureCoreset):
    """Images whose running mean of features stays nearest the class mean (Welling 2009; Rebuffi et al. 2017)."""

    def choose(self, features: Tensor) -> Tensor:
        """Choose greedily."""
        return herding(features, self.ipc)


class KCenter(_FeatureCoreset):
    """Greedy k-centers, starting at the sample nearest the class mean (Sener & Savarese 2018)."""

    def choose(self, features: Tensor) -> Tensor:
        """Choose greedily."""
        return k_center(features, self.ipc)
