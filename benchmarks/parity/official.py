"""Running other people's research code on a CPU: modules of a checkout, its scripts, and what they differentiate."""

import copy
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NUMBERS = (0.3, 0.8, 0.55)
"""What a watched script draws, in turn, in place of uniform numbers."""
SCIPY = "scipy.ndimage.interpolation"
"""Gone from scipy; only DC's augmentation of digits takes it."""


@dataclass
class Line:
    """One comparison.

    Args:
        part: what kind of thing is compared.
        what: the thing, in words.
        official: where theirs stands: repository and file.
        difference: largest difference, relative where ``what`` does not say otherwise; ``None`` where it was not run.
        tolerance: up to which the two are called equal.
        note: why they differ, or what was not run.
    """

    part: str
    what: str
    official: str
    difference: float | None
    tolerance: float = 1e-4
    note: str = ""

    @property
    def verdict(self) -> str:
        """``equal``, ``differs`` or ``not run``."""
        return "not run" if self.difference is None else "equal" if self.difference <= self.tolerance else "differs"


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference of two tensors relative to the norm of theirs."""
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm().clamp_min(1e-12))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a network the weights of another whose layers of each kind come in the same order.

    Raises:
        ValueError: the layers do not correspond.
    """
    for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.BatchNorm2d):
        pairs = ([layer for layer in network.modules() if isinstance(layer, kind)] for network in (source, target))
        for given, taken in zip(*pairs, strict=True):
            for name, value in given.state_dict().items():
                wanted = taken.state_dict()[name]
                if wanted.shape != value.shape:
                    raise ValueError(f"a layer of {tuple(value.shape)} stands where ours has {tuple(wanted.shape)}")
            taken.load_state_dict(given.state_dict())


class Stop(Exception):
    """Leaves a script once it has taken the steps that were asked for."""


@dataclass
class Seen:
    """What a script differentiated and stepped: losses, parameters before their step, and gradients."""

    losses: list[float] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


class _Watched(TorchFunctionMode):
    """Keeps everything on the CPU, notes losses, and puts :data:`NUMBERS` in place of uniform ones if asked to."""

    def __init__(self, seen: Seen, fixed: bool = False) -> None:
        super().__init__()
        self.seen, self.fixed, self.drawn = seen, fixed, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        if settings.get("device") is not None:
            settings["device"] = "cpu"
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.backward:
            self.seen.losses.append(float(args[0].detach()))
        if self.fixed and func in (torch.rand, torch.randint):
            return self._number(func, args, settings)
        return func(*(("cpu" if isinstance(a, str) and a.startswith("cuda") else a) for a in args), **settings)

    def _number(self, func: Any, args: Sequence[Any], settings: dict[str, Any]) -> Tensor:
        """Return one number for all images: they are one per operation and image in the scripts, in a fixed order."""
        if func is torch.rand:
            self.drawn += 1
            return torch.full_like(func(*args, **settings), NUMBERS[self.drawn - 1])
        low, high = args[:2]
        if high - low == 1:  # the choice of the operation among one
            return torch.zeros(1, dtype=torch.int64)
        self.drawn += 1
        return torch.full_like(func(*args, **settings), low + int(NUMBERS[self.drawn - 1] * (high - low)))


@contextmanager
def checkout(folder: Path, *missing: str, **given: Any) -> Iterator[None]:
    """Import from a checkout within the block, with seed 0; libraries that are not needed here may be missing.

    Args:
        folder: from where its scripts are started.
        missing: modules that are replaced by stand-ins.
        given: modules by name, with ``__`` for a dot.
    """
    names = {path.stem for path in folder.iterdir()}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}
    stand_ins: dict[str, Any] = {name: MagicMock() for name in missing}
    stand_ins |= {name.replace("__", "."): module for name, module in given.items()}
    imports = patch.dict(sys.modules, stand_ins), patch.object(sys, "path", [str(folder), *sys.path])
    with imports[0], imports[1], torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] in names]:
                del sys.modules[name]
            sys.modules.update(hidden)


@contextmanager
def watched(steps: int = 1, fixed: bool = False) -> Iterator[Seen]:
    """Note what is differentiated within the block, and leave it after so many optimizer steps.

    Args:
        steps: of SGD or Adam.
        fixed: draw :data:`NUMBERS` instead of uniform numbers.
    """
    seen = Seen()

    def step(optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            seen.parameters.append(parameter.detach().clone())
            seen.gradients.append(parameter.grad.clone())
        if len(seen.parameters) >= steps:
            raise Stop

    with ExitStack() as kinds:
        for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):  # each: a new one is hooked into its class
            kinds.enter_context(patch.object(kind, "step", step))
        with suppress(Stop), _Watched(seen, fixed):
            yield seen


def run_script(folder: Path, script: str, arguments: Sequence[str], replaced: Mapping[str, Any]) -> None:
    """Run a script of a checkout as a program, in an empty folder, with functions of its ``utils`` replaced."""
    utils = import_module("utils")
    for name, value in replaced.items():
        setattr(utils, name, value)
    with TemporaryDirectory() as place, chdir(place), patch.object(sys, "argv", [script, *arguments]):
        runpy.run_path(str(folder / script), run_name="__main__")


def copies_of(network: nn.Module) -> Callable[..., nn.Module]:
    """Return a function that returns copies of a network, whatever it is asked for."""
    return lambda *args, **kwargs: copy.deepcopy(network)
