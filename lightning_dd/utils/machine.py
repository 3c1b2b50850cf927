"""What a process does for speed on a machine that others use, too. Importing this imports nothing heavy."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SPINNING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long OpenMP's threads wait awake for each other: turns of a loop (GNU, about 40 microseconds) or ms (LLVM)."""
SMALL_STEP = 4e9
"""FLOPs of a training step below which a second thread saves little and costs much beside busy processes."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def spinning() -> dict[str, str]:
    """Return what lets a thread that waits for others fall asleep soon; nothing where the environment says how.

    A thread of GNU's OpenMP waits awake for ten milliseconds. That costs nothing on a quiet machine. Beside a busy
    process the thread that is waited for needs that very core, and a step of a small network takes many times as long.
    """
    return {} if os.environ.keys() & {*SPINNING, "OMP_WAIT_POLICY"} else SPINNING


def settle() -> None:
    """Bound spinning in this process, if torch is not loaded yet (OpenMP reads it then), and let it keep its memory.

    glibc maps every block of megabytes anew, as those of a training step's maps, and the kernel fills it with zeros:
    up to half of the time of a step on a CPU. With mapping off, the blocks a step has freed serve the next one, up to
    2 GB of them. Nothing is done where the environment speaks of malloc.
    """
    if "torch" not in sys.modules:
        os.environ.update(spinning())
    said = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform == "linux" and not said:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # glibc has it
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def threads_for(flops: float | None) -> Iterator[None]:
    """Run a block whose steps have so many FLOPs, if that is known: small steps take one thread.

    The work alone decides, so that it gives the same digits on any number of cores and beside any number of workers.
    """
    if flops is None or flops >= SMALL_STEP:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_of(device: "torch.device") -> int | None:
    """Return the bytes of memory a device has in all, ``None`` if that cannot be asked."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (AttributeError, ValueError, OSError):
        return None
