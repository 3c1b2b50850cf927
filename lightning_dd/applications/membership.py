"""Membership inference: distil, train victims and shadow models, attack them, report who was in the data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dd.applications import Membership, attacks
from lightning_dd.applications.attacks import GRIDS, Array, AttackResult
from lightning_dd.applications.membership_report import Row, markdown, privacy_figure
from lightning_dd.applications.victims import (
    RANDOM,
    REAL,
    Network,
    PoolScores,
    distil_members,
    job_of,
    part,
    real_rows,
    recipe_on,
    train_network,
)
from lightning_dd.jobs import ArrayLedger, Job, Ledger, Record, Tick, check_workers, run_jobs, workers_on
from lightning_dd.models.factory import build_network
from lightning_dd.report import write_results
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable
from lightning_dd.utils.seeding import derive_seed
from lightning_dd.utils.silence import quiet_trainers

OWN = " (own images)"


@dataclass(frozen=True)
class Target:
    """A victim under attack, and the identities of its answers and of its shadow models' answers."""

    victim: Network
    scores: Mapping[str, Any]
    shadows: tuple[Mapping[str, Any], ...]


@quiet_trainers()
def run_membership(experiment: Membership) -> list[Row]:
    """Attack networks trained on the members, on random members and on distilled sets; write and print one table.

    Distilled sets, networks' answers and attacks each stay in a file of ``output``: the same command again does only
    what is missing, and gives the same table.

    Returns:
        One row per victim, training length and attack; nothing on processes that do not write the report.

    Raises:
        UserError: a setting, a file, the data or the folder is unusable.
    """
    check_workers(experiment.workers)
    folder = require_writable(experiment.output)
    _check(experiment)
    sources = _distil_all(experiment)
    networks = [
        Network(source, seed, index, shadow)
        for seed in range(experiment.seeds)
        for source in sources
        for shadow, count in ((False, experiment.victims), (True, _shadows_of(experiment, source)))
        for index in range(count)
    ]
    jobs = {network: job_of(experiment, network) for network in networks}
    workers = workers_on(experiment.accelerator, experiment.workers)
    run_jobs(list(jobs.values()), partial(train_network, experiment), _answers(experiment), workers, unit="step")
    targets = [_attack_job(experiment, network, jobs) for network in networks if not network.shadow]
    ledger = Ledger(folder / "attacks")
    if not run_jobs(targets, partial(attack_victim, experiment), ledger, workers, unit="victim"):
        return []
    rows = [Row(**record) for job in targets for record in ledger.need(job.identity)["rows"]]
    table = markdown(rows, _notes(rows, experiment))
    write_results(folder, [asdict(row) for row in rows], table, privacy_figure(rows))
    return rows


def attack_victim(experiment: Membership, target: Target, tick: Tick) -> Record:
    """Run every attack on one victim at every length and return the rows.

    A victim of a few random members is attacked twice: for all members, as the others are, and for the few it was
    trained on, which tells what using them as they are costs those few.
    """
    answers = _answers(experiment)
    victim, *shadows = (PoolScores(**answers.need(identity)) for identity in (target.scores, *target.shadows))
    records = _attack_members(experiment, target.victim, victim, shadows)
    if target.victim.source.startswith(RANDOM):
        inside = np.zeros_like(victim.inside)
        inside[real_rows(experiment, target.victim).numpy()] = True
        own = replace(target.victim, source=f"{target.victim.source}{OWN}")
        # Shadow models drew other images, so there are hardly any that learned from these.
        records += _attack_members(experiment, own, replace(victim, inside=inside), [])
    return {"rows": records}


def _answers(experiment: Membership) -> ArrayLedger:
    return ArrayLedger(Path(experiment.output) / "networks")


