"""A process beside others: how long its threads wait awake, which work takes one alone, and the memory it keeps."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_dd.students.loop import step_flops
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils import machine
from lightning_dd.utils.machine import SMALL_STEP, SPINNING, settle, threads_for


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_waiting_awake_is_bounded_before_torch_is_loaded_and_never_over_what_the_user_says(said, monkeypatch):
    environment = dict(said)
    monkeypatch.setattr(machine.os, "environ", environment)
    settle()  # torch is loaded here, and OpenMP has read its settings
    assert environment == said
    monkeypatch.setattr(machine, "sys", SimpleNamespace(modules=sys.modules.keys() - {"torch"}, platform="linux"))
    settle()
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


@pytest.mark.parametrize("said", [{}, {"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.check=1"}])
def test_freed_memory_is_kept_where_the_user_says_nothing(said, monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)))
    monkeypatch.setattr(machine.os, "environ", dict(said))
    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    settle()
    assert asked == ([] if said else [(-4, 0), (-1, 2**31 - 1)])  # M_MMAP_MAX, M_TRIM_THRESHOLD


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_blocks_of_megabytes_are_not_mapped_anew():
    program = "from lightning_dd.utils.machine import settle; {}; import resource, torch; torch.set_num_threads(1)\n"
    program += "def steps():\n for _ in range(20): torch.ones(2**24)\n"  # of 64 MB
    program += "steps(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; steps()\n"
    program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    faults = [
        int(subprocess.run([sys.executable, "-c", program.format(call)], check=True, capture_output=True).stdout)
        for call in ("settle()", "pass")
    ]
    assert faults[0] < faults[1] / 10
