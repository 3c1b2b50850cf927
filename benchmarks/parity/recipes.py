"""How students are trained: steps, and the learning rate of every step."""

import sys
from contextlib import ExitStack, chdir, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import nn

from lightning_dd.distillers.dc import LOOPS
from lightning_dd.students.recipe import protocol, warmup_cosine
from parity.official import SCIPY, Line, Stop, checkout, run_script, watched

_CELLS = (("cifar10", 10, 10), ("cifar100", 1, 100), ("tinyimagenet", 50, 200), ("imagenet-1k", 50, 1000))


def our_rates(name: str, rows: int, classes: int = 10, architecture: str = "convnet") -> list[float]:
    """Return our learning rate at every step for a set of so many images."""
    recipe = protocol(name).suited_to(architecture)
    steps = recipe.steps_for(rows, classes)
    optimizer = recipe.build_optimizer(nn.Linear(1, 1))
    schedule = recipe.scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


def compare(what: str, official: str, ours: list[float], theirs: list[float]) -> list[Line]:
    """Return the lines of two curves: how many steps, and the rate where both are running."""
    both = list(zip(ours, theirs, strict=False))
    rate = max(abs(own - their) for own, their in both) / max(theirs)
    return [
        Line("recipes", f"{what}: steps", official, abs(len(ours) / len(theirs) - 1), 0.0, f"theirs {len(theirs)}"),
        Line("recipes", f"{what}: learning rate", official, rate),
    ]


def evaluations(folder: Path) -> list[Line]:
    """``evaluate_synset`` of DatasetCondensation or mtt-distillation, at two sizes of the set."""
    official, lines = f"{folder.name}/utils.py", []
    ours_and_epochs = [("dc", 300), ("dsa", 1000)] if folder.name == "DatasetCondensation" else [("mtt", 1000)]
    with checkout(folder, SCIPY, "kornia"):
        utils = import_module("utils")
        for name, epochs in ours_and_epochs:
            for rows in (10, 500):
                rates: list[float] = []
                settings = SimpleNamespace(device="cpu", lr_net=0.01, epoch_eval_train=epochs, batch_train=256)
                with patch.object(utils, "epoch", partial(_note_rates, rates)):
                    images, labels = torch.zeros(rows, 1), torch.zeros(rows).long()
                    utils.evaluate_synset(0, nn.Linear(1, 1), images, labels, None, settings)
                lines += compare(f"{name}, {rows} images", official, our_rates(name, rows), rates)
    return lines


def dc_loops(folder: Path) -> list[Line]:
    """Outer and inner loops of DC and DSA by images per class."""
    with checkout(folder, SCIPY):
        theirs = {ipc: import_module("utils").get_loops(ipc) for ipc in LOOPS}
    same = float(theirs != LOOPS)
    return [Line("recipes", "DC's outer and inner loops at ipc 1 to 50", "DatasetCondensation/utils.py", same, 0.0)]


def sre2l(folder: Path) -> list[Line]:
    """The learning rate of SRe2L's recovery."""
    with checkout(folder / "SRe2L" / "*small_dataset"):
        policy = import_module("utils").lr_cosine_policy(1.0, 0, 1000)
        optimizer, theirs = SimpleNamespace(param_groups=[{}]), []
        for iteration in range(1000):
            policy(optimizer, iteration, iteration)
            theirs.append(float(optimizer.param_groups[0]["lr"]))
    ours = [warmup_cosine(step, 1000) for step in range(1000)]
    return compare("SRe2L's recovery, 1,000 iterations", "SRe2L/SRe2L/*small_dataset/utils.py", ours, theirs)[1:]


def sre2l_students(folder: Path) -> list[Line]:
    """SRe2L's students on CIFAR-100 at ipc 50, as relabel_cifar.sh calls the script."""
    small, loaders, make = folder / "SRe2L" / "*small_dataset", [], torch.utils.data.DataLoader
    scheduler, given = MagicMock(side_effect=Stop), MagicMock(ImageFolderIPC=lambda **_: range(5000))
    words = ["--epochs", "400", "--batch-size", "128", "--ipc", "50"]
    with ExitStack() as changes:
        for changed in (
            patch("torchvision.datasets.CIFAR100"),
            patch("torch.load"),
            patch("torch.nn.Module.load_state_dict"),
            patch("torch.optim.lr_scheduler.CosineAnnealingLR", scheduler),
            patch("torch.utils.data.DataLoader", lambda *a, **k: loaders.append(make(*a, **k))),
            checkout(small, imagenet_ipc=given),
            watched(),
        ):
            changes.enter_context(changed)
        run_script(small, "relabel_cifar.py", words, {})
    optimizer, epochs = scheduler.call_args.args[0], scheduler.call_args.kwargs["T_max"]
    schedule, theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs), []
    for _ in range(epochs):
        theirs += [optimizer.param_groups[0]["lr"]] * len(loaders[0])
        optimizer.step()
        schedule.step()
    ours = our_rates("sre2l_cifar", 5000, 100, "resnet18")
    return compare("sre2l_cifar, CIFAR-100 ipc 50", "SRe2L/SRe2L/*small_dataset/relabel_cifar.py", ours, theirs)


def rded(folder: Path) -> list[Line]:
    """RDED's students: what its arguments make of data set and ipc, and its schedule."""
    official, lines = "RDED/argument.py, validation/main.py", []
    for subset, ipc, classes in _CELLS:
        words = ["--subset", subset, "--ipc", str(ipc), "--stud-name", "resnet18", "--factor", "1"]
        with checkout(folder), TemporaryDirectory() as place, chdir(place), patch.object(sys, "argv", ["", *words]):
            arguments = import_module("argument").args
            schedule = _schedule_of(import_module("validation.main"), arguments)
        rows = ipc * classes
        each = -(-rows // arguments.re_batch_size)
        theirs = [arguments.adamw_lr * schedule(epoch) for epoch in range(arguments.re_epochs) for _ in range(each)]
        lines += compare(f"rded, {subset} ipc {ipc}", official, our_rates("rded", rows, classes, "resnet18"), theirs)
    return lines


def _note_rates(rates: list[float], mode: str, loader: Any, net: Any, optimizer: Any, *_: Any, **__: Any) -> Any:
    """Stand in for their ``epoch``: note the learning rate of every batch, and train nothing."""
    rates.extend([optimizer.param_groups[0]["lr"]] * (len(loader) if mode == "train" else 0))
    return 0.0, 0.0


def _schedule_of(module: Any, arguments: Any) -> Any:
    """Return the rule that RDED's script gives to its scheduler, and leave it there."""
    scheduler = MagicMock(side_effect=Stop)
    networks = MagicMock(side_effect=lambda **_: nn.Linear(1, 1))
    here = patch.object(nn.Module, "cuda", lambda network: network)
    with patch.multiple(module, LambdaLR=scheduler, load_model=networks), here, suppress(Stop):
        module.main(arguments)
    return scheduler.call_args.args[1]
