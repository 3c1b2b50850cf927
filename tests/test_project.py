"""What stands beside the code agrees with it: versions, the commands of the workflows, the forms."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lightning_dd import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = [f".github/workflows/{name}.yml" for name in ("tests", "docs", "release")]
FORMS = [".pre-commit-config.yaml", *WORKFLOWS, "CITATION.cff"]


def test_one_version_everywhere():
    assert PROJECT["version"] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_wheel_says_who_made_it_and_names_no_address_yet():
    assert PROJECT["authors"] == [{"name": "the lightning_dd developers"}]
    assert "urls" not in PROJECT


@pytest.mark.parametrize("name", FORMS)
def test_forms_can_be_read_and_their_commands_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"run: make ([a-z-]+)", text)) <= targets


def test_the_oldest_torch_that_is_checked_is_the_oldest_that_is_allowed():
    allowed = dict(re.findall(r"^([\w-]+)\S*>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    checked = dict(re.findall(r"(torch\w*)==([\d.]+)\.\*", (ROOT / ".github/workflows/tests.yml").read_text()))
    assert checked == {name: allowed[name] for name in ("torch", "torchvision")}


def test_the_tested_versions_are_named_for_every_requirement_and_allowed():
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            needed = Requirement(line.partition("#")[0])
            assert needed.specifier.contains(tested[needed.name.replace("_", "-").lower()]), needed
