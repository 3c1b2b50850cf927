"""Small tools: what is silenced is heard again afterwards."""

import logging

import pytest

from lightning_dd.utils.silence import quiet_trainers


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
