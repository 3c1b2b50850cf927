"""Distilled sets by address, wherever a file goes: on the Hugging Face hub, and those that come with the package.

``hf://user/name`` is one on the hub, by its library; ``builtin:mnist5k_frepo_ipc1`` one of the package's own, which
``benchmarks/compare.py`` made (seed 0).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lightning_dd.utils.errors import UserError, first_line, unknown_name

SCHEME, BUILTIN = "hf://", "builtin:"
FOLDER = Path(__file__).parent.parent / "sets"
"""The sets that come with the package."""
FILE = "distilled.safetensors"
"""What a set is called in its repository."""
_ADDRESS = re.compile(r"hf:/+(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./-]+))?")
_REACH = "needs a hub that can be reached (HF_ENDPOINT names another, HF_HUB_OFFLINE=1 takes what was fetched before)"


def is_address(path: Path | str) -> bool:
    """Return whether a name is an address, and no path."""
    return str(path).startswith(("hf:/", BUILTIN))


def builtin_sets() -> dict[str, Path]:
    """Return the sets that come with the package, by address."""
    return {f"{BUILTIN}{path.stem}": path for path in sorted(FOLDER.glob("*.safetensors"))}


def fetch_set(address: Path | str) -> Path:
    """Return the file that an address names: in the package, in the library's cache, or fetched from the hub.

    Args:
        address: ``builtin:name``, or ``hf://user/name``, with ``@revision`` and ``/file`` where they are not the usual
            ones.

    Raises:
        UserError: it is no such address, there is nothing, or no hub can be reached.
    """
    if str(address).startswith(BUILTIN):
        if str(address) not in (known := builtin_sets()):
            raise unknown_name("set", str(address), known)
        return known[str(address)]
    from huggingface_hub import hf_hub_download

    found = _ADDRESS.fullmatch(str(address))
    if not found:
        raise UserError(f"'{address}' must be hf://user/name, hf://user/name@revision or hf://user/name/file")
    name, revision, where = found["file"] or FILE, found["revision"], os.environ.get("HF_ENDPOINT")
    try:
        return Path(hf_hub_download(found["repo"], name, repo_type="dataset", revision=revision, endpoint=where))
    except Exception as error:  # the library and what carries it raise many kinds
        raise UserError(f"'{address}' cannot be fetched: {first_line(error)}; it {_REACH}") from None


def push_files(repo: str, files: Mapping[str, bytes | Path], private: bool = False) -> str:
    """Put files into a repository of data, which is made where it is missing, in one commit; return its address.

    The library finds the user's token where ``hf auth login`` put it, or in ``HF_TOKEN``.

    Args:
        repo: ``user/name``.
        files: content, or where it lies, by name.
        private: whether others may not see a new repository.

    Raises:
        UserError: the name is none, the hub refuses, or none can be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"repo must be user/name, got '{repo}'")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message="Add a distilled set", repo_type="dataset")
    except Exception as error:
        raise UserError(f"'{repo}' cannot be pushed: {first_line(error)}; it {_REACH} and a token (HF_TOKEN)") from None
    return SCHEME + repo
