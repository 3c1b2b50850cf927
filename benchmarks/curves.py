"""Record the validation curves of runs that are finished, or were stopped by the clock.

    lightning-dd fit --config cifar10/frepo --model.ipc 1 --model.lr 0.003 --trainer.max_steps 30000 \
        --trainer.val_check_interval 3000 --trainer.precision bf16-mixed --trainer.max_time 00:00:05:45 \
        --trainer.logger.init_args.save_dir runs/frepo_ipc1
    python benchmarks/curves.py full_width runs/frepo_ipc1 runs/frepo_ipc10 runs/dm_ipc10

A run is named by its folder. The rows go to ``benchmarks/results/<name>.json``; ``python benchmarks/tables.py`` writes
docs/results.md from them. Run it where the runs were made, for the hardware is written down, too.
"""

import argparse
from pathlib import Path
from typing import Any

from environment import environment, write_record

RESULTS = Path(__file__).parent / "results"


def row(folder: Path) -> dict[str, Any]:
    """Return a run's curve of validation accuracy by outer step, its outer steps and its minutes, by its event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    every = [event for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    times = [event.wall_time for event in every]
    return {
        "run": folder.name,
        "steps": max(event.step for event in every) + 1,
        "minutes": round((max(times) - min(times)) / 60, 1),
        "curve": [[event.step + 1, round(event.value, 4)] for event in events.Scalars("val/accuracy")],
    }


def main() -> None:
    """Read and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    write_record(str(RESULTS / f"{options.name}.json"), curves=[row(folder) for folder in options.runs])
    print(environment()["hardware"])


if __name__ == "__main__":
    main()
