"""The shape of the package: imports point one way, without circles, and plain torch stays plain."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lightning_dd"
# From the bottom to the top; a module may import from its own layer and from lower ones.
LAYERS = [
    {"utils", "report", "statistics", "jobs", "parsing", "cells"},
    {"augment", "data", "models"},
    {"losses"},
    {"distilled"},
    {"students"},
    {"pretrained"},
    {"synthetic"},
    {"distillers", "evaluators"},
    {"callbacks"},
    {"api"},
    {"lightning_cli", "experiment", "reproduce"},
    {"applications"},
    {"listing"},
    {"verbs"},
    {"cli"},
    {"__main__", "__init__"},
]
PLAIN_TORCH = [
    *("losses", "models", "augment", "utils/seeding.py", "utils/errors.py", "utils/files.py"),
    *("data/images.py", "data/preprocess.py", "students/recipe.py", "students/loop.py", "distilled/views.py"),
]
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Every module a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *[f"{node.module}.{alias.name}" for alias in node.names]]
    return names


def layer(module):
    room = [*module.split("."), "__init__"][1]
    found = [index for index, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{module}: give the room '{room}' a layer"
    return found[0]


MODULES = {module_name(path): path for path in FILES}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_upwards_or_sideways(module):
    for name in imports(MODULES[module]):
        if name in MODULES and name != "lightning_dd":
            assert layer(name) <= layer(module), f"{module} imports {name}, which is above it"
            pair = {module.split(".")[1:2][0], name.split(".")[1]} if "." in module else set()
            assert pair != {"distillers", "evaluators"}, f"{module} imports {name}: they meet in a file, not in code"


def test_there_are_no_circles():
    # A package's __init__ counts as importing its modules, but a module inside it does not import the package.
    edges = {
        module: {n for n in imports(path) if n in MODULES and n != module and not module.startswith(f"{n}.")}
        for module, path in MODULES.items()
    }
    done, open_ = set(), []

    def visit(module):
        if module in done:
            return
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        open_.append(module)
        for name in edges[module]:
            visit(name)
        open_.pop()
        done.add(module)

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("room", PLAIN_TORCH)
def test_plain_torch_imports_no_lightning(room):
    path = ROOT / room
    for file in [path] if path.is_file() else path.rglob("*.py"):
        assert not [name for name in imports(file) if "lightning" in name and not name.startswith("lightning_dd")]


def test_files_and_functions_stay_small():
    for path in FILES:
        source = path.read_text()
        assert source.count("\n") <= 350, f"{path} is too long: split it"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 70, f"{path}:{node.name} has {length} lines: split it"


def test_one_module_starts_processes():
    """Another pool would need its own care for killed workers, Ctrl-C and orphans."""
    starters = ("multiprocessing", "concurrent.futures.ProcessPoolExecutor", "subprocess", "torch.multiprocessing")
    found = {module for module, path in MODULES.items() if set(imports(path)) & set(starters)}
    assert found == {"lightning_dd.jobs"}
