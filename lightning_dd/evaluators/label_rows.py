"""The sets of an evaluation once more with other labels: what of a score is the images', and what the labels'."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_dd.data.base import RealData
from lightning_dd.data.parts import DataChoice
from lightning_dd.distilled.datamodule import real_data_of
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.evaluators.matrix import random_real, with_hard_labels
from lightning_dd.jobs import tensor_digest
from lightning_dd.models.factory import NetworkMixture, build_network
from lightning_dd.pretrained.classifier import Committee, Teacher
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.synthetic.labels import TeacherLabels, labelled_by, relabel
from lightning_dd.utils.errors import UserError, unknown_name
from lightning_dd.utils.seeding import derive_seed

HARD, STATIC, DYNAMIC, SEEN = KINDS = ("hard", "static", "dynamic", "seen")


@dataclass(frozen=True)
class LabelRows:
    """Which other labels every set gets beside its own, so that images are compared under equal labels.

    ``hard`` labels are the classes. ``static`` ones are a teacher's answers to the images, fitted while students
    augment as usual. ``dynamic`` ones are its answers to a new view of every image in every pass, which is what a
    teacher gives that stands beside the student all the time (Shen & Xing 2022, arXiv 2112.01528). Random real images
    with the same teacher's labels stand beside the last two, for a gain over those is the images' own. They are drawn
    once; with hard labels every evaluation has them, drawn anew for every student.

    Args:
        kinds: any of :data:`KINDS`.
        teacher: one network or a committee, trained on the real data where the cache lacks it.

    Raises:
        UserError: a kind is unknown, or there is no teacher for one that needs it.
    """

    kinds: tuple[str, ...] = ()
    teacher: Teacher | None = None

    @property
    def words(self) -> list[str]:
        """What the command line says for it."""
        asked = None if self.teacher is None else self.teacher.architecture
        teachers = [] if asked is None else ["--teacher", *NetworkMixture.parse(asked).names]
        return ["--labels", *self.kinds, *teachers] if self.kinds else []

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown_name("labels", kind, KINDS)
            if kind in (STATIC, DYNAMIC) and (self.teacher is None or self.teacher.architecture is None):
                raise UserError(f"labels: '{kind}' are a teacher's: name its architecture, as --teacher resnet18")

    def files(
        self, named: Mapping[str, str], recipes: Collection[Recipe], data: DataChoice, folder: Path
    ) -> dict[str, str]:
        """Return sets by name, and the same ones with other labels after each, which are written to a folder.

        Args:
            named: files by the name of the set.
            recipes: of the students, whose passes over a set are counted for ``dynamic`` labels.
            data: the real data that is meant.
            folder: of the new files; one that is there already is made again, with the same outcome.

        Raises:
            UserError: a set is called what another one is to be called with other labels, or does not say with which
                network it was distilled.
        """
        own = {f"{name}-{kind}" for name in (*named, "random") for kind in self.kinds}
        if taken := sorted(own & named.keys()):
            raise UserError(f"names: '{taken[0]}' is what a set with other labels is called here: say --names")
        found: dict[str, str] = {}
        drawn: dict[tuple[int, str], str] = {}
        for name, file in named.items():
            distilled = DistilledSet.load(file)
            found[name] = file
            real: RealData | None = None
            for kind in self.kinds:
                real = real or _set_up(distilled, data)
                give = self._give(kind, name, distilled, real, recipes)
                found[f"{name}-{kind}"] = str(give(distilled).save(folder / f"{name}-{kind}.safetensors"))
                alike = f"{kind} {tensor_digest(distilled.preprocessing.state_dict())}"
                key = distilled.ipc, alike + (str(distilled.architecture) if kind == SEEN else "")
                if kind != HARD and key not in drawn:
                    drawn[key] = f"random-{kind}" if f"random-{kind}" not in found else f"{name}-random-{kind}"
                    control = give(random_real(distilled, real, 0))
                    found[drawn[key]] = str(control.save(folder / f"{drawn[key]}.safetensors"))
        return found

    def _give(
        self, kind: str, name: str, distilled: DistilledSet, real: RealData, recipes: Collection[Recipe]
    ) -> Callable[[DistilledSet], DistilledSet]:
        """Return what gives a set of the size of ``distilled`` labels of a kind."""
        if kind == HARD:
            return lambda given: with_hard_labels(given, real, 0)
        rows, classes = len(distilled), distilled.num_classes
        passes = max(  # a batch that is not full is left out
            math.ceil(recipe.steps_for(rows, classes) / (rows // min(rows, recipe.batch_for(rows, classes))))
            for recipe in recipes
        )
        if kind != SEEN:
            strategy = TeacherLabels(self.teacher, epochs=passes if kind == DYNAMIC else 0)
            return lambda given: relabel(given, strategy, real, otherwise="")  # the strategy names its teacher
        if distilled.architecture is None:
            raise UserError(f"labels: 'seen' are of the network a set was distilled with; '{name}' does not say which")
        own, recipe = NetworkMixture.parse(distilled.architecture).main, next(iter(recipes))
        by_views = TeacherLabels(epochs=passes)
        return lambda given: labelled_by(given, by_views, lambda _: _trained_on(given, own, recipe))


def _trained_on(distilled: DistilledSet, architecture: str, recipe: Recipe) -> Committee:
    """Return a network that has learned from a set what students learn from it: the teacher of other ones."""
    network = build_network(architecture, distilled.num_classes, distilled.image_shape, derive_seed(0, SEEN))
    suited = recipe.suited_to(architecture, distilled.training.get("step_size"))
    return Committee([train_student(network, distilled, suited, seed=0)], NetworkMixture.parse(architecture))


def _set_up(distilled: DistilledSet, data: DataChoice) -> RealData:
    real = real_data_of(distilled, data)
    real.prepare_data()
    real.setup("fit")
    return real
