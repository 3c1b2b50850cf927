"""Teachers: published trainings, weights of libraries, and files of weights."""

import pickle

import pytest
import torch
import torchvision
from helpers import TinyData, other_shapes
from safetensors.torch import save_file
from torch import nn

from lightning_dd.data.cache import cache_folder
from lightning_dd.data.imagenet import imagenet_names
from lightning_dd.data.images import DataFacts
from lightning_dd.models import build_network
from lightning_dd.pretrained import ClassifierRecipe, Teacher, classifier
from lightning_dd.pretrained.task import Task, train_once
from lightning_dd.pretrained.weights import fetch_weights, fit_weights
from lightning_dd.utils.errors import UserError

ARCHITECTURE = "torchvision/resnet18"


def task(**kwargs):
    source = TinyData(**({"val_fraction": 0.25} | kwargs))
    source.setup("fit")
    return Task.of(source)


def published_resnet(classes, channels=3):
    """ResNet-18 as SRe2L and RDED change torchvision's for small images."""
    model = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model.eval()


# ---- trainings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "steps", "rates"),
    [
        ("sre2l_cifar", 50_000, 78_200, {0: 0.1, 391 * 100: 0.05}),  # 391 steps an epoch
        ("sre2l_tiny", 100_000, 19_550, {391 * 5: 0.2, 391 * 4: 0.16}),  # five epochs of warm-up
    ],
)
def test_published_trainings_have_the_length_and_the_rates_of_their_code(name, rows, steps, rates):
    recipe = ClassifierRecipe(protocol=name).recipe()
    assert recipe.steps_for(rows, 10) == steps
    optimizer = recipe.build_optimizer(nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], len(optimizer.param_groups)) == (0.9, 1)  # everything decays
    schedule = recipe.scheduler(optimizer, steps).lr_lambdas[0]
    assert {step: recipe.lr * schedule(step) for step in rates} == pytest.approx(rates)


def test_images_are_cropped_out_of_black_for_cifar():
    here = task(mean=[0.25], std=[0.5])
    images = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cut = ClassifierRecipe(protocol="sre2l_cifar").augmentation(here)(images, torch.Generator().manual_seed(1))
    padded = nn.functional.pad(images, (4, 4, 4, 4), value=-0.5)
    crops = padded.unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3)[:, 0]  # (200, 81, 8, 8)
    either = torch.cat([crops, crops.flip(-1)], 1)
    nearest = (either - cut).abs().amax((2, 3)).min(1)
    assert float(nearest.values.max()) < 1e-5
    assert len(set(nearest.indices.tolist())) > 60


def test_a_published_training_teaches_and_is_kept_apart_from_others():
    here = task(mirror=False)
    teacher = Teacher("convnet:width=8,depth=2,norm=batch", protocol="sre2l_tiny", epochs=8)
    network = teacher.committee(here, "conv").main
    other_shapes(max((cache_folder() / "classifiers").glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns))
    again = teacher.committee(here, "conv").main
    assert torch.equal(network.state_dict()["head.weight"], again.state_dict()["head.weight"])
    assert ClassifierRecipe().identity() == {"steps": 1000, "lr": 2e-3, "weight_decay": 0.01, "batch_size": 128}
    assert teacher.identity()["protocol"] == "sre2l_tiny"


