"""The published cells: which setting stands behind which figure of a paper's table, read from ``cells.yaml``.

A configuration file says the settings of one cell in full. What changes with the images per class stands in the table,
so that ``--model.ipc`` alone goes from one cell to the next, and a run can say which cell it is and what differs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_dd.parsing import FOLDER
from lightning_dd.utils.errors import UserError

NOT_COUNTED = (
    *("seed", "train_missing", "compiled", "constant_memory", "expert_seed", "probe"),
    *("root", "eval_batch_size", "split_seed", "keep_on_device", "on_disk", "workers"),
)
"""Arguments of a method and of data that change no figure, or only as another seed does; ``probe`` only scores."""
COUNTED = ("max_steps", "precision", "devices", "num_nodes", "accumulate_grad_batches", "gradient_clip_val")
"""Arguments of the Trainer that change what is distilled."""


@dataclass(frozen=True)
class Cell:
    """One cell of a paper's table.

    Args:
        config: name of the configuration, as ``cifar10/mtt``.
        ipc: images per class.
        accuracy: the published figure in %, as printed.
        source: where it is printed.
        settings: where its settings stand.
        evaluate: options of ``lightning-dd evaluate`` for the students of the paper.
        ours: our figure at these settings.
        given: further settings that choose the cell, by dotted name, as ``{"data.classes": "b"}``.
        options: settings that this ``ipc`` changes, likewise.
    """

    config: str
    ipc: int
    accuracy: str
    source: str
    settings: str
    evaluate: str
    ours: str = "not run"
    given: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What ``lightning-dd list cells`` calls it: ``cifar10/mtt ipc 50``."""
        return " ".join([self.config, f"ipc {self.ipc}", *map(str, self.given.values())])

    @property
    def command(self) -> str:
        """The command that distils it, from the whole training split as the papers do."""
        chosen = "".join(f" --{name} {value}" for name, value in self.given.items())
        return f"lightning-dd fit --config {self.config} --model.ipc {self.ipc}{chosen} --data.val_fraction 0"

    def words(self) -> list[str]:
        """Return what ``ipc`` changes as options of ``fit``."""
        return [_option(name, value) for name, value in self.options.items()]

    def arguments(self) -> list[str]:
        """Return the options of ``fit`` for the whole setting, on the papers' full training split."""
        chosen = {"model.ipc": self.ipc, **self.given, "data.val_fraction": 0.0}
        return [f"--config={FOLDER / self.config}.yaml", *self.words(), *map(_option, chosen, chosen.values())]

    def content(self) -> dict[str, Any]:
        """Return the same setting as one configuration says it."""
        content: dict[str, Any] = yaml.safe_load((FOLDER / f"{self.config}.yaml").read_text(encoding="utf-8"))
        if isinstance(content["data"], str):
            content["data"] = {"class_path": content["data"]}
        for name, value in {"model.ipc": self.ipc, "data.val_fraction": 0.0, **self.given, **self.options}.items():
            room, _, setting = name.partition(".")
            place = content.setdefault(room, {})
            place = place if room == "trainer" else place.setdefault("init_args", {})
            place[setting] = value
        return content


def _option(name: str, value: Any) -> str:
    room, _, rest = name.partition(".")
    path = f"{room}.init_args.{rest}" if room in ("model", "data") else name
    return f"--{path}={value if isinstance(value, str) else json.dumps(value)}"


@cache
def cells() -> tuple[Cell, ...]:
    """Return all cells, in the order of the table."""
    table = yaml.safe_load((Path(__file__).parent / "cells.yaml").read_text(encoding="utf-8"))
    return tuple(cell for method in table.values() for cell in _cells_of(method))


def _cells_of(method: dict[str, Any]) -> Iterator[Cell]:
    """Yield the cells of one paper; a row may name a source, settings and students of its own."""
    facts, shared = ("source", "settings", "evaluate", "ours"), method.get("at ipc", {})
    for key, rows in method.items():
        config, *words = key.split(" ")
        if "/" not in config:
            continue
        own = {**method, **{name: value for name, value in rows.items() if name in facts}}
        given = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
        for ipc, row in rows.items():
            if ipc in facts:
                continue
            row = {"accuracy": str(row)} if not isinstance(row, dict) else row
            said = {name: str(value) for name, value in {**own, **row}.items() if name in facts}
            options = {name: value for name, value in {**shared.get(ipc, {}), **row}.items() if "." in name}
            yield Cell(config=config, ipc=ipc, accuracy=str(row["accuracy"]), given=given, options=options, **said)


def nearest(found: Sequence[Cell], ipc: int) -> list[Cell]:
    """Return the cells of this ``ipc``, or of the next larger published one, or of the largest."""
    published = sorted({cell.ipc for cell in found})
    chosen = next((known for known in published if known >= ipc), published[-1] if published else 0)
    return [cell for cell in found if cell.ipc == chosen]


