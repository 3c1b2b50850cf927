"""Verbs that say what a distilled set is worth."""


def evaluate(
    files: list[str],
    architectures: list[str],
    output: str,
    seeds: int = 3,
    protocol: list[str] | str = "frepo",
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    augment: str | None = None,
    ema: float | None = None,
    root: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    workers: int = 1,
) -> None:
    """Train architectures x seeds on distilled sets and on random real images; print and write one table.

    Args:
        files: distilled-set files.
        architectures: names of the factory, as ``name`` or ``name:option=value,...``, or of groups: unseen-small,
            unseen, frepo-cross, zoo-small.
        output: folder of results.json, results.csv, results.md, results.png and the TensorBoard logs.
        seeds: students per architecture and source.
        protocol: published recipe: frepo, dc, dsa, mtt, glad, sre2l or rded; several make a matrix. The next five
            replace what it says.
        steps: training steps of a student.
        lr: peak learning rate of a student.
        batch_size: synthetic images per step, at most all.
        augment: operations joined by ``_``, ``auto`` for FRePo's, ``siamese`` for DSA's, ``none`` for none.
        ema: decay of an exponential moving average of the weights; 0 for none.
        root: folder of the real data on this machine.
        accelerator: Lightning's Trainer argument.
        devices: processes per student.
        strategy: Lightning's Trainer argument, ``ddp`` for several processes.
        workers: processes of this machine that train students side by side.
    """
    from lightning_dd.evaluators.evaluate import evaluate_files
    from lightning_dd.evaluators.matrix import Hardware
    from lightning_dd.students.protocols import protocol as published

    names = [protocol] if isinstance(protocol, str) else protocol
    changes = {"steps": steps, "lr": lr, "batch_size": batch_size, "augment": augment, "ema": ema}
    recipes = {name: published(name, **changes) for name in names}
    hardware = Hardware(accelerator, devices, strategy)
    evaluate_files(files, architectures, output, seeds, recipes, root, hardware, workers)


def scores(
    files: list[str],
    architectures: list[str],
    output: str,
    seeds: int = 3,
    protocol: str = "frepo",
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    augment: str | None = None,
    full_steps: int = 2000,
    full_lr: float = 1e-3,
    full_batch_size: int = 128,
    control: str | None = None,
    root: str | None = None,
    accelerator: str = "auto",
    workers: int = 1,
) -> None:
    """Score the images of distilled sets with the help of labels and of augmentation taken out (DD-Ranking).

    Args:
        files: distilled-set files.
        architectures: of the students, names of the factory or of groups.
        output: folder of results.json, results.csv, results.md and results.png.
        seeds: students per architecture and accuracy.
        protocol: published recipe of the students. The next four replace what it says.
        steps: training steps of a student.
        lr: its peak learning rate.
        batch_size: images per step, at most all.
        augment: operations joined by ``_``; ``auto``, ``siamese`` or ``none``.
        full_steps: training steps on the whole real training split.
        full_lr: their peak learning rate.
        full_batch_size: their images per step.
        control: random real images with soft labels of the same teacher, for sets with soft labels.
        root: folder of the real data on this machine.
        accelerator: Lightning's Trainer argument.
        workers: processes of this machine that train students side by side.
    """
    from lightning_dd.evaluators.matrix import Hardware
    from lightning_dd.evaluators.robustness import score_files
    from lightning_dd.students.protocols import protocol as published

    recipe = published(protocol, steps=steps, lr=lr, batch_size=batch_size, augment=augment)
    full = published("frepo", steps=full_steps, lr=full_lr, batch_size=full_batch_size, augment=recipe.augment)
    hardware = Hardware(accelerator)
    score_files(files, architectures, output, seeds, recipe, full, control, root, hardware, workers)