def _attack_members(
    experiment: Membership, network: Network, victim: PoolScores, shadows: Sequence[PoolScores]
) -> list[dict[str, Any]]:
    records = []
    sides = [np.flatnonzero(victim.inside & ~victim.held_out), np.flatnonzero(victim.held_out)]
    for index, steps in enumerate(victim.lengths):
        right = victim.logits[index].argmax(1) == victim.labels
        member_accuracy, accuracy = (float(right[rows].mean()) for rows in sides)
        for attack in experiment.attacks:
            if attack == "lira" and not shadows:
                continue
            if attack in GRIDS and min(map(len, sides)) < 4 * experiment.folds:
                continue
            result = _attack(attack, victim, shadows, index, sides, experiment)
            row = Row(
                source=network.source,
                seed=network.seed,
                victim=network.index,
                images=int(victim.images[0]),
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
    attack: str,
    victim: PoolScores,
    shadows: Sequence[PoolScores],
    index: int,
    sides: Sequence[Array],
    experiment: Membership,
) -> AttackResult:
    """Make an attack on a victim after its index-th length, for members and non-members at these places of the pool."""
    logits, losses = victim.logits[index], victim.losses[index]
    if attack == "threshold":
        return attacks.threshold_attack(*(losses[rows] for rows in sides))
    if attack == "lira":
        own = attacks.scaled_confidence(logits, victim.labels)
        others = np.stack([attacks.scaled_confidence(shadow.logits[index], shadow.labels) for shadow in shadows])
        inside = np.stack([shadow.inside for shadow in shadows])
        used = np.concatenate(sides)
        scores = attacks.lira(own[used], others[:, used], inside[:, used])
        return attacks.judge(scores[: len(sides[0])], scores[len(sides[0]) :])
    seed = derive_seed(int(victim.lengths[index]), "attack", attack) % 2**31
    members, others = (np.column_stack([logits[rows], losses[rows]]) for rows in sides)
    return attacks.learned_attack(attack, members, others, seed, experiment.folds, experiment.attack_rows)


def _check(experiment: Membership) -> None:
    """Find out what is wrong with data and networks before anything is trained."""
    for source in (REAL, RANDOM):
        recipe_on(experiment, source).augmentation(mirror=True)  # refuses an unknown operation
    data = part(experiment, experiment.seeds - 1)  # which needs the most images
    data.prepare_data()
    images, labels, names = data.pool()
    channels, height, width = images.shape[1:]
    build_network(experiment.architecture, len(names), (channels, height, width), seed=0)
    smaller = min(experiment.members, len(labels) - experiment.members, experiment.attack_rows)
    if set(experiment.attacks) & set(GRIDS) and not 8 <= 4 * experiment.folds <= smaller:
        raise UserError(
            f"folds must be at least 2 with 4 * folds members, held-out images and attack_rows, got {experiment.folds} "
            f"folds for {smaller}"
        )


def _distil_all(experiment: Membership) -> list[str]:
    """Distil every method for every seed and shadow model; return the sources of victims."""
    files_first = sorted(experiment.distillers, key=lambda name: not experiment.distillers[name].files)
    sizes = dict.fromkeys(
        distil_members(experiment, method, seed, half).ipc
        for method in files_first  # a wrong one is refused before anything is distilled
        for seed in range(experiment.seeds)
        for half in (None, *range(_shadows_of(experiment, method)))
    )
    return [REAL, *(f"{RANDOM}, ipc {ipc}" for ipc in sizes), *experiment.distillers]


def _shadows_of(experiment: Membership, source: str) -> int:
    """Return the number of shadow models a source's victims are attacked with."""
    if "lira" not in experiment.attacks:
        return 0
    if source not in experiment.distillers:
        return experiment.shadows
    return 0 if experiment.distillers[source].files else experiment.distil_shadows


def _attack_job(experiment: Membership, victim: Network, jobs: Mapping[Network, Job]) -> Job:
    shadows = tuple(
        job.identity
        for network, job in jobs.items()
        if network.shadow and (network.source, network.seed) == (victim.source, victim.seed)
    )
    identity = {
        "victim": [victim.source, victim.seed, victim.index, jobs[victim].identity],
        "shadows": shadows,
        "attacks": experiment.attacks,
        "folds": experiment.folds,
        "attack_rows": experiment.attack_rows,
    }
    flops = 5e10 * len(experiment.attacks) * len(experiment.lengths)  # a second or so for each attack and length
    target = Target(victim, jobs[victim].identity, shadows)
    return Job(f"attacks on {jobs[victim].name}", identity, target, flops=flops)


def _notes(rows: Sequence[Row], experiment: Membership) -> list[str]:
    without = [name for name in experiment.distillers if not _shadows_of(experiment, name)]
    notes = []
    if "lira" in experiment.attacks and without:
        notes.append(
            f"No LiRA for {', '.join(without)}: every shadow model needs a distillation of its own half of the pool, "
            "which `distil_shadows` asks for, and which a finished file cannot give."
        )
    if any(row.source.endswith(OWN) for row in rows):
        notes.append(f"`{OWN.strip()}`: members are the few images the victim was trained on, not all they stand for.")
    return notes