def follow_ipc(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which what depends on ``ipc`` follows it.

    The settings of the cell stand right after the configuration they belong to: whatever comes later wins.

    Args:
        arguments: of ``fit``, every configuration as ``--config=PATH``.
    """
    words, ipc, place, own = list(arguments), 1, 0, list[Cell]()
    for index, (word, after) in enumerate(zip(words, [*words[1:], ""], strict=True)):
        name, equals, value = word.partition("=")
        value = value if equals else after
        if name == "--config":
            model = (yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}).get("model")
            ipc = model.get("init_args", {}).get("ipc", ipc) if isinstance(model, dict) else ipc
            found = [cell for cell in cells() if Path(value).resolve() == (FOLDER / f"{cell.config}.yaml").resolve()]
            own, place = (found, index + 1) if found else (own, place)
        elif name in ("--model.ipc", "--model.init_args.ipc") and value.isdigit():
            ipc = int(value)
    chosen = nearest(own, ipc)[:1]
    return [*words[:place], *(option for cell in chosen for option in cell.words()), *words[place:]]


def find_cell(config: str, ipc: int, **given: Any) -> Cell:
    """Return the cell of a configuration.

    Args:
        config: as ``cifar10/mtt``.
        ipc: images per class, one that is published.
        given: what else chooses the cell, by the name of the setting, as ``classes="b"``.

    Raises:
        UserError: there is none.
    """
    for cell in (cell for cell in cells() if (cell.config, cell.ipc) == (config, ipc)):
        if {name.rpartition(".")[2]: value for name, value in cell.given.items()} == given:
            return cell
    known = [cell.name for cell in cells() if cell.config == config] or sorted({cell.config for cell in cells()})
    raise UserError(
        f"no published cell {' '.join([config, f'ipc {ipc}', *map(str, given.values())])}: {', '.join(known)}"
    )


def cells_of(model: str, data: str) -> list[Cell]:
    """Return the cells of a method on a data set, both by class name."""
    return [cell for cell in cells() if _classes(cell.config) == (model, data)]


@cache
def _classes(config: str) -> tuple[str, str]:
    content = yaml.safe_load((FOLDER / f"{config}.yaml").read_text(encoding="utf-8"))
    data = content["data"]
    return content["model"]["class_path"], data["class_path"] if isinstance(data, dict) else data


def counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that tell a run from a cell, of all settings of ``fit`` by dotted name."""
    kept = {}
    for name, value in settings.items():
        room, *inside = [part for part in name.split(".") if part != "init_args"]
        if room == "trainer" and inside[0] in COUNTED:
            kept[name] = value
        elif room in ("model", "data") and not {inside[0], inside[-1]} & set(NOT_COUNTED):
            kept[".".join([room, *inside])] = value
    return kept


def closest(
    method: str, data: str, ipc: int, run: Mapping[str, Any], published: Callable[[Cell], Mapping[str, Any]]
) -> str:
    """Return what a run says in its first lines: see :func:`statement`. Nothing where no cell has its method and data.

    Args:
        method: its class name.
        data: likewise.
        ipc: the run's.
        run: the run's counted settings.
        published: gives those of a cell.
    """
    candidates = nearest(cells_of(method, data), ipc)
    own = [cell for cell in candidates if all(run.get(name) == value for name, value in cell.given.items())]
    told = (statement(cell, ipc, run, published(cell)) for cell in own or candidates[:1])
    return min(told, key=len, default="")


def statement(cell: Cell, ipc: int, run: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """Return what a run says in its first lines: which cell it is, and what differs from it.

    Args:
        cell: the nearest one.
        ipc: the run's.
        run: the run's counted settings.
        published: the cell's.
    """
    names = [name for name in {**published, **run} if run.get(name) != published.get(name) and name != "model.ipc"]
    others = tuple(name.removesuffix("class_path") for name in names if name.endswith(".class_path"))
    differs = [
        f"{name.removesuffix('.class_path')} {_short(run.get(name))} (published {_short(published.get(name))})"
        for name in names
        if name.endswith(".class_path") or not name.startswith(others)  # the options of another class are its own
    ]
    is_one = f"{cell.accuracy} % in {cell.source}; ours: {cell.ours}"
    first = f"published cell {cell.name}: {is_one}"
    if ipc != cell.ipc:
        first = f"no published cell has ipc {ipc}: nearest is {cell.name}"
    follows = ", ".join(f"{name} {_short(value)}" for name, value in cell.options.items())
    second = f"settings: {cell.settings}{f'; for this ipc {follows}' if follows else ''}"
    return "\n  ".join([first, second, f"differs: {', '.join(differs) or 'nothing'}"])


def _short(value: Any) -> str:
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix("lightning_dd.synthetic.")
