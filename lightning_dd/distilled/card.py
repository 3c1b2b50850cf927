"""What a distilled set says of itself, for people."""

import hashlib
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from lightning_dd.cells import cells_of
from lightning_dd.distilled.packing import packed
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.utils.errors import UserError, first_line, printable


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


def data_card(distilled: DistilledSet, path: Path, licence: str, report: Path | None = None) -> str:
    """Return the card of a set on a hub, in Markdown: what it is, how to use it, how it scores, how it was made.

    Args:
        distilled: the set.
        path: its file.
        licence: of the real data, as hubs name it (``cc-by-4.0``); ``unknown`` says so.
        report: folder of an evaluation, whose rows of this file are shown.

    Raises:
        UserError: the report is none, or not of this file.
    """
    name = distilled.data.get("name", "unknown data")
    facts = "\n".join(f"- **{key}**: {printable(text)}" for key, text in facts_of(distilled, path).items())
    cells = [cell for cell in cells_of(distilled.method, str(name)) if cell.ipc == distilled.ipc]
    published = "".join(f"- **published cell**: {cell.name}, {cell.accuracy} % in {cell.source}\n" for cell in cells)
    run = yaml.safe_dump(distilled.run, sort_keys=False, allow_unicode=True) if distilled.run else "# unknown\n"
    return f"""---
license: {json.dumps("other" if licence == "unknown" else licence)}
tags: [dataset-distillation, lightning_dd]
task_categories: [image-classification]
---
# {printable(distilled.method)} of {printable(str(name))}, {distilled.ipc} image(s) per class

A distilled set of [lightning_dd]: a few images that networks are trained on in place of the real ones.

```python
from lightning_dd import DistilledSet

distilled = DistilledSet.load("distilled.safetensors")  # train with distilled.loss on distilled.images and .labels
```

{facts}
{published}- **licence of the real data**: {licence}

{_scores(path, report)}The whole run, as `lightning-dd fit --config run.yaml` takes it:

```yaml
{run}```
"""


def _scores(path: Path, report: Path | None) -> str:
    """Return the mean accuracies of a report's students on this file, by architecture; nothing without a report."""
    if report is None:
        return ""
    try:
        made_with = json.loads((report / "provenance.json").read_text(encoding="utf-8"))
        rows = json.loads((report / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"report '{report}': no report of evaluate ({first_line(error)})") from None
    digest = hashlib.blake2b(path.read_bytes()).hexdigest()
    names = [name for name, said in made_with["sets"].items() if said["blake2b"] == digest]
    own = [row for row in rows if row["set"] in names]
    if not own:
        raise UserError(f"report '{report}' is of other files than '{path}'")
    lines = ["| architecture | seen | distilled | random real |", "| --- | --- | --- | --- |"]
    for architecture in dict.fromkeys(row["architecture"] for row in own):
        some = [row for row in own if row["architecture"] == architecture]
        means = [
            f"{100 * fmean(row['accuracy'] for row in some if row['source'] == source):.1f}"
            for source in ("distilled", "random-real")
        ]
        lines.append(f"| `{architecture}` | {'yes' if some[0]['seen'] else 'no'} | {' | '.join(means)} |")
    return "Mean test accuracy in %:\n\n" + "\n".join(lines) + "\n\n"


def _few(names: tuple[str, ...], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _called(said: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in said.get("init_args", {}).items())
    return f"{said['class_path'].rpartition('.')[2]}({arguments})"


def _called_labels(said: Any) -> str:
    return f"after the run, from {said['from']['label_kind']} labels" if isinstance(said, dict) else ""


def label_bytes(distilled: DistilledSet) -> int:
    """Return how many bytes labels take, with a teacher's views of them."""
    return distilled.labels.nbytes + _view_bytes(distilled)


def _view_bytes(distilled: DistilledSet) -> int:
    return sum(part.nbytes for part in distilled.views.state_dict().values()) if distilled.views else 0


def sizes(distilled: DistilledSet, path: Path | None = None) -> str:
    """Say how many bytes a set takes, and what takes them."""
    parts = {"images": distilled.image_bytes, "labels": distilled.labels.nbytes, "views": _view_bytes(distilled)}
    whole = f"{path.stat().st_size:,}: " if path else ""
    inside = [f"{name} {size:,}" for name, size in parts.items() if size]
    if distilled.preprocessing.kind == "zca":
        matrices = sum(part.nbytes for part in packed(distilled.preprocessing, distilled.images).values())
        inside.append(f"whitening {matrices:,} (preprocessing standardise needs none)")
    return whole + ", ".join(inside)
