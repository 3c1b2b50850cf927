"""Loss and gradient by the images of every method, of one outer step on the same images, network and numbers.

In float32 an activation within rounding of 0 may fall on either side of a ReLU, here in about one run of ten; the
gradient of one image then differs by about a hundredth. In float64 DM's gradients are the same bit for bit.
"""

from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_dd.augment.frepo import Draw
from lightning_dd.augment.siamese import TRANSFORMS
from lightning_dd.data.images import Batch
from lightning_dd.distillers import DC, DM, SRe2L
from lightning_dd.distillers.sre2l import Windows
from lightning_dd.losses import krr
from lightning_dd.losses.labels import student_loss
from lightning_dd.losses.trajectory import InnerStep, Stretch, constant_memory, functional_loss, parameter_vector
from lightning_dd.models import build_network
from parity.official import NUMBERS, SCIPY, Line, checkout, copies_of, copy_weights, relative, run_script, watched

CLASSES, PER_CLASS, SHAPE = 3, 12, (3, 32, 32)


def real_images() -> Batch:
    """Return random normalised images in blocks by class, and their classes."""
    images = torch.randn(CLASSES * PER_CLASS, *SHAPE, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(CLASSES).repeat_interleave(PER_CLASS))


def their_data(*more: Any) -> tuple[Any, ...]:
    """Return what the scripts' ``get_dataset`` returns; ``more`` is what some of them add."""
    pairs = list(zip(*real_images(), strict=True))
    train = [(image, int(label)) for image, label in pairs]
    return (3, (32, 32), CLASSES, list("abc"), [0.5] * 3, [0.25] * 3, train, train, None, *more)


def matched() -> tuple[nn.Module, Any]:
    """Return a ConvNet of theirs, and ours with the same weights; call within :func:`checkout`."""
    theirs = import_module("networks").ConvNet(3, CLASSES, 16, 3, "relu", "instancenorm", "avgpooling", (32, 32))
    ours = build_network("convnet:width=16", CLASSES, SHAPE, seed=0)
    copy_weights(theirs, ours)
    return theirs, ours


