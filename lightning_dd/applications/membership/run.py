"""Run a whole membership experiment: distil, train victims and shadow models, attack, report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lightning_dd.applications.membership.attacks import GRIDS, AttackResult, judge, learned_attack, threshold_attack
from lightning_dd.applications.membership.experiment import RANDOM, REAL, Experiment, Network
from lightning_dd.applications.membership.lira import lira, scaled_confidence
from lightning_dd.applications.membership.report import Row, markdown, write_report
from lightning_dd.applications.membership.victims import PoolScores
from lightning_dd.data import RealRows
from lightning_dd.jobs import ArrayLedger, Job, Ledger, Tick, check_workers, run_jobs
from lightning_dd.models.factory import build_network
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
def run_membership(experiment: Experiment, workers: int | str = 1) -> list[Row]:
    """Attack networks trained on the members, on random members and on distilled sets; write and print one table.

    Distilled sets, networks' answers and attacks each stay in a file of ``output``: the same command again does only
    what is missing, and gives the same table.

    Args:
        experiment: the settings.
        workers: processes that train and attack side by side, at least 1; ``auto`` for one per core.

    Returns:
        One row per victim, training length and attack; nothing on processes that do not write the report.

    Raises:
        UserError: a setting, a file, the data or the folder is unusable.
    """
    check_workers(workers)
    require_writable(experiment.output)
    _check(experiment)
    sources = _distil_all(experiment)
    networks = [
        Network(source, seed, index, shadow)
        for seed in range(experiment.seeds)
        for source in sources
        for shadow, count in ((False, experiment.victims), (True, experiment.has_shadows(source)))
        for index in range(count)
    ]
    jobs = {network: experiment.job(network) for network in networks}
    run_jobs(list(jobs.values()), experiment.train, _answers(experiment), workers, unit="step")
    attacks = [_attack_job(experiment, network, jobs) for network in networks if not network.shadow]
    ledger = Ledger(experiment.output / "attacks")
    if not run_jobs(attacks, partial(attack_victim, experiment), ledger, workers, unit="victim"):
        return []
    rows = [Row(**record) for job in attacks for record in ledger.need(job.identity)["rows"]]
    _report(rows, experiment)
    return rows


def attack_victim(experiment: Experiment, target: Target, tick: Tick) -> dict[str, Any]:
    """Run every attack on one victim at every length and return the rows.

    A victim of a few random members is attacked twice: for all members, as the others are, and for the few it was
    trained on, which tells what using them as they are costs those few.
    """
    answers = _answers(experiment)
    victim, *shadows = (PoolScores(**answers.need(identity)) for identity in (target.scores, *target.shadows))
    records = _attack_members(experiment, target.victim, victim, shadows)
    if target.victim.source.startswith(RANDOM):
        inside = np.zeros_like(victim.inside)
        inside[experiment.real_rows(target.victim).numpy()] = True
        own = replace(target.victim, source=f"{target.victim.source}{OWN}")
        # Shadow models drew other images, so there are hardly any that learned from these.
        records += _attack_members(experiment, own, replace(victim, inside=inside), [])
    return {"rows": records}


def _answers(experiment: Experiment) -> ArrayLedger:
    return ArrayLedger(experiment.output / "networks")


def _attack_members(
    experiment: Experiment, network: Network, victim: PoolScores, shadows: Sequence[PoolScores]
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


def _attack_job(experiment: Experiment, victim: Network, jobs: Mapping[Network, Job]) -> Job:
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
    return Job(f"attacks on {jobs[victim].name}", identity, Target(victim, jobs[victim].identity, shadows))


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
