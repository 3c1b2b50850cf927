"""What a recorded result was made with."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_dd.utils.files import write_text

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm")


def environment() -> dict[str, str]:
    """Return command, commit, hardware and versions; a commit with changes on top of it ends with ``+``."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--untracked-files=no", "--", "lightning_dd", "configs"):
        commit += "+"
    versions = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)]
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], _ROOT), *sys.argv[1:]]),
        "commit": commit,
        "hardware": ", ".join([*_gpus(), f"{os.cpu_count()} cores of {_processor()}"]),
        "versions": ", ".join(versions),
    }


def write_record(path: str | None, **rows: list[dict[str, Any]]) -> None:
    """Write rows and how they were made as JSON; nothing without a path."""
    if path:
        write_text(path, json.dumps({"made_with": environment(), **rows}, indent=1) + "\n")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
