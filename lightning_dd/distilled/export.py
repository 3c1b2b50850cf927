"""A distilled set in the formats that other tools read, and what each of them loses."""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_dd.distilled.set import DistilledSet
from lightning_dd.utils.errors import unknown_name
from lightning_dd.utils.files import write_atomically


def export_set(distilled: DistilledSet, form: str, output: Path | str) -> Iterator[str]:
    """Write a set in a format of :data:`FORMATS`; yield what was written, and what the format loses, in lines.

    Raises:
        UserError: the format is not known, or the place cannot be written.
    """
    if form not in FORMATS:
        raise unknown_name("format", form, FORMATS)
    yield f"wrote {FORMATS[form](distilled, Path(output))}"
    if form == "set":
        return
    if form != "npz":
        yield eight_bit_loss(distilled)
    if form == "images" and distilled.label_kind != "hard":
        yield f"left out: the {distilled.label_kind} labels; a folder says the class alone"
    if distilled.views is not None:
        yield "left out: the stored views and a teacher's labels of each"


def eight_bit_loss(distilled: DistilledSet) -> str:
    """Say how far 8-bit pixels are from a set's images, in the normalised space that students see."""
    pixels = distilled.preprocessing.inverse(distilled.images)
    outside = float(((pixels < 0) | (pixels > 1)).float().mean())
    again = distilled.preprocessing(_eight_bit(distilled).float() / 255)
    moved = float((again - distilled.images).norm() / distilled.images.norm().clamp_min(1e-12))
    return (
        f"8-bit pixels: {outside:.1%} of the values are clipped to [0, 1]; the images move by {moved:.1%} of their norm"
    )


def _eight_bit(distilled: DistilledSet) -> Tensor:
    return (distilled.pixels() * 255).round().to(torch.uint8)


def pngs(distilled: DistilledSet) -> Iterator[bytes]:
    """Yield the images as PNG files, in order."""
    for image in _eight_bit(distilled):
        buffer = io.BytesIO()
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(buffer, format="png")
        yield buffer.getvalue()


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a folder name for each class: what a path could mean is taken out, and no two are equal.

    Example:
        >>> folder_names(["cat", "../etc", "a/b", "a:b"])
        ['cat', '_etc', 'a_b', 'a_b 3']
    """
    found: list[str] = []
    for index, name in enumerate(names):
        kept = re.sub(r"[^\w ,()+.-]", "_", name).strip(". ") or str(index)
        found.append(f"{kept} {index}" if kept.lower() in map(str.lower, found) else kept)
    return found


def _write_images(distilled: DistilledSet, output: Path) -> str:
    """Write ``output/<class>/<row>.png``, which ``ImageFolder`` reads."""
    names = folder_names(distilled.class_names)
    for row, (label, png) in enumerate(zip(distilled.classes.tolist(), pngs(distilled), strict=True)):
        place = output / names[label] / f"{row}.png"
        write_atomically(place, lambda path, png=png: path.write_bytes(png))  # type: ignore[misc]
    return f"{output}: {len(distilled)} PNG files in {len(names)} folders"


def _write_parquet(distilled: DistilledSet, output: Path) -> str:
    """Write one shard in the Hugging Face image layout, with the labels themselves as a third column."""
    import pyarrow as pa
    from pyarrow import parquet

    images = [{"bytes": png, "path": f"{row}.png"} for row, png in enumerate(pngs(distilled))]
    table = pa.table({"image": images, "label": distilled.classes.tolist(), "target": distilled.labels.tolist()})
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(distilled.class_names), "_type": "ClassLabel"},
        "target": {"feature": {"dtype": "float64", "_type": "Value"}, "_type": "Sequence"},
    }
    described = {"huggingface": json.dumps({"info": {"features": features}}), "loss": distilled.loss_name}
    table = table.replace_schema_metadata(described)
    return str(write_atomically(output, lambda path: parquet.write_table(table, path)))


def _write_npz(distilled: DistilledSet, output: Path) -> str:
    """Write arrays without objects: nothing in the file needs a pickle."""
    arrays: dict[str, Any] = {
        "images": distilled.images.numpy(),
        "pixels": distilled.preprocessing.inverse(distilled.images).numpy(),
        "labels": distilled.labels.numpy(),
        "classes": distilled.classes.numpy(),
        "class_names": np.array(distilled.class_names),
        "label_kind": np.array(distilled.label_kind),
        "loss": np.array(distilled.loss_name),
        "temperature": np.array(distilled.temperature),
    }
    arrays |= {f"preprocessing_{name}": part.numpy() for name, part in distilled.preprocessing.state_dict().items()}
    return str(write_atomically(output, lambda path: np.savez_compressed(path, **arrays)))


FORMATS: dict[str, Callable[[DistilledSet, Path], str]] = {
    "set": lambda distilled, output: str(distilled.save(output)),
    "images": _write_images,
    "parquet": _write_parquet,
    "npz": _write_npz,
}
"""By name: what writes it and says where."""
