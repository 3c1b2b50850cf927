"""The pages tell the truth: links lead somewhere, commands are spelled as the parser has them, the site builds."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_dd.cli import main
from lightning_dd.distilled.hub import fetch_set
from lightning_dd.parsing import parse_verb
from lightning_dd.verbs import VERBS

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
CODE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def anchors(name):
    """The headings of a page, as browsers jump to them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", TEXTS[name]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(name):
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", TEXTS[name]))
    for link in (link for link in links if not re.match(r"\w+:", link)):
        file, _, anchor = link.partition("#")
        target = (PAGES[name].parent / file) if file else PAGES[name]
        if target.suffix != ".rst":  # these are made when the site is built
            assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), f"{name}: {link}"


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^(\w+)$", "".join(found[1] for found in CODE.findall(TEXTS["docs/index.md"])), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("docs/*.md") if path.stem != "index")


COMMANDS = [
    (name, command)
    for name, text in TEXTS.items()
    if name == "README.md" or name.startswith("docs/")
    for language, code in CODE.findall(text)
    if language == "bash"
    for command in re.findall(r"^(?:torchrun .*-m )?lightning[-_]dd (.+?)(?:  +#.*)?$", code.replace("\\\n", ""), re.M)
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_can_be_parsed(page, command, capsys):
    """What long ones do is tested under their verb; here, that pages spell them as the parser does."""
    verb, *words = shlex.split(command)
    if verb in VERBS and "--help" not in words:
        parse_verb(verb, VERBS[verb], words)
        return
    words = [word for word in words if "runs/..." not in word and word != "--ckpt_path"]
    with pytest.raises(SystemExit) as stop:
        main([verb, *words, *([] if "--help" in words else ["--print_config"])])
    assert stop.value.code in (0, None)


@pytest.mark.parametrize(("page", "command"), [pair for pair in COMMANDS if pair[1].split()[0] in ("list", "export")])
def test_quick_commands_run_as_printed(page, command, tmp_path, capsys):
    shutil.copy(fetch_set("builtin:mnist5k_dm_ipc1"), tmp_path / "a.safetensors")
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out


SHORT = {
    "evaluate": ["--seeds=1", "--steps=1", "--teacher_steps=100", "--accelerator=cpu", "--workers=1"],
    "scores": ["--seeds=1", "--steps=1", "--full_steps=1", "--accelerator=cpu", "--workers=1"],
    "relabel": ["--teacher_steps=100", "--epochs=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command"),
    # folders of photos and weights of a library have tests of their own, and CIFAR-10 is not there for all
    [
        pair
        for pair in COMMANDS
        if pair[1].split()[0] in SHORT and not re.search("images-folder|--probe|CIFAR10", pair[1])
    ],
)
def test_students_commands_run_on_a_small_network(page, command, tmp_path):
    for name, address in (("a", "dm"), ("b", "mtt"), ("runs/demo/distil/best", "frepo")):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(fetch_set(f"builtin:mnist5k_{address}_ipc1"), path)
    small = re.sub(r"\b(unseen(-small)?|vgg11|resnet18|conv:norm=none)\b", "conv:width=8,depth=2,norm=none", command)
    verb, *words = shlex.split(small)
    if "--config" in words:
        words += ["--architectures", "conv:width=8,depth=2,norm=none"]
    assert main([verb, *words, *SHORT[verb]]) == 0


def test_there_are_commands_on_most_pages():
    assert len({page for page, _ in COMMANDS}) > 6


@pytest.mark.parametrize("name", [name for name in TEXTS if name.startswith("docs/")])
def test_python_on_pages_can_be_parsed_and_its_imports_resolve(name):
    for code in (code for language, code in CODE.findall(TEXTS[name]) if language == "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_site_builds_without_a_warning(tmp_path):
    missing = [name for name in ("sphinx", "furo", "myst_parser") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the extra 'docs' is not installed: {', '.join(missing)}")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # the reference is written beside the pages
    for path in ROOT.glob("*.md"):
        shutil.copy(path, tmp_path)
    build = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "docs", "site"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "reference" / "lightning_dd.losses.krr.html").is_file()
