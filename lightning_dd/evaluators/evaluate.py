"""Run a whole evaluation with one progress bar."""

from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm

from lightning_dd.data.distilled import DistilledSet
from lightning_dd.errors import UserError
from lightning_dd.evaluators.data import check_match, real_data_of
from lightning_dd.evaluators.matrix import Hardware, Row, cells_of, run_cell
from lightning_dd.evaluators.report import markdown, write_report
from lightning_dd.files import require_writable
from lightning_dd.models.factory import build_network
from lightning_dd.quiet import quieten
from lightning_dd.recipe import Recipe


def evaluate_files(
    files: Sequence[str],
    architectures: Sequence[str],
    output: str,
    seeds: int,
    recipe: Recipe,
    root: str | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008  (frozen)
) -> list[Row]:
    """Train every architecture and seed on every set and on random real images, and write the report.

    Everything that can be wrong is looked at before the first student is trained.

    Args:
        files: distilled-set files; a set is named by its file, without the suffix.
        architectures: names of the factory.
        output: folder of the report.
        seeds: students per architecture and source, at least 1.
        recipe: how students are trained.
        root: folder of the real data on this machine.
        hardware: where students are trained.

    Returns:
        One row per student.

    Raises:
        UserError: a file, an architecture, the data or the folder is unusable.
    """
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if not files or not architectures:
        raise UserError("evaluate needs at least one file and one architecture")
    folder = require_writable(output)
    sets = _load(files)
    for distilled in sets.values():
        for architecture in architectures:
            build_network(architecture, distilled.num_classes, distilled.image_shape, seed=0)
    reals = {}
    for name, distilled in sets.items():
        reals[name] = real_data_of(distilled, root)
        reals[name].use_preprocessing(distilled.preprocessing)
        reals[name].prepare_data()
        reals[name].setup("test")
        check_match(distilled, reals[name])
    quieten(bar_only=True)
    first = not getattr(rank_zero_only, "rank", 0)  # the processes of one student all come here
    rows = []
    cells = cells_of(list(sets), architectures, seeds)
    steps = {name: recipe.steps_for(len(distilled)) for name, distilled in sets.items()}
    with tqdm(total=sum(steps[cell.set_name] for cell in cells), unit="step", smoothing=0.05, disable=not first) as bar:
        for cell in cells:
            bar.set_description(f"{cell.architecture} {cell.source} {cell.seed}")
            rows.append(
                run_cell(
                    cell,
                    sets[cell.set_name],
                    reals[cell.set_name],
                    recipe,
                    hardware,
                    folder / "tensorboard",
                    lambda: bar.update() and None,
                )
            )
    if not first:
        return rows
    paths = write_report(rows, folder)
    print(f"\n{markdown(rows)}\nreport: {folder}/results.md, .json, .csv; figure: {paths['png']}")
    print(f"student curves: tensorboard --logdir {folder / 'tensorboard'}")
    return rows


def _load(files: Sequence[str]) -> dict[str, DistilledSet]:
    sets: dict[str, DistilledSet] = {}
    for file in files:
        name = Path(file).stem
        if name in sets:
            name = f"{Path(file).parent.name}-{name}"
        if name in sets:
            raise UserError(f"two files give the same set name '{name}': rename one")
        sets[name] = DistilledSet.load(file)
    return sets
