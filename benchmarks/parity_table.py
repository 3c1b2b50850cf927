"""Compare with the official code, from checkouts of the repositories, and record the table.

    python benchmarks/parity_table.py --dc DatasetCondensation --mtt mtt-distillation --sre2l SRe2L --rded RDED \
        --frepo FRePo --frepo-torch FRePo-torch --kornia kornia --write benchmarks/results/parity.json

Every argument but the last is a folder; what is left out is not run. ``--frepo-torch`` is the branch ``torch`` of
FRePo's repository; its main branch needs jax, flax, optax and einops, without which only its whitening is compared.
Takes two minutes on one core. Exits with 1 if a line differs.
"""

import argparse
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

from environment import write_record
from parity import data, frepo_jax, methods, networks, recipes
from parity.official import Line

COMPARISONS: dict[str, tuple[Callable[[Path], list[Line]], ...]] = {
    "dc": (methods.class_matching, data.dsa_family, networks.dc_family, recipes.evaluations, recipes.dc_loops),
    "mtt": (methods.mtt, data.dsa_family, networks.dc_family, recipes.evaluations),
    "sre2l": (
        methods.sre2l,
        networks.torchvision_resnet18,
        data.random_resized_crop,
        recipes.sre2l,
        recipes.sre2l_students,
    ),
    "rded": (data.cutmix, recipes.rded),
    "frepo": (data.frepo_zca, frepo_jax.all_of_it),
    "frepo_torch": (methods.frepo, networks.frepo),
    "kornia": (data.kornia_zca,),
}
"""What is compared, by the checkout it takes."""


def main() -> int:
    """Compare, print, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in COMPARISONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help="folder of the checkout")
    parser.add_argument("--write", help="record the table in this file")
    options = parser.parse_args()
    lines = []
    for name, comparisons in COMPARISONS.items():
        folder = getattr(options, name)
        for compare in comparisons if folder else ():
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                lines += compare(folder.resolve())
    for line in lines:
        print(f"{line.verdict:8} {line.part}: {line.what} ({line.official}) {line.difference} {line.note}")
    write_record(options.write, parity=[asdict(line) | {"verdict": line.verdict} for line in lines])
    return int(any(line.verdict == "differs" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
