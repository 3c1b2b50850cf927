"""Run a continual experiment: distil step by step, train students after each, report; resumable at every step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_dd.applications.continual.course import Course
from lightning_dd.applications.continual.plan import JOINT, Plan
from lightning_dd.applications.continual.report import Row, forgetting, markdown, write_report
from lightning_dd.applications.continual.students import score_student
from lightning_dd.data.registry import build_data
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.distilled.union import union
from lightning_dd.experiment import Method, digests, distil
from lightning_dd.jobs import Job, Ledger, Tick, check_workers, device_of, run_jobs
from lightning_dd.models.factory import build_network
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable
from lightning_dd.utils.silence import quiet_trainers


@dataclass(frozen=True)
class Lesson:
    """One student of one step."""

    method: str
    """The name of a method, or :data:`~lightning_dd.applications.continual.plan.JOINT`."""
    step: int
    architecture: str
    number: int


@quiet_trainers()
def run_continual(methods: Mapping[str, Method], plan: Plan, output: Path | str, workers: int | str = 1) -> list[Row]:
    """Let classes come in steps; after each, distil its classes, unite the memory and train students from scratch.

    A step distils its own classes only, independently of earlier steps; nothing of later classes is used, and no real
    image of earlier ones. Every method's memory is scored with the same students' seeds on the same class orders.

    Everything finished is kept: distilled sets with their runs and the united memory under
    ``output/order<s>/<method>/step<t>/``, students' scores in ``output/students``. An interrupted experiment goes on
    where it stopped and ends with the same table, and orders, methods or students' settings can be changed or added
    later without distilling again.

    Args:
        methods: what fills the memory, by name.
        plan: data, steps, budget and students.
        output: folder of the report and of all files.
        workers: processes that train students side by side, at least 1; ``auto`` for one per core.

    Returns:
        One row per method, architecture, order and step; nothing on processes that do not write the report.

    Raises:
        UserError: a setting does not fit the data, a configuration is unusable, or the folder holds distillations with
            other settings.
    """
    check_workers(workers)
    if not methods or JOINT in methods:
        raise UserError(f"methods: name at least one, as name: [file.yaml, --option=value], and none '{JOINT}'")
    folder = require_writable(output)
    num_classes = _check_data(plan)
    names = [*methods, *([JOINT] if plan.joint else [])]
    courses = [Course(plan, order, num_classes, folder / f"order{order}") for order in range(plan.orders)]
    ledger, rows = Ledger(folder / "students"), list[Row]()
    for course in courses:
        for method in methods.values():
            for step in range(plan.steps):
                _memory(method, plan, course, step)
        jobs = {lesson: _job(lesson, methods, plan, course) for lesson in _lessons(names, plan)}
        if not run_jobs(list(jobs.values()), partial(_score, plan, course), ledger, workers, unit="step"):
            continue
        for name in names:
            found = {lesson: ledger.need(job.identity) for lesson, job in jobs.items() if lesson.method == name}
            records = [_step_record(found, name, step, plan) for step in range(plan.steps)]
            _say(name, course, records)
            rows += rows_of(name, course.number, records)
        write_report(rows, folder)
    if rows:
        print(f"\n{markdown(rows)}\nreport: {folder}/results.md, .json, .csv; figure: {folder}/results.png")
        print(f"curves: tensorboard --logdir {folder / 'tensorboard'}")
    return rows


def rows_of(method: str, order: int, records: Sequence[dict[str, Any]]) -> list[Row]:
    """Turn the records of all steps of one order into rows, one per architecture and step."""
    rows = []
    for architecture in records[0]["scores"]:
        scores = [record["scores"][architecture] for record in records]
        by_class = [_mean([student["class_accuracy"] for student in students]) for students in scores]
        for step, (record, students, lost) in enumerate(zip(records, scores, forgetting(by_class), strict=True)):
            accuracies = tuple(student["accuracy"] for student in students)
            rows.append(
                Row(
                    method=method,
                    architecture=architecture,
                    order=order,
                    step=step + 1,
                    classes=len(record["class_names"]),
                    images=record["images"],
                    accuracy=_mean([[value] for value in accuracies])[0],
                    forgetting=lost,
                    students=accuracies,
                    class_accuracy=dict(zip(record["class_names"], by_class[step], strict=True)),
                )
            )
    return rows


def _lessons(names: Sequence[str], plan: Plan) -> list[Lesson]:
    return [
        Lesson(name, step, architecture, number)
        for name in names
        for step in range(plan.steps)
        for architecture in plan.architectures
        for number in range(plan.students)
    ]


def _job(lesson: Lesson, methods: Mapping[str, Method], plan: Plan, course: Course) -> Job:
    """Return a student as a job, with everything its scores depend on."""
    recipe, method = _recipe(lesson, plan), methods.get(lesson.method)
    images = plan.ipc * len(course.seen(lesson.step))
    identity = {
        "data": [plan.data.name, dict(plan.data.arguments)],
        "classes": course.steps[: lesson.step + 1],
        "order": course.number,
        "method": [digests(method.configs), list(method.options), plan.ipc] if method else JOINT,
        "architecture": lesson.architecture,
        "student": lesson.number,
        "recipe": asdict(recipe),
        "versions": library_versions(),
    }
    name = f"order {course.number} {lesson.method} step {lesson.step + 1} {lesson.architecture} {lesson.number}"
    return Job(name, identity, lesson, recipe.steps_for(images))


def _recipe(lesson: Lesson, plan: Plan) -> Recipe:
    return plan.joint if lesson.method == JOINT and plan.joint else plan.recipe


def _score(plan: Plan, course: Course, lesson: Lesson, tick: Tick) -> dict[str, Any]:
    """Train and test one student."""
    if lesson.method == JOINT:
        memory = course.joint_set(lesson.step)
    else:
        memory = DistilledSet.load(course.memory_file(lesson.method, lesson.step))
    real, seed = course.seen_data(lesson.step), course.seed("student", lesson.number)
    device = device_of(plan.accelerator)
    scores = score_student(lesson.architecture, memory, real, _recipe(lesson, plan), seed, device)
    return {"images": len(memory), "class_names": list(memory.class_names), **scores}


def _step_record(found: Mapping[Lesson, dict[str, Any]], name: str, step: int, plan: Plan) -> dict[str, Any]:
    """Put the scores of a method's students of one step together."""
    scores = {
        architecture: [found[Lesson(name, step, architecture, number)] for number in range(plan.students)]
        for architecture in plan.architectures
    }
    first = scores[plan.architectures[0]][0]
    return {"images": first["images"], "class_names": first["class_names"], "scores": scores}


