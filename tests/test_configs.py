"""Every YAML file under configs/ is run: a new one cannot escape."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_distilled

from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS, RawSplit
from lightning_dd.models.pool import rest

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
SHAPES = {"MNIST": (1, 28), "FashionMNIST": (1, 28)}
QUICK = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
]
QUICK_DISTILLER = [
    "--model.init_args.real_batch_size=8",
    "--model.init_args.pool_size=1",
    "--model.init_args.probe_steps=1",
]


@pytest.fixture
def stand_ins(monkeypatch):
    """Random pixels in place of what would have to be downloaded."""
    for name, cls in DATA_SETS.items():
        if name == "MNIST5k":
            continue
        channels, side = SHAPES.get(name, (3, 16))
        classes = 100 if name == "CIFAR100" else 10

        def read(self, *, train, channels=channels, side=side, classes=classes):
            generator = torch.Generator().manual_seed(int(train))
            labels = torch.arange(classes).repeat(12)
            images = torch.randint(0, 256, (len(labels), channels, side, side), generator=generator).to(torch.uint8)
            return RawSplit(images, labels, tuple(map(str, range(classes))))

        monkeypatch.setattr(cls, "read", read)
        monkeypatch.setattr(cls, "prepare_data", lambda self: None)


def untrained(architecture, network, *args):
    """In place of minutes of training: the network as it is, said to be good."""
    rest(network)
    return 1.0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_runs(path, stand_ins, tmp_path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    config = ["--config", str(path)]
    if "architectures" in content:
        from lightning_dd.data import MNIST5k

        file = make_distilled(data=MNIST5k).save(tmp_path / "set.safetensors")
        arguments = ["evaluate", str(file), *config, "--output=report", "--steps=1", "--seeds=1"]
    elif content.get("model", {}).get("class_path") == "Student":
        from lightning_dd.data import MNIST5k

        file = make_distilled(data=MNIST5k).save(tmp_path / "set.safetensors")
        arguments = ["fit", *config, *QUICK, f"--data.init_args.file={file}"]
    elif "model" in content:
        arguments = ["fit", *config, *QUICK, *QUICK_DISTILLER]
    else:  # a layer: its first line says which configuration it goes over
        below = path.read_text().splitlines()[0].rpartition("layered over ")[2]
        arguments = ["fit", "--config", str(CONFIGS.parent / below), *config, *QUICK, *QUICK_DISTILLER]
        monkeypatch.setattr("lightning_dd.pretrained.architectures._train", untrained)
    assert main(arguments) == 0
    if arguments[0] == "fit" and "Student" not in path.read_text():
        assert list(Path("runs").rglob("last.safetensors"))
