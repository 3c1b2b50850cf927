"""Change one thing in a formula, run the tests that stand for it, and see whether one fails; many times over.

    python benchmarks/mutations.py --record benchmarks/results/mutations.json
    python benchmarks/mutations.py MTT's        # formulas that begin so

What is changed stands in mutations.yaml: a sign, a factor, a detach, a transpose. Nothing is written: a process that
has imported everything but the package forks one for each change, in which the changed module is compiled from memory.
The exit status is 1 if a change went unnoticed, or a test fails without any.
"""

import argparse
import importlib
import json
import os
import pickle
import resource
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import pytest
import yaml
from forked import rows_of

ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 600
_WORDS = ("caught", "SURVIVED")
_HEAVY = ("torchvision", "pytorch_lightning", "timm", "torchmetrics", "scipy.stats", "pandas", "matplotlib.pyplot")


class Mutation(NamedTuple):
    """One change of one formula."""

    formula: str
    tests: tuple[str, ...]
    what: str
    module: str
    """Below ``lightning_dd``, as ``losses/krr.py``."""
    text: str
    becomes: str

    def source(self) -> str:
        """Return the changed module.

        Raises:
            ValueError: the text does not stand in it, or more than once.
        """
        whole = (ROOT / "lightning_dd" / self.module).read_text(encoding="utf-8")
        if whole.count(self.text) != 1 or self.text == self.becomes:
            raise ValueError(f"{self.module} has {whole.count(self.text)} of: {self.text}")
        return whole.replace(self.text, self.becomes)


class Outcome(NamedTuple):
    """How the tests ended."""

    failed: str | None
    """The first one that failed; ``None`` if all passed."""
    ran: int
    """Tests that were run."""


class _Changed(SourceFileLoader):
    """Loads a module from memory; no file of byte code is read or written."""

    source: str

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Finds the changed module before anybody else does."""

    def __init__(self, mutation: Mutation) -> None:
        self.name = "lightning_dd." + mutation.module.removesuffix(".py").replace("/", ".")
        self.source = mutation.source()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path, target) if name == self.name else None
        if found is None or found.origin is None:
            return None
        found.loader = _Changed(name, found.origin)
        found.loader.source = self.source
        return found


class _FirstFailure:
    """A plugin of pytest that keeps what failed first."""

    failed: str | None = None
    ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and self.failed is None:
            self.failed = report.nodeid.rpartition("::")[2].partition("[")[0]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid} cannot be imported"


def mutations() -> Iterator[Mutation]:
    """Yield what mutations.yaml lists."""
    listed = yaml.safe_load((Path(__file__).parent / "mutations.yaml").read_text(encoding="utf-8"))
    for formula in listed:
        for line in formula["changes"].splitlines():
            what, module, change = line.split("; ", 2)
            text, becomes = change.replace("\\n", "\n").split(" => ")
            yield Mutation(formula["formula"], tuple(formula["tests"]), what, module, text, becomes)


def outcome(tests: Sequence[str], mutation: Mutation | None, log: str | None = None) -> Outcome:
    """Run tests in a forked process up to the first failure, with or without a change."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()  # the processes that a test starts end with it
        os.chdir(ROOT)
        nowhere = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if mutation is not None:
            sys.meta_path.insert(0, _Finder(mutation))
        first = _FirstFailure()
        files = [f"tests/{name}" for name in tests]
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[first])
        failed = first.failed or (None if code == 0 else f"pytest ended with {code}")
        os.write(sender, pickle.dumps(Outcome(failed, first.ran)))
        os._exit(0)
    os.close(sender)
    in_time = select.select([receiver], [], [], _SECONDS)[0]
    said = os.read(receiver, 10_000) if in_time else b""
    os.close(receiver)
    if not in_time:
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return pickle.loads(said) if said else Outcome("the process ended" if in_time else f"{_SECONDS} seconds passed", 0)


def tried(chosen: Sequence[Mutation], log: str | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each change of formulas that have the same tests.

    Raises:
        RuntimeError: a test fails without any change.
    """
    whole = outcome(chosen[0].tests, None, log)
    if whole.failed:
        raise RuntimeError(f"{chosen[0].formula}: {whole.failed} fails unchanged")
    for mutation in chosen:
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = outcome(mutation.tests, mutation, log)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = spent.ru_utime + spent.ru_stime - begun.ru_utime - begun.ru_stime
        row = {"formula": mutation.formula, "change": mutation.what, "module": mutation.module}
        yield row | {"caught by": ended.failed, "seconds": round(seconds, 1)}


def main() -> int:
    """Change, test, count, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formulas", nargs="*", help="how names of formulas begin; all without")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--log", help="file for what pytest prints")
    parser.add_argument("--record", type=Path, help="file for the rows")
    parser.add_argument("--again", action="store_true", help="only what the record has not noticed")
    options = parser.parse_args()
    for name in _HEAVY:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    everything = list(mutations())
    chosen = [one for one in everything if one.formula.startswith(tuple(options.formulas or [""]))]
    listed, kept = {(one.formula, one.what) for one in everything}, []
    if options.again:
        rows = json.loads(options.record.read_text(encoding="utf-8"))["mutations"]
        kept = [row for row in rows if row["caught by"] and (row["formula"], row["change"]) in listed]
        known = {(row["formula"], row["change"]) for row in kept}
        chosen = [one for one in chosen if (one.formula, one.what) not in known]
    groups: dict[tuple[str, ...], list[Mutation]] = {}
    for mutation in chosen:
        groups.setdefault(mutation.tests, []).append(mutation)

    def work(group: list[Mutation]) -> Iterator[dict[str, Any]]:
        return tried(group, options.log)

    rows = kept + rows_of(list(groups.values()), options.jobs, work, lambda row: _WORDS[row["caught by"] is None])
    order = {(mutation.formula, mutation.what): place for place, mutation in enumerate(everything)}
    rows.sort(key=lambda row: order[row["formula"], row["change"]])
    if options.record:
        from environment import write_record  # it imports the package

        write_record(str(options.record), mutations=rows)
    return int(any(row["caught by"] is None for row in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
