"""Threads beside other work: how long they wait awake, and which work takes one alone."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_dd.students.loop import step_flops
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils import threads
from lightning_dd.utils.threads import SMALL_STEP, SPINNING, bound_spinning, threads_for


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_waiting_awake_is_bounded_before_torch_is_loaded_and_never_over_what_the_user_says(said, monkeypatch):
    environment = dict(said)
    monkeypatch.setattr(threads.os, "environ", environment)
    bound_spinning()  # torch is loaded here, and OpenMP has read its settings
    assert environment == said
    monkeypatch.setattr(threads, "sys", SimpleNamespace(modules=sys.modules.keys() - {"torch"}))
    bound_spinning()
    assert environment == (said or SPINNING)


def test_small_steps_take_one_thread_and_large_ones_all(two_threads):
    for flops, expected in ((SMALL_STEP - 1, 1), (SMALL_STEP, 2), (None, 2)):
        with threads_for(flops):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2


def test_what_a_step_takes_is_three_times_its_forward_pass():
    # 3 x 3 kernels from 1 to 4 channels on 8 x 8 pixels, from 4 to 4 on 4 x 4, and 16 features to 3 classes.
    forward = 2 * (64 * 9 * 4 + 16 * 9 * 4 * 4 + 16 * 3)
    recipe = Recipe(batch_size=5)
    assert step_flops("convnet:width=4,depth=2,norm=none", recipe, 100, 3, (1, 8, 8)) == 3 * 5 * forward
    assert step_flops("convnet:width=4,depth=2,norm=none", recipe, 2, 3, (1, 8, 8)) == 3 * 2 * forward
