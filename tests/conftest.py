"""One torch thread (forked DDP processes deadlock otherwise), a private cache, and silence."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from lightning_dd.utils.silence import quieten

torch.set_num_threads(1)
quieten()


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Decoded data goes to a folder of this test session, shared by its tests."""
    previous = os.environ.get("LIGHTNING_DD_CACHE")
    os.environ["LIGHTNING_DD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if previous is None:
        del os.environ["LIGHTNING_DD_CACHE"]
    else:
        os.environ["LIGHTNING_DD_CACHE"] = previous


@pytest.fixture(autouse=True)
def _private_folder(tmp_path, monkeypatch):
    """Runs write below the current folder: let that be the test's own."""
    monkeypatch.chdir(tmp_path)
