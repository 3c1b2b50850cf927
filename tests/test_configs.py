"""Every YAML file under configs/ is run: a new one cannot escape."""

import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_distilled, tiny_settings
from torchvision.transforms.functional import to_pil_image

import lightning_dd.distillers
from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS, RawSplit
from lightning_dd.utils.arguments import plain_values

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
SHAPES = {"MNIST": (1, 28), "FashionMNIST": (1, 28), "ImageNette": (3, 32), "ImageWoof": (3, 32)}
QUICK = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
]


@pytest.fixture
def stand_ins(monkeypatch):
    """Random pixels in place of what would have to be downloaded; the larger ones are whitened in blocks."""
    monkeypatch.setattr("lightning_dd.data.preprocess.LARGEST_BLOCK", 16)
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

        def sources(self, rows, channels=channels, side=side):
            """Files that are larger than the images."""
            for row in rows.tolist():
                with BytesIO() as file:
                    to_pil_image(torch.full((channels, 2 * side, 3 * side), row % 256, dtype=torch.uint8)).save(
                        file, "png"
                    )
                    yield str(row), file.getvalue()

        monkeypatch.setattr(cls, "read", read)
        monkeypatch.setattr(cls, "sources", sources, raising=False)
        monkeypatch.setattr(cls, "prepare_data", lambda self: None)
        monkeypatch.setattr(cls, "notes", lambda self: [])  # there are no files to speak of


def quick_distiller(content):
    """The tiny settings of the configuration's method as options."""
    cls = getattr(lightning_dd.distillers, content["model"]["class_path"])
    quick = tiny_settings(cls)
    # Configurations name full-size networks, whose every step would take seconds.
    name = "conv" if cls is lightning_dd.distillers.FRePo else "convnet"
    quick["architecture"] = f"{name}:width=4,depth=2"
    views = ["--model.init_args.labels.init_args.epochs=2"] if "TeacherLabels" in str(content) else []
    kept = ["--data.init_args.on_disk=false"] if "on_disk" in str(content.get("data")) else []
    few = ["--model.init_args.ipc=1"] if content["model"]["init_args"].get("patches", 1) > 1 else []
    return [*views, *kept, *few] + [
        f"--model.init_args.{name}={value if isinstance(value, str) else json.dumps(plain_values(value))}"
        for name, value in quick.items()
    ]


def quick_methods(content, *more):
    """An experiment's methods with tiny settings, each by its first configuration."""
    methods = {}
    for name, words in content["methods"].items():
        files = [str(CONFIGS.parent / word) if not word.startswith("--") else word for word in words]
        quick = quick_distiller(yaml.safe_load(Path(files[0]).read_text()))
        methods[name] = [*files, *QUICK, *quick, *more]
    return methods


def quick_membership(content):
    """Tiny settings of a membership experiment as options."""
    methods = quick_methods(content, "--model.init_args.ipc=1")
    settings = {"members": 60, "lengths": [1], "victims": 1, "seeds": 1, "folds": 2, "attack_rows": 20, "shadows": 0}
    options = [f"--{name}={json.dumps(value)}" for name, value in (settings | {"methods": methods}).items()]
    return [*options, "--output=report", "--accelerator=cpu", "--workers=1", "--architecture=conv:width=4,norm=none"]


def quick_continual(content):
    """Tiny settings of a continual experiment as options."""
    settings = {"steps": 2, "orders": 1, "ipc": 1, "students": 1, "student_steps": 1, "joint_steps": 1}
    settings["methods"] = quick_methods(content)
    options = [f"--{name}={json.dumps(value)}" for name, value in settings.items()]
    return [*options, "--output=report", "--accelerator=cpu", "--architectures=conv:width=4,norm=none"]


def untrained(architecture, network, *args):
    """In place of minutes of training: the network as it is, said to be good."""
    return 1.0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_runs(path, stand_ins, tmp_path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", untrained)
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)
    monkeypatch.setattr("lightning_dd.pretrained.generator.fit", lambda *args: None)
    config = ["--config", str(path)]
    if "orders" in content:
        arguments = ["continual", *config, *quick_continual(content)]
    elif "architectures" in content:
        from lightning_dd.data import MNIST5k

        file = make_distilled(data=MNIST5k).save(tmp_path / "set.safetensors")
        arguments = ["evaluate", str(file), *config, "--output=report", "--steps=1", "--seeds=1"]
    elif content.get("model", {}).get("class_path") == "Student":
        from lightning_dd.data import MNIST5k

        file = make_distilled(data=MNIST5k).save(tmp_path / "set.safetensors")
        arguments = ["fit", *config, *QUICK, f"--data.init_args.file={file}"]
    elif "members" in content:
        arguments = ["membership", *config, *quick_membership(content)]
    elif "class_path" in content.get("model", {}):
        arguments = ["fit", *config, *QUICK, *quick_distiller(content)]
    else:  # a layer: its first line says which configuration it goes over
        below = path.read_text().splitlines()[0].rpartition("layered over ")[2]
        base = yaml.safe_load((CONFIGS.parent / below).read_text())
        arguments = ["fit", "--config", str(CONFIGS.parent / below), *config, *QUICK, *quick_distiller(base)]
    assert main(arguments) == 0
    if arguments[0] == "fit" and "Student" not in path.read_text():
        assert list(Path("runs").rglob("last.safetensors"))
