"""Networks: parameters, and the logits of the same weights."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from lightning_dd.models import build_network
from parity.official import Line, checkout, copy_weights, relative

SHAPE = (3, 32, 32)


def compare(what: str, official: str, theirs: nn.Module, architecture: str) -> list[Line]:
    """Return the lines of a network of theirs and of ours, for 10 classes at 32 pixels."""
    ours = build_network(architecture, 10, SHAPE, seed=0)
    counts = [sum(weight.numel() for weight in network.parameters()) for network in (ours, theirs)]
    what = f"{what}, ours `{architecture}`"
    lines = [Line("networks", f"{what}: parameters", official, abs(counts[0] / counts[1] - 1), 0.0)]
    try:
        copy_weights(theirs, ours)
    except ValueError as error:
        return [*lines, Line("networks", f"{what}: logits", official, 1.0, note=str(error))]
    images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    for layer in (layer for network in (ours, theirs) for layer in network.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0  # statistics of these images, whatever fraction each side takes
    difference = 0.0
    with torch.no_grad():
        for train in (True, False):
            outputs = [network.train(train)(images) for network in (ours, theirs)]
            difference = max(difference, relative(*outputs))
    return [*lines, Line("networks", f"{what}: logits", official, difference)]


def dc_family(folder: Path) -> list[Line]:
    """ConvNet, AlexNet, VGG11 and ResNet18 of DatasetCondensation or mtt-distillation, which share their forms."""
    official = f"{folder.name}/networks.py"
    with checkout(folder):
        module = import_module("networks")
        convnet = module.ConvNet(3, 10, 128, 3, "relu", "instancenorm", "avgpooling", SHAPE[1:])
        return [
            *compare("ConvNet", official, convnet, "convnet:width=128"),
            *compare("AlexNet", official, module.AlexNet(3, 10), "alexnet"),
            *compare("VGG11", official, module.VGG11(3, 10), "vgg11_bn:norm=instance"),
            *compare("ResNet18", official, module.ResNet18(3, 10), "resnet18:zero_init_last=false,norm=instance"),
        ]


def frepo(folder: Path) -> list[Line]:
    """FRePo's network, from its PyTorch branch."""
    if not (folder / "lib_torch").exists():
        return [Line("networks", "FRePo's conv", "FRePo", None, note="the checkout is not of the PyTorch branch")]
    with checkout(folder):
        make: Callable[..., nn.Module] = import_module("lib_torch.networks").Conv
        official = "FRePo (branch torch)/lib_torch/networks.py"
        return [
            line
            for theirs, ours in (("batch", "batch"), ("identity", "none"))
            for line in compare(
                f"conv, {ours}",
                official,
                make(3, 10, 128, 3, "relu", theirs, "avgpooling", SHAPE[1:]),
                f"conv:width=128,norm={ours}",
            )
        ]


def torchvision_resnet18(folder: Path) -> list[Line]:
    """ResNet-18 of SRe2L and RDED: torchvision's with a stem for small images, as SRe2L's script makes it."""
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    return compare("torchvision's ResNet-18, CIFAR stem", "SRe2L/recover_cifar.py", theirs, "torchvision/resnet18")
