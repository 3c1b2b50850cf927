"""Damage files at random, read each, and count how that ended.

    python benchmarks/fuzz.py --sets 100000 --converts 20000 --checkpoints 5000 --record benchmarks/results/fuzz.json

A damaged file must be read with the very content it had, or be refused in one line. Sets of other projects carry no
checksum of their own, so one with other numbers that are plausible is read as well. Anything else is a fault: another
exception, a message of several lines, a wrong number in silence, more than ten seconds, or a gibibyte more memory.
How a file is damaged follows from the seed and its number; of a fault the file is kept, and the exit status is 1.
"""

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import write_record
from pytorch_lightning import Trainer

from lightning_dd.data import DATA_SETS, RawSplit, RealData
from lightning_dd.distilled.convert import convert_set
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import DM
from lightning_dd.distillers.checkpoint import distilled_from_checkpoint
from lightning_dd.utils.errors import UserError

_SECONDS, _BYTES = 10, 2**30
_HEAD = 3000  # bytes at the start, and as many at the end, where headers and directories are


class Blobs(RealData):
    """Three classes of twelve 4 x 4 images."""

    def read(self, *, train: bool) -> RawSplit:
        """Make them."""
        labels = torch.arange(3).repeat(12)
        images = torch.randint(0, 60, (36, 1, 4, 4), generator=torch.Generator().manual_seed(int(train)))
        images[torch.arange(36), 0, labels] += 150
        return RawSplit(images.to(torch.uint8), labels, ("a", "b", "c"))


DATA_SETS[Blobs.__name__] = Blobs


def write_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Write whole files of every kind, by kind and name."""
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    model = DM(architecture="conv:width=2,depth=1", real_batch_size=4)
    trainer.fit(model, Blobs())
    trainer.save_checkpoint(folder / "dm.ckpt")
    made = model.distilled_set()
    pixels, classes = made.pixels(), made.classes
    arrays = {"image": (4 * pixels - 2).permute(0, 2, 3, 1).numpy(), "label": made.labels.numpy()}
    np.savez(folder / "frepo.npz", **arrays)  # type: ignore[arg-type]
    torch.save({"data": [[4 * pixels - 2, classes]], "accs": {"ConvNet": [np.float64(0.5)]}}, folder / "dc.pt")
    whitened = DM(architecture="conv:width=2,depth=1", real_batch_size=4)
    trainer.fit(whitened, Blobs(preprocessing="zca"))
    sets = {"standardised": made, "whitened": whitened.distilled_set()}
    return {
        "sets": {name: own.save(folder / f"{name}.safetensors") for name, own in sets.items()},
        "converts": {"frepo": folder / "frepo.npz", "dc": folder / "dc.pt"},
        "checkpoints": {"dm": folder / "dm.ckpt"},
    }


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Return a file with one to three places of it changed."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 3))):
        size = max(1, len(data))
        place = draw.randrange(min(_HEAD, size)) if draw.random() < 0.5 else draw.randrange(size)
        place = size - 1 - place if draw.random() < 0.3 else place
        length = min(draw.choice((1, 1, 2, 4, 8, 64, 512)), size - place)
        what = draw.randrange(7)
        if what < 2 and data:
            data[place] ^= 1 << draw.randrange(8)
        elif what == 2:
            data[place : place + length] = draw.randbytes(length)
        elif what == 3:
            del data[place : place + length]
        elif what == 4:
            data[place:place] = draw.choice((draw.randbytes(length), data[:length], b"9" * length, b"\x1b[2J\n"))
        elif what == 5:
            data[place : place + length] = bytes([draw.choice((0, 255))]) * length
        elif draw.random() < 0.3:
            del data[place:]
    return bytes(data)


def content(distilled: DistilledSet) -> dict[str, Any]:
    """Return everything a set says, in values that can be compared."""
    tensors = {name: getattr(distilled, name) for name in ("images", "labels", "classes")}
    tensors |= distilled.preprocessing.state_dict()
    told = ("label_kind", "class_names", "data", "method", "config", "run", "temperature")
    exact = {name: value.numpy().tobytes() for name, value in tensors.items()}
    return exact | {name: json.dumps(getattr(distilled, name), default=str) for name in told}


READERS: dict[str, Callable[[Path], DistilledSet]] = {
    ".safetensors": DistilledSet.load,
    ".npz": lambda path: convert_set("frepo", path, "Blobs", "standardise", mean=[0.5], std=[0.25]),
    ".pt": lambda path: convert_set("dc", path, "Blobs", "standardise", mean=[0.5], std=[0.25]),
    ".ckpt": distilled_from_checkpoint,
}
"""What reads a file, by how its name ends."""


def ending(path: Path, expected: dict[str, Any], silent_numbers: bool) -> str:
    """Return how reading a file ended, in a word or two; a fault with what it was."""
    try:
        found = content(READERS[path.suffix](path))
    except UserError as error:
        text = str(error)
        if not text.isprintable():
            return f"fault: several lines {text!r}"
        return "checksum differs" if "checksum differs" in text else "refused"
    except BaseException as error:
        return f"fault: {type(error).__name__} {error}"
    if found == expected:
        return "equal"
    return (
        "other numbers"
        if silent_numbers
        else f"fault: other {[key for key in expected if found[key] != expected[key]]}"
    )


def try_kind(kind: str, files: dict[str, Path], count: int, seed: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and ending of each of ``count`` damaged files."""
    expected = {name: content(READERS[path.suffix](path)) for name, path in files.items()}
    whole = {name: path.read_bytes() for name, path in files.items()}
    for number in range(count):
        draw = random.Random(f"{seed}/{kind}/{number}")
        name = draw.choice(list(files))
        path = folder / f"damaged{files[name].suffix}"
        path.write_bytes(damaged(whole[name], draw))
        signal.alarm(_SECONDS)
        end = ending(path, expected[name], kind == "converts")
        signal.alarm(0)
        if end.startswith("fault"):
            kept = Path(f"fault-{kind}-{seed}-{number}{path.suffix}")
            kept.write_bytes(path.read_bytes())
            print(f"{kept}: {end}", file=sys.stderr)
            end = "fault"
        yield name, end


def too_long(number: int, frame: object) -> None:
    """End what takes too long."""
    raise TimeoutError


def main() -> int:
    """Damage, read, count, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for kind, count in {"sets": 1000, "converts": 200, "checkpoints": 50}.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", help="file for the counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        files = write_files(Path(name))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, resource.RLIM_INFINITY))
        for kind, own in files.items():
            start = time.process_time()
            counts = Counter(end for _, end in try_kind(kind, own, getattr(options, kind), options.seed, Path(name)))
            files_read = sum(counts.values())
            ends = {end: counts[end] for end in ("equal", "checksum differs", "refused", "other numbers", "fault")}
            spent = round(1000 * (time.process_time() - start) / max(1, files_read), 2)
            rows.append({"kind": kind, "damaged": files_read, **ends, "ms of a CPU each": spent})
            print(rows[-1])
    write_record(options.record, fuzz=rows)
    return int(any(row.get("fault") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
