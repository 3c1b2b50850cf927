"""Run a continual experiment: distil step by step, train students after each, report; resumable at every step."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_dd.applications.continual.course import Course
from lightning_dd.applications.continual.plan import JOINT, Method, Plan
from lightning_dd.applications.continual.report import Row, forgetting, markdown, write_report
from lightning_dd.applications.continual.students import score_student
from lightning_dd.data.registry import build_data
from lightning_dd.distilled.set import DistilledSet, library_versions
from lightning_dd.distilled.union import union
from lightning_dd.evaluators.ledger import Ledger
from lightning_dd.experiment import distil
from lightning_dd.models.factory import build_network
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable
from lightning_dd.utils.silence import quieten

UPPER_LINE = Method(JOINT, ())


def run_continual(methods: Sequence[Method], plan: Plan, output: Path | str) -> list[Row]:
    """Let classes come in steps; after each, distil its classes, unite the memory and train students from scratch.

    A step distils its own classes only, independently of earlier steps; nothing of later classes is used, and no real
    image of earlier ones. Every method's memory is scored with the same students' seeds on the same class orders.

    Everything finished is kept under ``output/order<s>/<method>/step<t>/`` (the distilled set and its run, the united
    memory, the students' scores): an interrupted experiment goes on where it stopped and ends with the same table, and
    orders, methods or students' settings can be changed or added later without distilling again.

    Args:
        methods: what fills the memory.
        plan: data, steps, budget and students.
        output: folder of the report and of all files.

    Returns:
        One row per method, architecture, order and step.

    Raises:
        UserError: a setting does not fit the data, a configuration is unusable, or the folder holds distillations with
            other settings.
    """
    folder = require_writable(output)
    quieten(bar_only=True)
    num_classes = _check_data(plan)
    courses = [Course(plan, order, num_classes, folder / f"order{order}") for order in range(plan.orders)]
    rows: list[Row] = []
    for course in courses:
        for method in (*methods, *([UPPER_LINE] if plan.joint else [])):
            records = []
            for step in range(plan.steps):
                start = time.perf_counter()
                record = _step_record(method, plan, course, step)
                records.append(record)
                _say(method, course, step, record, time.perf_counter() - start)
            rows += rows_of(method.name, course.number, records)
        paths = write_report(rows, folder)
    print(f"\n{markdown(rows)}\nreport: {folder}/results.md, .json, .csv; figure: {paths['png']}")
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


def _step_record(method: Method, plan: Plan, course: Course, step: int) -> dict[str, Any]:
    """Return the scores of one step: those on disk, or new ones."""
    place = course.folder / method.name / f"step{step + 1}"
    ledger, identity = Ledger(place / "scores"), _identity(method, plan, course, step)
    found = ledger.read(identity)
    if found is not None:
        return found
    memory = course.joint_set(step) if method is UPPER_LINE else _memory(method, plan, course, step)
    recipe = plan.joint if method is UPPER_LINE else plan.recipe
    assert recipe is not None
    scores = {
        architecture: [
            score_student(
                architecture,
                memory,
                course.seen_data(step),
                recipe,
                course.seed("student", number),
                plan.accelerator,
            )
            for number in range(plan.students)
        ]
        for architecture in plan.architectures
    }
    record = {"images": len(memory), "class_names": list(memory.class_names), "scores": scores}
    ledger.write(identity, record)
    return record


def _memory(method: Method, plan: Plan, course: Course, step: int) -> DistilledSet:
    """Distil a step's classes where that is not done yet, and unite them with those of the steps before."""
    base = course.folder / method.name
    for number in range(step + 1):
        overrides = [
            f"--seed_everything={course.seed('distil', number)}",
            f"--model.init_args.ipc={plan.ipc}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.limit_val_batches=0",  # the last outer step's set is taken, so no probe need be trained
            *([] if plan.accelerator == "auto" else [f"--trainer.accelerator={plan.accelerator}"]),
            *method.options,
        ]
        distil(method.configs, course.data_of(number), base / f"step{number + 1}", overrides)
    memory = union([DistilledSet.load(base / f"step{number + 1}" / "last.safetensors") for number in range(step + 1)])
    memory.save(base / f"step{step + 1}" / "memory.safetensors")
    return memory


def _identity(method: Method, plan: Plan, course: Course, step: int) -> dict[str, Any]:
    """Return everything the scores of a step depend on."""
    upper = method is UPPER_LINE
    recipe = plan.joint if upper else plan.recipe
    assert recipe is not None
    return {
        "data": [plan.data, plan.data_args],
        "classes": course.steps[: step + 1],
        "order": course.number,
        "configs": [hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest() for path in method.configs],
        "options": list(method.options),
        "ipc": None if upper else plan.ipc,
        "architectures": list(plan.architectures),
        "students": plan.students,
        "recipe": asdict(recipe),
        "versions": library_versions(),
    }


def _check_data(plan: Plan) -> int:
    """Return the number of classes, once data, budget and architectures are known to fit.

    Raises:
        UserError: they do not.
    """
    source = build_data(plan.data, plan.data_args, plan.root)
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


def _say(method: Method, course: Course, step: int, record: dict[str, Any], seconds: float) -> None:
    scores = [student["accuracy"] for students in record["scores"].values() for student in students]
    print(
        f"order {course.number}  {method.name:<12} step {step + 1}: {len(record['class_names'])} classes, "
        f"{record['images']} images, accuracy {100 * sum(scores) / len(scores):.1f} %  ({seconds:.0f} s)",
        flush=True,
    )