def test_a_teacher_learns_channels_last_and_is_handed_on_as_it_is_read_from_the_cache(monkeypatch):
    learned = []

    def fit(task, network, *rest):
        learned.append(network.convs[1].weight.is_contiguous(memory_format=torch.channels_last))
        return task_fit(task, network, *rest)

    task_fit = classifier.fit
    monkeypatch.setattr(classifier, "fit", fit)
    monkeypatch.setattr(classifier, "_refuse_chance", lambda *args: None)
    teacher = Teacher("convnet:width=8,depth=2,norm=none", steps=3, seed=11)
    networks = [teacher.committee(task(), "conv").main for _ in range(2)]
    assert learned == [True]
    assert all(network.convs[1].weight.is_contiguous() for network in networks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "sre2l_cifer"}, "did you mean 'sre2l_cifar'"),
        ({"protocol": "sre2l_tiny", "steps": 7}, "steps goes without a protocol"),
        ({"epochs": 7}, "epochs with one of sre2l_cifar, sre2l_tiny"),
        ({"protocol": "sre2l_tiny", "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"file": "a", "weights": "default"}, "teacher.file and teacher.weights exclude each other"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Teacher(**settings)


# ---- weights of others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["safetensors", "state_dict", "model", "parallel"])
def test_a_file_of_a_published_network_is_that_network(container, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 0.9)  # its weights are random
    model, path = published_resnet(3, channels=1), tmp_path / "teacher.pth"
    if container == "safetensors":
        path = tmp_path / "teacher.safetensors"
        save_file(model.state_dict(), path)
    elif container == "parallel":
        torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, path)
    else:
        torch.save({container: model.state_dict(), "epoch": 200}, path)
    network = Teacher(ARCHITECTURE, file=str(path)).committee(task(), "conv").main
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    own = build_network(ARCHITECTURE, 3, (1, 32, 32)).eval()
    own.load_state_dict(network.state_dict())
    torch.testing.assert_close(own(images), model(images))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_files_that_are_no_weights_or_others_are_one_line(tmp_path):
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": print}))
    torch.save({"state_dict": published_resnet(7, channels=1).state_dict()}, tmp_path / "seven.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 40)
    expected = {
        "nothing.pth": "teacher.file '.*nothing.pth': no such file",
        "code.pth": "is not loaded, because only tensors and numbers are safe to load",
        "list.pth": "must hold a network's tensors by name",
        "cut.safetensors": "is not a safetensors file",
        "seven.pth": r"do not fit images of \(1, 8, 8\) and 3 classes: 'head.weight' is missing or has another shape",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            Teacher(ARCHITECTURE, file=str(tmp_path / name)).committee(task(), "conv")
        assert "\n" not in str(caught.value)


def test_a_network_at_chance_is_refused_whoever_trained_it(tmp_path):
    model = published_resnet(3, channels=1)
    nn.init.zeros_(model.fc.weight)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="is at chance on the validation split"):
        Teacher(ARCHITECTURE, file=str(tmp_path / "teacher.pth")).committee(task(), "conv")


def imagenet_facts(places):
    names = tuple(imagenet_names()[place] for place in places)
    return DataFacts("ImageNet", names, (3, 224, 224), "standardise", "print")


def test_of_imagenets_classes_those_of_the_data_are_kept():
    model = torchvision.models.resnet18().eval()
    places = [217, 0, 482]
    network = build_network(ARCHITECTURE, 3, (3, 224, 224)).eval()
    fit_weights(network, model.state_dict(), imagenet_facts(places), "weights")
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images), model(images)[:, places])
    others = DataFacts("Pets", ("cat", "dog", "tench"), (3, 224, 224), "standardise", "print")
    with pytest.raises(UserError, match="do not fit"):
        fit_weights(network, model.state_dict(), others, "weights")


def test_weights_of_a_library_come_by_name_for_images_standardised_as_theirs(monkeypatch):
    model = torchvision.models.resnet18()
    enum = torchvision.models.ResNet18_Weights
    asked = []
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **kwargs: asked.append(self.name) or model.state_dict())
    here = task(mean=[0.485], std=[0.229]).preprocessing
    here.mean, here.std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for name in ("default", "IMAGENET1K_V1"):
        assert fetch_weights(ARCHITECTURE, name, here).keys() == model.state_dict().keys()
    assert asked == ["IMAGENET1K_V1"] * 2
    with pytest.raises(UserError, match="'V7' of 'torchvision/resnet18' cannot be had"):
        fetch_weights(ARCHITECTURE, "V7", here)
    with pytest.raises(UserError, match="without options, got 'torchvision/resnet18:norm=layer'"):
        fetch_weights("torchvision/resnet18:norm=layer", "default", here)
    here.mean = torch.tensor([0.5, 0.5, 0.5])
    with pytest.raises(UserError, match=r"data.mean=\[0.485, 0.456, 0.406\] and data.std=\[0.229, 0.224, 0.225\]"):
        fetch_weights(ARCHITECTURE, "default", here)


def test_a_training_that_diverged_is_named_and_not_cached():
    data = TinyData()
    data.setup("fit")
    asked, shapes = ("classifiers", {"diverges": True}), {"weight": (1,)}
    nan, one = ({"weight": torch.tensor([number])} for number in (float("nan"), 1.0))
    with pytest.raises(UserError, match=r"a network: its training diverged .*: lower its learning rate"):
        train_once(*asked, lambda: (nan, {}), Task.of(data), "a network", {"weight": (1,)})
    assert train_once(*asked, lambda: (one, {}), Task.of(data), "a network", shapes).tensors()["weight"] == 1