def our_matching(distiller: Any, network: Any, images: Tensor, draw: Draw | None = None) -> tuple[float, Tensor]:
    """Return our loss and gradient of an outer step of DC, DSA or DM on the common images."""
    images = images.clone().requires_grad_()
    if draw is not None:
        distiller.draw_siamese = lambda num_classes: [draw] * num_classes
    labels = one_hot(torch.arange(CLASSES).repeat_interleave(len(images) // CLASSES)).float()
    (loss,) = distiller.outer_loss(network, images, labels, real_images()).values()
    return float(loss.detach()), torch.autograd.grad(loss, images)[0]


def compare(what: str, official: str, ours: tuple[float, Tensor], loss: float, gradient: Tensor) -> list[Line]:
    """Return the lines of a loss and of its gradient."""
    return [
        Line("methods", f"{what}: loss", official, abs(ours[0] - loss) / abs(loss)),
        Line("methods", f"{what}: gradient by the images", official, relative(ours[1], gradient), 1e-3),
    ]


def class_matching(folder: Path) -> list[Line]:
    """DC, DM, and DSA with each operation of its family, from the scripts of DatasetCondensation."""
    lines = []
    runs: list[tuple[str, str, type[DC | DM], str | None]] = [
        ("DC", "main.py", DC, None),
        ("DM", "main_DM.py", DM, None),
    ]
    runs += [(f"DSA, {name}", "main.py", DC, name) for name in TRANSFORMS]
    for what, script, cls, operation in runs:
        arguments = ["--ipc", "10", "--num_eval", "1", "--batch_real", str(PER_CLASS)]
        arguments += ["--dsa_strategy", operation or "None", *(["--method", "DSA"] if operation else [])]
        with checkout(folder, SCIPY):
            theirs, ours = matched()
            answers = {
                "get_dataset": lambda *a, **k: their_data(),
                "get_network": copies_of(theirs),
                "evaluate_synset": _no_students,
            }
            answers["DiffAugment"] = _with_fixed_numbers(import_module("utils").DiffAugment)
            with watched() as seen:
                run_script(folder, script, arguments, answers)
        draw = None if operation is None else Draw(partial(drawn, operation), 0)
        found = our_matching(cls(real_per_class=PER_CLASS, augment="none"), ours, seen.parameters[0], draw)
        lines += compare(what, f"DatasetCondensation/{script}", found, seen.losses[0], seen.gradients[0])
    return lines


def mtt(folder: Path) -> list[Line]:
    """MTT with three inner steps, from its script; the step size learns as well."""
    wandb = MagicMock()
    wandb.init.side_effect = lambda **given: setattr(wandb.config, "_items", vars(given["config"]))
    names = (
        "--pix_init",
        "--no_aug",
        "--buffer_path",
        "--expert_epochs",
        "--syn_steps",
        "--max_start_epoch",
        "--num_eval",
    )
    with checkout(folder, SCIPY, "kornia", wandb=wandb), TemporaryDirectory() as buffers:
        experts = [matched() for _ in range(2)]
        epochs = [[weight.detach().clone() for weight in theirs.parameters()] for theirs, _ in experts]
        same = {label: label for label in range(CLASSES)}
        answers = {
            "get_dataset": lambda *a, **k: their_data({}, same, {}),
            "get_network": copies_of(experts[0][0]),
            "evaluate_synset": _no_students,
        }
        place = Path(buffers) / "CIFAR10_NO_ZCA" / "ConvNet"
        place.mkdir(parents=True)
        torch.save([epochs], place / "replay_buffer_0.pt")
        values = ("noise", "True", buffers, "1", "3", "1", "1")
        arguments = [word for pair in zip(names, values, strict=True) for word in pair]
        with watched(steps=2) as seen:
            run_script(folder, "distill.py", arguments, answers)
    images, step_size = (value.clone().requires_grad_() for value in seen.parameters)
    network = experts[0][1]
    start, target = (parameter_vector(ours) for _, ours in experts)
    steps = [InnerStep(torch.arange(CLASSES), lambda images: images)] * 3
    loss_of = functional_loss(network, partial(student_loss, label_kind="hard"))
    loss = constant_memory(Stretch(loss_of, start, target, steps), images, torch.eye(CLASSES), step_size)
    gradients = torch.autograd.grad(loss, [images, step_size])
    what, official = "MTT, 3 inner steps", "mtt-distillation/distill.py"
    ours, alpha = (float(loss.detach()), gradients[0]), relative(gradients[1], seen.gradients[1])
    return [
        *compare(what, official, ours, seen.losses[0], seen.gradients[0]),
        Line("methods", f"{what}: gradient by the step size", official, alpha, 1e-3),
    ]


def sre2l(folder: Path) -> list[Line]:
    """One recovery iteration of SRe2L on CIFAR-100, without roll."""
    official = "SRe2L/SRe2L/*small_dataset/recover_cifar.py"
    teacher = build_network("convnet:width=16,norm=batch", 100, SHAPE, seed=0)
    teacher(torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(2)))  # statistics to match
    teacher.eval().requires_grad_(requires_grad=False)
    settings = SimpleNamespace(batch_size=100, iteration=1, jitter=0, lr=0.25, r_bn=0.01, first_bn_multiplier=10.0)
    with checkout(folder / "SRe2L" / "*small_dataset"), watched() as seen:
        settings.verifier = settings.store_best_images = False
        import_module("recover_cifar").get_images(settings, teacher, None, 0)
    for layer in teacher.modules():
        layer._forward_hooks.clear()
    images = seen.parameters[0].clone().requires_grad_()
    windows = Windows(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(1).bool(), torch.zeros(1, 2).long())
    ours: Any = SimpleNamespace(first_bn_weight=10.0)
    fit, distance = SRe2L.recovery_loss(ours, images, torch.eye(100), windows, teacher)
    loss = fit + 0.01 * distance
    found = float(loss.detach()), torch.autograd.grad(loss, images)[0]
    return compare("SRe2L, recovery", official, found, seen.losses[0], seen.gradients[0])


def frepo(folder: Path) -> list[Line]:
    """The regression and the labels' margin of FRePo, from its PyTorch branch."""
    official = "FRePo (branch torch)/script/distill_torch.py"
    missing = ("fire", "ml_collections", "absl", "tensorflow", "clu", "lib.dataset.dataloader", SCIPY)
    if not (folder / "script" / "distill_torch.py").exists():
        return [Line("methods", "FRePo", official, None, note="the checkout is not of the PyTorch branch")]
    with checkout(folder, *missing, torch___vmap_internals=MagicMock(vmap=torch.func.vmap)):
        module = import_module("script.distill_torch")
        network = import_module("lib_torch.networks").Conv(3, 10, 16, 3, "relu", "batch", "avgpooling", (32, 32))
        ours = build_network("conv:width=16", 10, SHAPE, seed=0).eval()
        copy_weights(network, ours)
        generator = torch.Generator().manual_seed(3)
        images, real = (torch.randn(count, *SHAPE, generator=generator) for count in (20, 40))
        labels = torch.randn(20, 10, generator=generator) * 0.1
        element = module.PoolElement(
            lambda: network, lambda model: None, lambda optimizer: None, nn.MSELoss(), 20, 100, 0, "cpu"
        )
        leaves = [images.clone().requires_grad_(), labels.clone().requires_grad_()]
        theirs = element.nfr(*leaves, real, use_flip=True)
        margin = module.lb_margin_th(leaves[1]).mean()
        their_gradients = torch.autograd.grad(theirs.square().sum() + margin, leaves)
    own = [images.clone().requires_grad_(), labels.clone().requires_grad_()]
    ours.requires_grad_(requires_grad=False)
    support = torch.cat([own[0], own[0].flip(-1)])
    prediction = krr.krr_predict(ours.features(support), own[1].repeat(2, 1), ours.features(real)).values
    our_margin = krr.label_margin_loss(own[1])
    gradients = torch.autograd.grad(prediction.square().sum() + our_margin, own)
    # Theirs solves in float32 with a kernel whose condition number is near 1e6; ours in float64.
    return [
        Line("methods", "FRePo: prediction with flips", official, relative(prediction, theirs), 1e-2),
        Line("methods", "FRePo: margin of the labels", official, relative(our_margin, margin)),
        Line("methods", "FRePo: gradient by the images", official, relative(gradients[0], their_gradients[0]), 5e-2),
        Line("methods", "FRePo: gradient by the labels", official, relative(gradients[1], their_gradients[1]), 1e-2),
    ]


def drawn(operation: str, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Apply an operation of ours with the numbers that theirs gets; there is no randomness left for a generator."""
    numbers = torch.tensor(NUMBERS).view(3, 1).expand(3, len(images))
    if operation == "crop":  # theirs draws the shift down first
        numbers = numbers[[1, 0, 2]]
    return TRANSFORMS[operation](images, numbers)


def _with_fixed_numbers(augment: Any) -> Any:
    """Return their augmentation with :data:`NUMBERS` in place of what it draws."""

    def fixed(*args: Any, **kwargs: Any) -> Any:
        with watched(fixed=True):
            return augment(*args, **kwargs)

    return fixed


def _no_students(*args: Any, **kwargs: Any) -> tuple[None, float, float]:
    return None, 0.0, 0.0