def _memory(method: Method, plan: Plan, course: Course, step: int) -> None:
    """Distil a step's classes, and unite them with those of the steps before, where that is not done yet."""
    path, start = course.memory_file(method.name, step), time.perf_counter()
    overrides = [
        f"--seed_everything={course.seed('distil', step)}",
        f"--model.init_args.ipc={plan.ipc}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.limit_val_batches=0",  # the last outer step's set is taken, so no probe need be trained
        *([] if plan.accelerator == "auto" else [f"--trainer.accelerator={plan.accelerator}"]),
        *method.options,
    ]
    distil(method.configs, course.data_of(step), path.parent, overrides)
    if not path.is_file():
        parts = [course.memory_file(method.name, number).with_name("last.safetensors") for number in range(step + 1)]
        union([DistilledSet.load(part) for part in parts]).save(path)
        seconds = time.perf_counter() - start
        print(f"order {course.number}  {method.name:<12} step {step + 1}: distilled in {seconds:.0f} s", flush=True)


def _check_data(plan: Plan) -> int:
    """Return the number of classes, once data, budget and architectures are known to fit.

    Raises:
        UserError: they do not.
    """
    source = build_data(str(plan.data.name), plan.data.arguments, plan.data.root)
    source.prepare_data()
    images, labels, names = source.read(train=True)
    kept, _ = source._split(labels)
    sizes = torch.bincount(labels[kept], minlength=len(names))
    smallest = int(sizes.argmin())
    if int(sizes[smallest]) < plan.ipc:
        raise UserError(
            f"ipc={plan.ipc} is more than the {int(sizes[smallest])} training images of class '{names[smallest]}'; "
            f"the largest possible ipc is {int(sizes[smallest])}"
        )
    for architecture in plan.architectures:
        build_network(architecture, len(names), (images.shape[1], images.shape[2], images.shape[3]), seed=0)
    return len(names)


def _mean(values: Sequence[Sequence[float]]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).mean(0).tolist()


def _say(name: str, course: Course, records: Sequence[dict[str, Any]]) -> None:
    for step, record in enumerate(records, start=1):
        scores = [student["accuracy"] for students in record["scores"].values() for student in students]
        print(
            f"order {course.number}  {name:<12} step {step}: {len(record['class_names'])} classes, "
            f"{record['images']} images, accuracy {100 * sum(scores) / len(scores):.1f} %",
            flush=True,
        )
