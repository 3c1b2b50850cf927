"""What of FRePo's main branch only jax can run: its augmentations, first weights, LAMB and learning rates."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from scipy.stats import ks_2samp

from lightning_dd.augment.frepo import OPERATIONS, Draw, apply
from lightning_dd.distillers import FRePo
from lightning_dd.models import build_network
from parity import recipes
from parity.official import Line, Stop, checkout, relative

_THINGS = {
    "augmentations": ("FRePo's family", "FRePo/lib/dataset/augmax"),
    "networks": ("conv's first weights", "FRePo/lib/models/networks.py"),
    "recipes": ("FRePo's LAMB", "FRePo/lib/datadistillation/frepo.py"),
}
_DRAWS, _LEVEL = 4000, 1.95 * (2 / 4000) ** 0.5
"""Draws a side, and the Kolmogorov-Smirnov distance that one pair of equal distributions in a thousand exceeds."""
_MISSING = ("tensorflow", "tensorflow_datasets", "clu", "fire", "ml_collections", "lib.dataset.dataloader")
_STEPS, _NETWORKS = 20, 4


def all_of_it(folder: Path) -> list[Line]:
    """Return every comparison that needs jax, or lines that say it is missing."""
    if any(find_spec(name) is None for name in ("jax", "flax", "optax", "einops")):
        return [Line(part, what, official, None, note="needs jax") for part, (what, official) in _THINGS.items()]
    import flax.training.checkpoints  # before stand-ins for tensorflow, which it would take  # noqa: F401

    return [*augmentations(folder), *first_weights(folder), *lamb(folder), *students(folder)]


def augmentations(folder: Path) -> list[Line]:
    """Every operation of FRePo's family, as distributions.

    An image holds each pixel's column, its row, and a random pattern. So the values at nine places of many augmented
    images say where those places came from, what stands outside the image, and what was added or scaled; the share of
    empty pixels says how large a hole is.
    """
    import jax

    side = torch.arange(1.0, 33.0)
    pattern = torch.rand(32, 32, generator=torch.Generator().manual_seed(5))
    image = torch.stack([side.expand(32, 32), side[:, None].expand(32, 32), pattern])
    images, ones = image.expand(_DRAWS, -1, -1, -1), torch.ones(_DRAWS, 1, 32, 32)
    official, lines = _THINGS["augmentations"][1], []
    with checkout(folder, *_MISSING):
        make = import_module("lib.dataset.augmax").get_aug_by_name
        for name, operation in OPERATIONS.items():
            augment = make(name)

            def theirs(batch: torch.Tensor, augment: Any = augment) -> torch.Tensor:
                found = augment(jax.random.PRNGKey(0), batch.permute(0, 2, 3, 1).numpy())
                return torch.from_numpy(np.array(found)).permute(0, 3, 1, 2)

            def ours(batch: torch.Tensor, operation: Any = operation) -> torch.Tensor:
                return apply(batch, Draw(operation, 0))

            places = [_places(side(images)) for side in (ours, theirs)]
            distance = max(ks_2samp(*pair, method="asymp").statistic for pair in zip(*places, strict=True))
            what = f"FRePo's {name}: {_DRAWS} images (Kolmogorov-Smirnov)"
            lines.append(Line("augmentations", what, official, float(distance), _LEVEL))
            if name in ("crop", "rotate", "translate"):
                own, their = (float(side(ones).min()) for side in (ours, theirs))
                what = f"FRePo's {name}: an image of ones, smallest value (absolute)"
                lines.append(Line("augmentations", what, official, abs(own - their)))
    return lines


def first_weights(folder: Path) -> list[Line]:
    """Standard deviation and range of the weights and biases that ``conv`` starts with, layer by layer."""
    import jax

    with checkout(folder, *_MISSING):
        model = import_module("lib.models.utils").create_model("conv", 10, width=128, depth=3, output="feat_fc")
        initialised = import_module("lib.training.utils").initialized
        theirs = [initialised(jax.random.PRNGKey(seed), 32, 3, model) for seed in range(_NETWORKS)]
    networks = [build_network("conv:width=128,norm=none", 10, (3, 32, 32), seed) for seed in range(_NETWORKS)]
    official, lines = _THINGS["networks"][1], []
    for place, name in enumerate(["Conv_0", "Conv_1", "Conv_2", "Dense_0"]):
        layers = [[*network.convs, network.head][place] for network in networks]  # type: ignore[misc]
        own = torch.stack([layer.weight.detach().flatten() for layer in layers])
        their = torch.from_numpy(np.array([network[name]["kernel"].ravel() for network in theirs]))
        if own.shape != their.shape:
            raise ValueError(f"{name} has {their.shape[1]} weights, ours {own.shape[1]}")
        biases = [layer.bias.detach().abs().max() for layer in layers]
        biases += [torch.tensor(float(abs(network[name]["bias"]).max())) for network in theirs]
        differences = {
            "standard deviation": abs(float(own.std() / their.std()) - 1),
            "largest": abs(float(own.max() / their.max()) - 1),
            "biases": float(max(biases)),
        }
        for measure, difference in differences.items():
            what = f"conv's first weights, layer {place + 1}: {measure}"
            # Three standard errors of the first layer's deviation, of four networks with 3,456 weights there.
            lines.append(Line("networks", what, official, difference, 0.02))
    return lines


def lamb(folder: Path) -> list[Line]:
    """Twenty outer updates of images and labels from equal gradients, and the learning rate of each."""
    import flax
    import jax

    official, generator = _THINGS["recipes"][1], torch.Generator().manual_seed(6)
    start = {"x_proto": torch.randn(20, 8, 8, 3, generator=generator), "y_proto": torch.eye(10).repeat(2, 1) - 0.1}
    gradients = [
        {name: torch.randn(value.shape, generator=generator) for name, value in start.items()} for _ in range(_STEPS)
    ]
    with checkout(folder, *_MISSING):
        module, create = import_module("lib.datadistillation.frepo"), MagicMock(side_effect=Stop)
        state_of: Callable[..., None] = lambda *_: None  # noqa: E731
        settings = SimpleNamespace(learning_rate=3e-4, optimizer="lamb", eval_batch_size=1)
        with patch.object(module, "create_proto_state", create), suppress(Stop):
            module.proto_train_and_evaluate(
                *(settings, None, state_of, state_of, (None, None), ""),
                **{"num_train_steps": _STEPS, "steps_per_epoch": 1, "writer": MagicMock()},
            )
        rate = create.call_args.args[2]
        holder = module.ProtoHolder(*(value.numpy() for value in start.values()), 20)
        with flax.config.temp_flip_flag("return_frozendict", True):  # as flax was then
            state = module.create_proto_state(jax.random.PRNGKey(0), holder, rate, **create.call_args.kwargs)
        for gradient in gradients:
            state = state.apply_gradients(grads={name: value.numpy() for name, value in gradient.items()})
    moved = {name: torch.from_numpy(np.array(value)) for name, value in state.params.items()}
    learned = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    ours: Any = SimpleNamespace(lr=3e-4, log_scale=None, trainer=SimpleNamespace(max_steps=_STEPS))
    ours.synthetic = SimpleNamespace(parameter_groups=lambda lr: [{"params": list(learned.values()), "lr": lr}])
    made, rates = FRePo.configure_optimizers(ours), []
    for gradient in gradients:
        rates.append(float(made["optimizer"].param_groups[0]["lr"]))
        for name, value in gradient.items():
            learned[name].grad = value
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    lines = [
        Line(
            "recipes",
            f"FRePo's LAMB, {_STEPS} steps: {what}",
            official,
            relative(learned[name] - start[name], moved[name] - start[name]),
        )
        for name, what in (("x_proto", "change of images"), ("y_proto", "change of labels"))
    ]
    theirs = [float(rate(step)) for step in range(_STEPS)]
    return lines + recipes.compare(f"FRePo's LAMB, {_STEPS} steps", official, rates, theirs)[1:]


def students(folder: Path) -> list[Line]:
    """Steps and learning rates of the students of ``script/eval.py``, by the number of images."""
    import jax

    lines: list[Line] = []
    for rows in (10, 500, 2000):
        with checkout(folder, *_MISSING):
            script, evaluate = import_module("script.eval"), MagicMock(side_effect=Stop)
            answers: dict[str, Any] = {
                "get_dataset": lambda *_: ((None, None), None, None, None),
                "load_proto": lambda *_, rows=rows, **__: (np.zeros((rows, 1)), np.zeros((rows, 10))),
                "proto_evaluate": evaluate,
            }
            with patch.multiple(script, **answers), patch.object(jax, "device_count", lambda *_: 1), suppress(Stop):
                script.main("cifar10", ckpt_dir="")
        called = evaluate.call_args
        # Among their arguments is the partial function that makes a student's first state and optimizer.
        rate, steps = called.args[3].keywords["learning_rate_fn"], called.kwargs["num_online_eval_updates"]
        theirs = np.asarray(jax.vmap(rate)(np.arange(steps))).tolist()
        lines += recipes.compare(
            f"frepo, {rows} images", "FRePo/script/eval.py", recipes.our_rates("frepo", rows), theirs
        )
    return lines


def _places(images: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Return the values at nine places of every channel to three digits, and the share of empty pixels."""
    values = (images[:, :, [0, 16, 31]][..., [0, 16, 31]].flatten(1).double() * 1000).round()
    return [*values.T.numpy(), (images == 0).double().mean((1, 2, 3)).numpy()]
