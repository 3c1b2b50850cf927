"""What a distilled set says of itself, for people."""

from pathlib import Path
from typing import Any

from lightning_dd.distilled.packing import packed
from lightning_dd.distilled.set import DistilledSet


def facts_of(distilled: DistilledSet, path: Path | None = None) -> dict[str, str]:
    """Return what there is to know of a set, each fact in one line, by its name.

    Args:
        distilled: the set.
        path: its file, whose size is said.
    """
    training, run = distilled.training, distilled.run
    trainer = run.get("trainer", {})
    found = {
        "set": f"{distilled.method}: {distilled.num_classes} classes x {distilled.ipc} images of "
        f"{'x'.join(map(str, distilled.image_shape))}" + distilled.shown_as,
        "classes": _few(distilled.class_names),
        "labels": f"{distilled.label_kind}; train with distilled.loss: {distilled.loss_name}",
        "preprocessing": f"{distilled.preprocessing}, in distilled.test_transform",
        "data": f"{distilled.data.get('name', 'unknown')}, fingerprint {distilled.data.get('fingerprint', 'unknown')}",
        "network": str(distilled.architecture or "none"),
        "callbacks": "; ".join(map(_called, trainer.get("callbacks+", []))) or ("none" if run else "unknown"),
        "trainer": ", ".join(f"{name} {value}" for name, value in trainer.items() if name != "callbacks+") or "unknown",
        "score": ", ".join(f"{name} {value:.4g}" for name, value in training.items() if isinstance(value, float)),
        "written at": f"outer step {training.get('outer_step', 'unknown')}, seed {training.get('seed', 'unknown')}",
        "relabelled": _called_labels(training.get("relabelled")),
        "made with": ", ".join(f"{name} {version}" for name, version in training.get("versions", {}).items())
        + (f", commit {training['commit']}" if training.get("commit") else ""),
        "bytes": sizes(distilled, path),
    }
    return {name: text for name, text in found.items() if text}


def _few(names: tuple[str, ...], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _called(said: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in said.get("init_args", {}).items())
    return f"{said['class_path'].rpartition('.')[2]}({arguments})"


def _called_labels(said: Any) -> str:
    return f"after the run, from {said['from']['label_kind']} labels" if isinstance(said, dict) else ""


def sizes(distilled: DistilledSet, path: Path | None = None) -> str:
    """Say how many bytes a set takes, and what takes them."""
    parts = {
        "images": distilled.image_bytes,
        "labels": distilled.labels.nbytes,
        "views": sum(part.nbytes for part in distilled.views.state_dict().values()) if distilled.views else 0,
    }
    whole = f"{path.stat().st_size:,}: " if path else ""
    inside = [f"{name} {size:,}" for name, size in parts.items() if size]
    if distilled.preprocessing.kind == "zca":
        matrices = sum(part.nbytes for part in packed(distilled.preprocessing, distilled.images).values())
        inside.append(f"whitening {matrices:,} (preprocessing standardise needs none)")
    return whole + ", ".join(inside)
