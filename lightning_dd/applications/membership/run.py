"""Run a whole membership experiment: distil, train victims and shadow models, attack, report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lightning_dd.applications.membership.attacks import GRIDS, AttackResult, judge, learned_attack, threshold_attack
from lightning_dd.applications.membership.experiment import RANDOM, REAL, Experiment, Network
from lightning_dd.applications.membership.lira import lira, scaled_confidence
from lightning_dd.applications.membership.report import Row, markdown, write_report
from lightning_dd.applications.membership.victims import PoolScores, score_victim
from lightning_dd.applications.membership.workers import device_of, run_tasks
from lightning_dd.data import RealRows
from lightning_dd.evaluators.ledger import Ledger
from lightning_dd.models.factory import build_network
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable
from lightning_dd.utils.seeding import derive_seed
from lightning_dd.utils.silence import quieten

OWN = " (own images)"


@dataclass(frozen=True)
class Target:
    """A victim under attack, and the files of its answers and of its shadow models' answers."""

    victim: Network
    images: int
    scores: Path
    shadows: tuple[Path, ...]


def run_membership(experiment: Experiment, workers: int = 1) -> list[Row]:
    """Attack networks trained on the members, on random members and on distilled sets; write and print one table.

    Distilled sets, networks' answers and attacks each stay in a file of ``output``: the same command again does only
    what is missing, and gives the same table.

    Args:
        experiment: the settings.
        workers: processes that train and attack side by side, at least 1.

    Returns:
        One row per victim, training length and attack.

    Raises:
        UserError: a setting, a file, the data or the folder is unusable.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    require_writable(experiment.output)
    quieten(bar_only=True)
    _check(experiment)
    sources = _distil_all(experiment)
    networks = [
        Network(source, seed, index, shadow)
        for seed in range(experiment.seeds)
        for source in sources
        for shadow, count in ((False, experiment.victims), (True, experiment.has_shadows(source)))
        for index in range(count)
    ]
    tasks = {network: experiment.task(network) for network in networks}
    sizes = {network: len(task.train) for network, task in tasks.items()}
    paths = {network: task.path for network, task in tasks.items()}
    del tasks  # images of every set
    missing = [network for network in networks if PoolScores.load(paths[network]) is None]
    with tqdm(total=len(missing), unit="network", desc="victims and shadow models") as bar:
        run_tasks(partial(train_network, experiment), missing, workers, lambda: bar.update() and None)
    targets = [
        Target(
            network,
            sizes[network],
            paths[network],
            tuple(
                paths[other]
                for other in networks
                if other.shadow and (other.source, other.seed) == (network.source, network.seed)
            ),
        )
        for network in networks
        if not network.shadow
    ]
    open_ = [target for target in targets if _finished(experiment, target) is None]
    with tqdm(total=len(open_), unit="victim", desc="attacks") as bar:
        run_tasks(partial(attack_victim, experiment), open_, workers, lambda: bar.update() and None)
    rows = [Row(**record) for target in targets for record in _finished(experiment, target) or []]
    _report(rows, experiment)
    return rows


def train_network(experiment: Experiment, network: Network) -> None:
    """Train one victim or shadow model and keep its answers."""
    task = experiment.task(network)
    logits, losses = score_victim(
        task.train,
        task.images,
        task.labels,
        experiment.architecture,
        task.recipe,
        task.augmentation,
        experiment.lengths,
        task.seed,
        device_of(experiment.accelerator),
    )
    labels, inside, held_out = (part.numpy() for part in (task.labels, task.inside, task.held_out))
    PoolScores(np.array(experiment.lengths), logits, losses, labels, inside, held_out).save(task.path)


def attack_victim(experiment: Experiment, target: Target) -> None:
    """Run every attack on one victim at every length and keep the rows.

    A victim of a few random members is attacked twice: for all members, as the others are, and for the few it was
    trained on, which tells what using them as they are costs those few.
    """
    victim = _loaded(target.scores)
    shadows = [_loaded(path) for path in target.shadows]
    records = _attack_members(experiment, target, victim, shadows)
    if target.victim.source.startswith(RANDOM):
        inside = np.zeros_like(victim.inside)
        inside[experiment.real_rows(target.victim).numpy()] = True
        own = replace(target, victim=replace(target.victim, source=f"{target.victim.source}{OWN}"))
        # Shadow models drew other images, so there are hardly any that learned from these.
        records += _attack_members(experiment, own, replace(victim, inside=inside), [])
    Ledger(experiment.output / "attacks").write(_identity(experiment, target), {"rows": records})


def _attack_members(
    experiment: Experiment, target: Target, victim: PoolScores, shadows: Sequence[PoolScores]
) -> list[dict[str, Any]]:
    records = []
    for index, steps in enumerate(victim.lengths):
        members, others = victim.at(index)
        accuracy, member_accuracy = (float((part.logits.argmax(1) == part.labels).mean()) for part in (others, members))
        for attack in experiment.attacks:
            if attack == "lira" and not shadows:
                continue
            if attack in GRIDS and min(len(members), len(others)) < 4 * experiment.folds:
                continue
            result = _attack(attack, victim, shadows, index, experiment)
            row = Row(
                source=target.victim.source,
                seed=target.victim.seed,
                victim=target.victim.index,
                images=target.images,
                steps=int(steps),
                accuracy=accuracy,
                member_accuracy=member_accuracy,
                attack=attack,
                auc=result.auc,
                tpr_at_01_percent=result.tpr_at[0.001],
                tpr_at_1_percent=result.tpr_at[0.01],
                members=result.members,
                non_members=result.non_members,
            )
            records.append(asdict(row))
    return records


def _attack(
    attack: str, victim: PoolScores, shadows: Sequence[PoolScores], index: int, experiment: Experiment
) -> AttackResult:
    members, others = victim.at(index)
    if attack == "threshold":
        return threshold_attack(members.losses, others.losses)
    if attack == "lira":
        return _lira(victim, shadows, index)
    seed = derive_seed(int(victim.lengths[index]), "attack", attack) % 2**31
    return learned_attack(attack, members, others, seed, experiment.folds, rows=experiment.attack_rows)


def _lira(victim: PoolScores, shadows: Sequence[PoolScores], index: int) -> AttackResult:
    """Score members and held-out images by shadow models of the same length."""
    phi = scaled_confidence(victim.logits[index], victim.labels)
    others = np.stack([scaled_confidence(shadow.logits[index], shadow.labels) for shadow in shadows])
    inside = np.stack([shadow.inside for shadow in shadows])
    used = victim.inside | victim.held_out
    scores = np.full(phi.shape, np.nan)
    scores[used] = lira(phi[used], others[:, used], inside[:, used])
    return judge(scores[victim.inside & ~victim.held_out], scores[victim.held_out])


def _check(experiment: Experiment) -> None:
    """Find out what is wrong with data and networks before anything is trained."""
    for seed in range(experiment.seeds):
        data = RealRows(**experiment.part_args(seed))
        if seed == 0:
            data.prepare_data()
        pool = data.pool()
    channels, height, width = pool.images.shape[1:]
    build_network(experiment.architecture, len(pool.class_names), (channels, height, width), seed=0)
    smaller = min(experiment.members, len(pool.labels) - experiment.members, experiment.attack_rows)
    if set(experiment.attacks) - {"threshold", "lira"} and not 8 <= 4 * experiment.folds <= smaller:
        raise UserError(
            f"folds must be at least 2 with 4 * folds members, held-out images and attack_rows, got {experiment.folds} "
            f"folds for {smaller}"
        )


def _distil_all(experiment: Experiment) -> list[str]:
    """Distil every method for every seed and shadow model; return the sources of victims."""
    sizes: dict[int, None] = {}
    for method in experiment.methods:
        for seed in range(experiment.seeds):
            halves = [None, *range(experiment.has_shadows(method))]
            for half in halves:
                distilled = experiment.distil(method, seed, half)
                sizes[distilled.ipc] = None
    return [REAL, *(f"{RANDOM}, ipc {ipc}" for ipc in sizes), *experiment.methods]


def _identity(experiment: Experiment, target: Target) -> dict[str, Any]:
    return {
        "victim": [target.victim.source, target.victim.seed, target.victim.index, target.scores.stem],
        "shadows": [path.stem for path in target.shadows],
        "attacks": list(experiment.attacks),
        "folds": experiment.folds,
        "attack_rows": experiment.attack_rows,
    }


def _finished(experiment: Experiment, target: Target) -> list[dict[str, Any]] | None:
    record = Ledger(experiment.output / "attacks").read(_identity(experiment, target))
    return None if record is None else list(record["rows"])


def _loaded(path: Path) -> PoolScores:
    scores = PoolScores.load(path)
    if scores is None:
        raise UserError(f"'{path}' has disappeared or is damaged: run the same command again")
    return scores


def _report(rows: Sequence[Row], experiment: Experiment) -> None:
    without = [name for name in experiment.methods if not experiment.has_shadows(name)]
    notes = []
    if "lira" in experiment.attacks and without:
        notes.append(
            f"No LiRA for {', '.join(without)}: every shadow model needs a distillation of its own half of the pool "
            "(`distil_shadows`), which a finished file cannot give."
        )
    if any(row.source.endswith(OWN) for row in rows):
        notes.append(f"`{OWN.strip()}`: members are the few images the victim was trained on, not all they stand for.")
    paths = write_report(rows, experiment.output, notes)
    print(f"\n{markdown(rows, notes)}\nreport: {experiment.output}/results.md, .json, .csv; figure: {paths['png']}")
