"""Small tools: what is silenced is heard again afterwards, and a file is there whole or not at all."""

import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_dd
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.files import require_writable, write_atomically
from lightning_dd.utils.silence import quiet_trainers, quieten


def test_lightning_speaks_again_after_a_block_or_a_function_that_is_quiet():
    lightning = logging.getLogger("pytorch_lightning")
    before = lightning.level

    @quiet_trainers()
    def fails():
        assert lightning.level == logging.WARNING
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert lightning.level == before


def test_own_warnings_have_no_place_in_the_code_and_others_keep_it(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quieten()
    own, others = (
        warnings.formatwarning("left out", UserWarning, file, 3) for file in (lightning_dd.__file__, __file__)
    )
    assert own == "warning: left out\n"
    assert others.startswith(f"{__file__}:3: ")


def test_a_file_appears_whole_with_ordinary_permissions_or_not_at_all(tmp_path):
    path, plain = tmp_path / "new" / "set.safetensors", tmp_path / "plain"
    plain.touch()
    write_atomically(path, lambda temporary: save_file({"a": torch.ones(2)}, temporary))
    assert path.stat().st_mode == plain.stat().st_mode

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("no space left")

    with pytest.raises(UserError, match=r"cannot write '.*set.safetensors': no space left"):
        write_atomically(path, fails)
    assert [file.name for file in path.parent.iterdir()] == ["set.safetensors"]
    assert load_file(path)["a"].tolist() == [1, 1]
    with pytest.raises(UserError, match="cannot write to folder"):
        require_writable(plain / "below")
