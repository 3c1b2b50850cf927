"""Class-incremental learning with distilled sets as the memory; an experiment can be resumed at every step."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain, product, starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_dd.applications import JOINT, Continual
from lightning_dd.applications.continual_report import Row, forgetting, write_report
from lightning_dd.data import ClassSubset, RealData
from lightning_dd.data.parts import build_data, save_preprocessing
from lightning_dd.data.sampling import answers, draw_per_class
from lightning_dd.distilled.datamodule import check_match, real_set
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.distilled.union import union
from lightning_dd.experiment import Method, digests, distil_stage
from lightning_dd.jobs import Job, Ledger, Record, Tick, check_workers, device_of, run_jobs, workers_on
from lightning_dd.models.factory import build_network
from lightning_dd.report import grouped
from lightning_dd.students.loop import step_flops, train_student
from lightning_dd.students.recipe import Recipe, protocol
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable
from lightning_dd.utils.seeding import derive_seed, make_generator
from lightning_dd.utils.silence import quiet_trainers


@dataclass(frozen=True)
class Lesson:
    """One student of one step."""

    line: str
    """The name of a method, or :data:`~lightning_dd.applications.JOINT`."""
    step: int
    architecture: str
    number: int


@dataclass(frozen=True)
class Course:
    """A class order: which classes each step brings, and the real images to distil, to score and to compare with.

    Preprocessing is that of the first step's classes for the whole course, as a learner who does not know later classes
    has to do it: published channel statistics where the data set has them, else statistics (and whitening matrices)
    fitted on the first step's training images.
    """

    experiment: Continual
    number: int
    """Of the order, which is its seed."""
    num_classes: int

    @cached_property
    def steps(self) -> list[list[int]]:
        """The classes that come at each step."""
        return split_classes(class_order(self.num_classes, self.number), self.experiment.steps)

    @property
    def folder(self) -> Path:
        """Where the files of this order go."""
        return Path(self.experiment.output) / f"order{self.number}"

    def seed(self, *names: str | int) -> int:
        """Return a seed for a purpose within this order, below 2^31."""
        return derive_seed(self.number, "continual", *names) % 2**31

    def memory_file(self, method: str, step: int) -> Path:
        """Return where the united memory of a method lies after ``step`` (from 0)."""
        return self.folder / method / f"step{step + 1}" / "memory.safetensors"

    def data_of(self, classes: list[int]) -> ClassSubset:
        """Return the real data of some classes."""
        file = str(self._preprocessing_file)
        return ClassSubset(classes=classes, preprocessing_file=file, **self.experiment.source)

    def seen_data(self, step: int) -> ClassSubset:
        """Return the real data of all classes seen after ``step``, for scoring and the upper line alone."""
        return self.data_of(list(chain(*self.steps[: step + 1])))

    def joint_set(self, step: int) -> DistilledSet:
        """Return all real training images of the classes seen after ``step``, with hard labels."""
        data = self.seen_data(step)
        data.setup("fit")
        assert data.train is not None
        return real_set(data, *data.train.everything(), "hard", JOINT)

    @cached_property
    def _preprocessing_file(self) -> Path:
        """The map of the first step, written once."""
        source = self.experiment.source
        spec = [source["source"], source["source_args"], self.steps[0]]
        key = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=8).hexdigest()
        path = self.folder / f"preprocessing-{key}.safetensors"
        if not path.is_file():
            first = ClassSubset(classes=self.steps[0], **source)
            first.setup("fit")
            assert first.preprocessing is not None
            save_preprocessing(first.preprocessing, path)
        return path


def class_order(num_classes: int, seed: int) -> list[int]:
    """Return the order in which classes arrive: numpy's legacy ``RandomState(seed).permutation``.

    These are the orders of FRePo's and DM's published code, the same on every machine and version of numpy.

    Example:
        >>> class_order(10, 0)
        [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    """
    return [int(label) for label in np.random.RandomState(seed).permutation(num_classes)]


def split_classes(order: Sequence[int], steps: int) -> list[list[int]]:
    """Cut a class order into ``steps`` parts of as many classes each.

    Raises:
        UserError: the classes cannot be divided so, or a part would hold fewer than 2.

    Example:
        >>> split_classes([3, 1, 0, 2], 2)
        [[3, 1], [0, 2]]
    """
    count = len(order)
    fitting = [number for number in range(1, count // 2 + 1) if count % number == 0]
    if steps not in fitting:
        raise UserError(
            f"steps must divide the {count} classes into parts of at least 2 classes: "
            f"{', '.join(map(str, fitting))}; got {steps}"
        )
    return np.reshape(order, (steps, -1)).tolist()


@quiet_trainers()
def run_continual(experiment: Continual) -> list[Row]:
    """Let classes come in steps; after each, distil its classes, unite the memory and train students from scratch.

    A step distils its own classes only, independently of earlier steps; nothing of later classes is used, and no real
    image of earlier ones. Every method's memory is scored with the same students' seeds on the same class orders.

    Everything finished is kept: distilled sets with their runs and the united memory under
    ``output/order<s>/<method>/step<t>/``, students' scores in ``output/students``. An interrupted experiment goes on
    where it stopped and ends with the same table, and orders, methods or students' settings can be changed or added
    later without distilling again.

    Returns:
        One row per method, architecture, order and step; nothing on processes that do not write the report.

    Raises:
        UserError: a setting does not fit the data, a configuration is unusable, or the folder holds distillations with
            other settings.
    """
    check_workers(experiment.workers)
    folder = require_writable(experiment.output)
    num_classes, image_shape = _check_data(experiment)
    ledger, rows = Ledger(folder / "students"), list[Row]()
    for order in range(experiment.orders):
        course = Course(experiment, order, num_classes)
        for method in experiment.distillers.values():
            for step in range(experiment.steps):
                fill_memory(course, method, step)
        jobs = _jobs(course, image_shape)
        workers = workers_on(experiment.accelerator, experiment.workers)
        if not run_jobs(jobs, partial(_score, course), ledger, workers, unit="step"):
            continue
        new = rows_of(order, {job.task: ledger.need(job.identity) for job in jobs})
        _print_accuracies(new)
        rows += new
        write_report(rows, folder, show=order + 1 == experiment.orders)
    if rows:
        print(f"curves: tensorboard --logdir {folder / 'tensorboard'}")
    return rows


def fill_memory(course: Course, method: Method, step: int) -> None:
    """Distil a step's classes, and unite them with those of the steps before, where that is not done yet."""
    path, start = course.memory_file(method.name, step), time.perf_counter()
    accelerator = course.experiment.accelerator
    overrides = [
        f"--seed_everything={course.seed('distil', step)}",
        f"--model.init_args.ipc={course.experiment.ipc}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.limit_val_batches=0",  # the last outer step's set is taken, so no probe need be trained
        *([] if accelerator == "auto" else [f"--trainer.accelerator={accelerator}"]),
        *method.options,
    ]
    distil_stage(method.configs, course.data_of(course.steps[step]).recipe(), path.parent, overrides)
    if not path.is_file():
        parts = [course.memory_file(method.name, number).with_name("last.safetensors") for number in range(step + 1)]
        union([DistilledSet.load(part) for part in parts]).save(path)
        seconds = time.perf_counter() - start
        print(f"order {course.number}  {method.name:<12} step {step + 1}: distilled in {seconds:.0f} s", flush=True)


def score_student(
    architecture: str, memory: DistilledSet, real: RealData, recipe: Recipe, seed: int, device: torch.device
) -> Record:
    """Train one student from scratch on a memory and test it on real data of the same classes, not set up yet.

    The student has one output per class seen, so it cannot name a class that has not come yet. The seed is that of
    weights, batches, augmentation and dropout.

    Returns:
        ``accuracy`` on all test images and ``class_accuracy``, one per class; in [0, 1].
    """
    real.use_preprocessing(memory.preprocessing)
    real.setup("test")
    check_match(memory, real)
    assert real.test is not None
    recipe = recipe.suited_to(architecture, memory.training.get("step_size"))
    network = build_network(architecture, memory.num_classes, memory.image_shape, seed).to(device)
    train_student(network, memory, recipe, seed)
    labels, found = real.test.labels.cpu(), answers(network, real.test, device).argmax(1)
    right = torch.bincount(labels[found == labels], minlength=memory.num_classes).double()
    total = torch.bincount(labels, minlength=memory.num_classes).double()
    return {"accuracy": float(right.sum() / total.sum()), "class_accuracy": (right / total.clamp(min=1)).tolist()}


def recipe_on(experiment: Continual, line: str) -> Recipe:
    """Return how students of a method, or of the upper line, are trained."""
    own: dict[str, Any]
    if line == JOINT:
        own = {"lr": experiment.joint_lr, "batch_size": experiment.joint_batch_size}
        return protocol("frepo", steps=experiment.joint_steps, augment=experiment.augment, **own)
    own = {"lr": experiment.lr, "batch_size": experiment.batch_size}
    return protocol(experiment.protocol, steps=experiment.student_steps, augment=experiment.augment, **own)


def rows_of(order: int, scores: Mapping[Lesson, Record]) -> list[Row]:
    """Turn the scores of all students of one class order into rows, one per method, architecture and step."""
    rows = []
    for (line, architecture), own in grouped(scores, lambda lesson: (lesson.line, lesson.architecture)).items():
        steps = [[scores[lesson] for lesson in at] for at in grouped(own, lambda lesson: lesson.step).values()]
        by_class = [_mean([score["class_accuracy"] for score in at]) for at in steps]
        for step, (at, means, lost) in enumerate(zip(steps, by_class, forgetting(by_class), strict=True), start=1):
            names = at[0]["class_names"]
            rows.append(
                Row(
                    method=line,
                    architecture=architecture,
                    order=order,
                    step=step,
                    classes=len(names),
                    images=at[0]["images"],
                    accuracy=_mean([[score["accuracy"]] for score in at])[0],
                    forgetting=lost,
                    students=tuple(score["accuracy"] for score in at),
                    class_accuracy=dict(zip(names, means, strict=True)),
                )
            )
    return rows


def _check_data(experiment: Continual) -> tuple[int, tuple[int, int, int]]:
    """Return the number of classes and the images' shape, once all is known to fit the data."""
    for line in _lines(experiment):
        recipe_on(experiment, line)  # refuses a recipe that cannot be
    data = build_data(experiment.data, experiment.data_args, experiment.root)
    data.prepare_data()
    images, labels, names = data.read(train=True)
    split_classes(range(len(names)), experiment.steps)
    kept, _ = data._split(labels)
    draw_per_class(labels[kept], experiment.ipc, len(names), make_generator(0), names=names)  # refuses too many
    channels, height, width = images.shape[1:]
    for architecture in experiment.architectures:
        build_network(architecture, len(names), (channels, height, width), seed=0)
    return len(names), (channels, height, width)


def _lines(experiment: Continual) -> list[str]:
    """Return what students learn from: the methods, and the upper line."""
    return [*experiment.distillers, *([JOINT] if experiment.joint else [])]


def _jobs(course: Course, image_shape: tuple[int, int, int]) -> list[Job]:
    """Return all students of a class order as jobs, each with everything its scores depend on."""
    experiment, jobs, versions = course.experiment, [], library_versions()
    axes = (_lines(experiment), range(experiment.steps), experiment.architectures, range(experiment.students))
    for lesson in starmap(Lesson, product(*axes)):
        recipe, method = recipe_on(experiment, lesson.line), experiment.distillers.get(lesson.line)
        classes = course.steps[: lesson.step + 1]
        identity = {
            "data": [experiment.data, dict(experiment.data_args)],
            "classes": classes,
            "order": course.number,
            "method": [digests(method.configs), list(method.options), experiment.ipc] if method else JOINT,
            "architecture": lesson.architecture,
            "student": lesson.number,
            "recipe": asdict(recipe),
            "versions": versions,
        }
        name = f"order {course.number} {lesson.line} step {lesson.step + 1} {lesson.architecture} {lesson.number}"
        known = sum(map(len, classes))
        rows = experiment.ipc * known
        flops = step_flops(lesson.architecture, recipe, rows, known, image_shape)
        jobs.append(Job(name, identity, lesson, recipe.steps_for(rows, known), flops))
    return jobs


def _score(course: Course, lesson: Lesson, tick: Tick) -> Record:
    if lesson.line == JOINT:
        memory = course.joint_set(lesson.step)
    else:
        memory = DistilledSet.load(course.memory_file(lesson.line, lesson.step))
    real, seed = course.seen_data(lesson.step), course.seed("student", lesson.number)
    recipe, device = recipe_on(course.experiment, lesson.line), device_of(course.experiment.accelerator)
    scores = score_student(lesson.architecture, memory, real, recipe, seed, device)
    return {"images": len(memory) * memory.ipc // memory.shown_ipc, "class_names": list(memory.class_names), **scores}


def _mean(values: Sequence[Sequence[float]]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).mean(0).tolist()


def _print_accuracies(rows: Sequence[Row]) -> None:
    """Print one line per method and step, over all architectures."""
    for (line, step), own in grouped(rows, lambda row: (row.method, row.step)).items():
        accuracy = 100 * np.mean([row.accuracy for row in own])
        print(
            f"order {own[0].order}  {line:<12} step {step}: {own[0].classes} classes, {own[0].images} images, "
            f"accuracy {accuracy:.1f} %",
            flush=True,
        )
