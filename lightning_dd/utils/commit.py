"""Which commit of this project is running, read from the checkout's own files."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def source_commit() -> str | None:
    """Return the commit of the checkout that this package lies in, or that it was installed from, if it is known."""
    return _of_checkout(Path(__file__).parents[2]) or _of_installation()


def _of_checkout(folder: Path) -> str | None:
    """Return what ``HEAD`` stands for; a work tree of its own keeps a file that says where its ``.git`` is."""
    try:
        home = folder / ".git"
        if home.is_file():
            home = folder / home.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (home / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head
        common = home / "commondir"
        shared = home / common.read_text(encoding="utf-8").strip() if common.is_file() else home
        name = head.removeprefix("ref:").strip()
        if (shared / name).is_file():
            return (shared / name).read_text(encoding="utf-8").strip()
        lines = (shared / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)
    except OSError:
        return None


def _of_installation() -> str | None:
    try:
        said = distribution("lightning_dd").read_text("direct_url.json")
        commit = json.loads(said or "{}").get("vcs_info", {}).get("commit_id")
    except (PackageNotFoundError, OSError, ValueError, AttributeError):
        return None
    return str(commit) if commit else None
