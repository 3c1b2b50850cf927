"""Methods that select real images and learn none, and the coresets among them: the baselines of every table."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.data.images import Split
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distillers.teacher import TeacherDistiller
from lightning_dd.losses.coresets import herding, k_center
from lightning_dd.models.interface import features_in_slices
from lightning_dd.synthetic.parameterisation import ImageSpace
from lightning_dd.utils.arguments import subclasses
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator


class SelectionDistiller(TeacherDistiller):
    """A method that chooses images once, before the first outer step.

    It runs like any other: one outer step at learning rate 0 (``trainer.max_steps: 1``), so that scores, pictures,
    checkpoints and the exported file come the usual way.

    A subclass must answer :meth:`select`; the teacher is trained only for soft labels, or if that asks for
    :attr:`network`.

    Args:
        **kwargs: see :class:`TeacherDistiller`.

    Raises:
        UserError: an argument is out of range, or images cannot be put into the parameterisation.
    """

    label_kinds: ClassVar[tuple[str, ...]] = ("hard", "centred")
    learns: ClassVar[bool] = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(self.parameterisation[0], ImageSpace):
            known = ", ".join(cls.__name__ for cls in subclasses(ImageSpace))  # type: ignore[type-abstract]
            raise UserError(f"{type(self).__name__} selects real images: parameterisation must be one of {known}")

    @abstractmethod
    def select(self, train: Split) -> Tensor:
        """Return the images ``(num_classes * shown_ipc, C, H, W)``, normalised, in blocks by class.

        Args:
            train: all training images, normalised, and their classes.
        """

    def initialise(self, train: Split) -> None:
        """Fill the synthetic set with the selection; every rank selects the same."""
        selected = self.select(train)  # may train the teacher, which needs gradients
        self.synthetic.parameterisation.encode(selected)  # type: ignore[operator]

    def outer_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Nothing is minimised."""
        return {"selected": 0 * images.sum()}

    def configure_optimizers(self) -> Any:
        """Return an optimizer that moves nothing."""
        return torch.optim.SGD(self.synthetic.parameters(), lr=0.0)


class Random(SelectionDistiller):
    """Real images drawn uniformly, ``ipc`` per class without replacement.

    With :class:`~lightning_dd.synthetic.MultiFormation` they are as many as that shows, each shrunk to its part.
    """

    def select(self, train: Split) -> Tensor:
        """Draw by the run's seed."""
        generator, repeat = make_generator(self.seed, "init"), self.shown_ipc > self.ipc
        rows = draw_per_class(
            train.labels, self.shown_ipc, self.facts.num_classes, generator, repeat, train.class_names
        )
        return train.take(rows).images


class FeatureCoreset(SelectionDistiller):
    """A coreset chosen class by class among the teacher's penultimate features, scaled to unit length."""

    @abstractmethod
    def choose(self, features: Tensor) -> Tensor:
        """Return ``shown_ipc`` row indices of features ``(N, p)`` of one class."""

    def select(self, train: Split) -> Tensor:
        """Choose rows of every class."""
        classes, chosen = self.facts.num_classes, []
        draw_per_class(train.labels, self.shown_ipc, classes, make_generator(0), names=train.class_names)  # refuses
        for label in range(classes):
            rows = (train.labels == label).nonzero().flatten()
            features = features_in_slices(self.network, train.take(rows, self.task.device).images)
            chosen.append(rows[self.choose(F.normalize(features.flatten(1).float(), dim=1)).to(rows.device)])
        return train.take(torch.cat(chosen)).images


class Herding(FeatureCoreset):
    """Images whose running mean of features stays nearest the class mean (Welling 2009; Rebuffi et al. 2017)."""

    def choose(self, features: Tensor) -> Tensor:
        """Choose greedily."""
        return herding(features, self.shown_ipc)


class KCenter(FeatureCoreset):
    """Greedy k-centers, starting at the sample nearest the class mean (Sener & Savarese 2018)."""

    def choose(self, features: Tensor) -> Tensor:
        """Choose greedily."""
        return k_center(features, self.shown_ipc)
