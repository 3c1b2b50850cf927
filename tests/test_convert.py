"""Distilled sets of other projects: every layout, the stated preprocessing, an evaluation, and every wrong file."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TinyData
from PIL import Image
from torch.nn.functional import one_hot

from lightning_dd.cli import main
from lightning_dd.data import DATA_SETS
from lightning_dd.data.base import RawSplit
from lightning_dd.data.preprocess import fit_preprocessing
from lightning_dd.distilled.convert import convert_set
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.utils.errors import UserError


class Colours(TinyData):
    """The tiny data in colour, with names whose order is not that of the alphabet."""

    channels = 3
    per_class = 100

    def read(self, *, train: bool) -> RawSplit:
        images, labels, _ = super().read(train=train)
        return RawSplit(images, labels, ("plane", "car", "bird"))


@pytest.fixture(autouse=True)
def _register_data(monkeypatch):
    for data in (TinyData, Colours):
        monkeypatch.setitem(DATA_SETS, data.__name__, data)


def pixels(name="Colours", ipc=2) -> torch.Tensor:
    """Real pixels (3 * ipc, C, 8, 8) in [0, 1], in blocks by class."""
    raw = DATA_SETS[name]().read(train=True)
    rows = torch.cat([(raw.labels == label).nonzero()[:ipc, 0] for label in range(3)])
    return raw.images[rows].float() / 255


def whole_train(name="Colours") -> torch.Tensor:
    return DATA_SETS[name]().read(train=True).images


CLASSES = torch.arange(3).repeat_interleave(2)
LEARNED = one_hot(CLASSES, 3) - 1 / 3 + 0.01


def write_frepo(path="frepo.npz", images=None, labels=LEARNED, **changes) -> Path:
    images = pixels() * 4 - 2 if images is None else images
    arrays = {"image": images.permute(0, 2, 3, 1).numpy(), "label": labels.numpy()}
    np.savez(path, **(arrays | changes))
    return Path(path)


def write_dc(path="res_DC.pt", pairs=None, **changes) -> Path:
    pairs = [[pixels() * 4 - 2, CLASSES]] if pairs is None else pairs
    scores = {"ConvNet": [np.float64(0.5), np.float32(0.25)]}  # as the project's own evaluation makes them
    torch.save({"data": pairs, "accs_all_exps": scores} | changes, path)
    return Path(path)


def write_mtt(images=None, labels=CLASSES) -> dict[str, str]:
    torch.save(pixels() * 4 - 2 if images is None else images, "images_best.pt")
    torch.save(labels, "labels_best.pt")
    return {"layout": "mtt", "images": "images_best.pt", "labels": "labels_best.pt"}


def write_folders(images: torch.Tensor, folders: list[str], names: str, root="syn") -> Path:
    """Write lossless files, so that they can be compared."""
    for row, label in enumerate(CLASSES.tolist()):
        folder = Path(root) / folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        array = (images[row] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array.squeeze()).save(folder / f"{names.format(label, row % 2)}.png")
    return Path(root)


def convert(layout, images, preprocessing="standardise", data="Colours", **settings) -> DistilledSet:
    statistics = {"mean": [0.5] * 3, "std": [0.25] * 3} if preprocessing == "standardise" else {}
    return convert_set(layout, images, data, preprocessing, **(statistics | settings))


# ---- layouts -----------------------------------------------------------------------------------------------------


def test_frepo_arrays_become_channels_first_with_learned_labels():
    distilled = convert("frepo", write_frepo())
    torch.testing.assert_close(distilled.images, pixels() * 4 - 2)
    torch.testing.assert_close(distilled.labels, LEARNED)
    assert (distilled.label_kind, distilled.method) == ("learned", "FRePo")
    torch.testing.assert_close(distilled.pixels(), pixels(), atol=1e-6, rtol=0)
    already = convert("frepo", write_frepo(image=(pixels() * 4 - 2).numpy()))
    assert torch.equal(already.images, distilled.images)


def test_the_pytorch_branch_of_frepo():
    state = {"x_syn": torch.nn.Parameter(pixels() * 4 - 2), "y_syn": LEARNED}
    torch.save({"step_offset": 5, "best_val_acc": 0.5, "syndata_state_dict": state}, "best_ckpt.pt")
    distilled = convert("frepo", "best_ckpt.pt")
    assert torch.equal(distilled.images, state["x_syn"].detach())
    assert not distilled.images.requires_grad


def test_dc_holds_several_experiments_and_numpy_scores():
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    pairs = [[torch.randn(6, 3, 8, 8), CLASSES], [(pixels() * 4 - 2)[order], CLASSES[order]]]
    distilled = convert("dc", write_dc(pairs=pairs), experiment=1)
    assert distilled.classes.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(distilled.images, (pixels() * 4 - 2)[[0, 1, 3, 2, 5, 4]])  # as found within a class
    assert torch.equal(distilled.labels, one_hot(CLASSES, 3).float())
    assert (distilled.label_kind, distilled.method) == ("hard", "DC")
    assert torch.equal(convert("dc", write_dc(pairs=pairs)).images, pairs[0][0])


def test_mtt_has_hard_labels_and_datm_soft_ones():
    distilled = convert(**write_mtt())
    assert (distilled.label_kind, distilled.method) == ("hard", "MTT")
    logits = 5 * one_hot(CLASSES, 3).float() + torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    logits[0] = logits[0].flip(0)  # one learned row may come to favour another class: its block says what it is
    soft = convert(**write_mtt(labels=logits), method="DATM", architecture="convnet:norm=instance")
    assert (soft.label_kind, soft.method, soft.architecture) == ("soft", "DATM", "convnet:norm=instance")
    assert torch.equal(soft.labels, logits)
    assert torch.equal(soft.classes, CLASSES)


def test_learned_rows_in_another_order_are_sorted():
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    distilled = convert("frepo", write_frepo(images=(pixels() * 4 - 2)[order], labels=LEARNED[order]))
    torch.testing.assert_close(distilled.images, pixels() * 4 - 2)
    assert torch.equal(distilled.classes, CLASSES)


@pytest.mark.parametrize(
    ("layout", "folders", "names", "method"),
    [
        ("sre2l", ["new000", "new001", "new002"], "class{:03d}_id{:03d}", "SRe2L"),
        ("rded", ["00000", "00001", "00002"], "class{:05d}_id{:05d}", "RDED"),
        ("rded", ["plane", "car", "bird"], "{}_{}", "RDED"),
    ],
)
def test_folders_are_classes_by_number_or_by_name(layout, folders, names, method):
    distilled = convert(layout, write_folders(pixels(), folders, names), "pixels")
    assert torch.equal(distilled.classes, CLASSES)
    assert distilled.class_names == ("plane", "car", "bird")
    torch.testing.assert_close(distilled.pixels(), pixels(), atol=1e-6, rtol=0)
    assert (distilled.label_kind, distilled.method) == ("hard", method)


def test_gray_files_for_gray_data():
    folder = write_folders(pixels("TinyData"), ["new000", "new001", "new002"], "{}_{}")
    assert convert("sre2l", folder, "pixels", data="TinyData").image_shape == (1, 8, 8)


# ---- preprocessing -----------------------------------------------------------------------------------------------


def test_pixels_are_standardised_with_the_real_datas_statistics():
    expected = fit_preprocessing("standardise", whole_train())
    for images in (pixels(), (pixels() * 255).round().to(torch.uint8)):
        distilled = convert(**write_mtt(images), preprocessing="pixels")
        torch.testing.assert_close(distilled.images, expected(pixels()), atol=1e-5, rtol=1e-5)
    stated = convert(**write_mtt(pixels()), preprocessing="pixels", mean=[0.5] * 3, std=[0.25] * 3)
    torch.testing.assert_close(stated.images, pixels() * 4 - 2)


def test_zca_is_frepos_fitted_on_the_whole_training_split():
    expected = fit_preprocessing("zca", whole_train())
    distilled = convert("frepo", write_frepo(images=expected(pixels())), "zca")
    assert distilled.preprocessing.kind == "zca"
    torch.testing.assert_close(distilled.pixels(), pixels(), atol=1e-4, rtol=0)
    torch.testing.assert_close(distilled.test_transform(pixels()), expected(pixels()), atol=1e-4, rtol=1e-4)


def slow_kornia(train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, by numpy's covariance and singular values."""
    rows = train.flatten(1).double().numpy() / 255
    left, values, _ = np.linalg.svd(np.cov(rows, rowvar=False))
    matrix = left @ np.diag(1 / np.sqrt(values + 0.1)) @ left.T
    return torch.from_numpy(rows.mean(0)), torch.from_numpy(matrix)


def test_kornia_zca_whitens_raw_pixels_with_an_absolute_ridge():
    mean, matrix = slow_kornia(whole_train())
    whitened = ((pixels().flatten(1).double() - mean) @ matrix).float().view(6, 3, 8, 8)
    distilled = convert(**write_mtt(whitened), preprocessing="kornia-zca")
    assert distilled.preprocessing.kind == "zca"
    torch.testing.assert_close(distilled.test_transform(pixels()), whitened, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(distilled.pixels(), pixels(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("layout", "name", "std"),
    [
        ("dc", "CIFAR10", (0.2023, 0.1994, 0.2010)),
        ("dc", "CIFAR100", (0.2673, 0.2564, 0.2762)),
        ("mtt", "CIFAR100", (0.2023, 0.1994, 0.2010)),
        ("frepo", "CIFAR10", (0.2470, 0.2435, 0.2616)),
    ],
)
def test_each_project_divides_by_its_own_numbers(layout, name, std, monkeypatch):
    real = DATA_SETS[name]

    def read(self, *, train):
        return Colours().read(train=train)

    monkeypatch.setattr(real, "read", read)
    monkeypatch.setattr(real, "prepare_data", lambda self: None)
    files = {"frepo": lambda: {"images": write_frepo()}, "dc": lambda: {"images": write_dc()}, "mtt": write_mtt}[
        layout
    ]()
    distilled = convert_set(data=name, preprocessing="standardise", **({"layout": layout} | files))
    torch.testing.assert_close(distilled.preprocessing.std, torch.tensor(std))


# ---- the file, and its evaluation --------------------------------------------------------------------------------


def test_a_converted_set_survives_its_file_and_names_its_data():
    distilled = convert("dc", write_dc(), method="DM", architecture="convnet", data_args={"split_seed": 3})
    loaded = DistilledSet.load(distilled.save("set.safetensors"))
    assert torch.equal(loaded.images, distilled.images)
    assert loaded.data["spec"]["val_fraction"] == 0  # the other project trained on all of it
    assert loaded.data["spec"]["split_seed"] == 3
    assert convert("dc", write_dc(), data="test_convert.Colours").data["name"] == "Colours"  # anybody's data, by path
    real = Colours(val_fraction=0)
    real.setup("fit")
    assert loaded.data["fingerprint"] == real.facts.fingerprint
    assert (loaded.method, loaded.training["converted_from"]) == ("DM", "dc")


def test_the_command_converts_and_evaluate_takes_the_file(capsys):
    arguments = ["--layout=dc", f"--images={write_dc()}", "--data=Colours", "--preprocessing=standardise"]
    command = ["convert", *arguments, "--mean=[0.5,0.5,0.5]", "--std=[0.25,0.25,0.25]", "--architecture=convnet"]
    assert main([*command, "--output=out/set.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "6 images of Colours, 2 per class, hard labels" in said
    assert "mean (0.5, 0.5, 0.5) and std (0.25, 0.25, 0.25)" in said
    evaluate = ["evaluate", "out/set.safetensors", "--architectures", "convnet:width=8,depth=2", "--output=report"]
    assert main([*evaluate, "--seeds=1", "--steps=60", "--lr=0.01", "--augment=none", "--accelerator=cpu"]) == 0
    row = next(line for line in Path("report/results.md").read_text().splitlines() if "convnet:width=8" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert "yes" in cells
    assert any(cell[:1].isdigit() and float(cell.split()[0]) > 60 for cell in cells)  # chance is 33


# ---- everything that can be wrong --------------------------------------------------------------------------------


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        convert(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_settings_that_make_no_sense():
    file = write_dc()
    assert "unknown layout 'dcc'; did you mean 'dc'?" in refused("dcc", file)
    assert "unknown preprocessing 'whiten'" in refused("dc", file, "whiten")
    assert "unknown data set 'CIFAR11'" in refused("dc", file, data="CIFAR11")
    assert "layout dc holds its labels" in refused("dc", file, labels=file)
    assert "layout mtt needs its labels" in refused("mtt", file)
    assert "no such file" in refused("mtt", file, labels="nothing.pt")
    assert "'nothing.pt': layout dc is a file" in refused("dc", "nothing.pt")
    assert "layout sre2l is a folder" in refused("sre2l", file, "pixels")
    assert "must be pixels for layout rded" in refused("rded", file)
    assert "what layout mtt calls ZCA is kornia-zca" in refused(**write_mtt(), preprocessing="zca")
    assert "mean and std must be given together" in refused("dc", file, std=None)
    assert "one number per channel" in refused("dc", file, std=[1.0, 1.0])
    assert "data.std must be positive, got 0.0" in refused("dc", file, std=[1.0, 0.0, 1.0])
    assert "no numbers are published for Colours" in refused("dc", file, mean=None, std=None)
    assert "leave them out" in refused(**write_mtt(), preprocessing="kornia-zca", mean=[0.5], std=[0.5])
    assert "experiment must be in [0, 1)" in refused("dc", file, experiment=1)
    assert "the arguments do not fit data set 'Colours'" in refused("dc", file, data_args={"size": 3})


def test_statistics_for_another_number_of_channels():
    assert "data.mean must be one number per channel, 3 here, got 1" in refused("dc", write_dc(), mean=[0.5], std=[0.5])


class Careless:
    """Something that is not a tensor."""


def test_files_of_another_kind():
    Path("text.pt").write_text("not a file of tensors at all")
    Path("text.npz").write_text("not a file of arrays at all")
    np.save("one.npy", np.zeros(3))
    torch.save({"data": Careless()}, "objects.pt")
    whole = write_dc().read_bytes()
    Path("half.pt").write_bytes(whole[: len(whole) // 2])
    np.savez("pickled.npz", image=np.array([{}], dtype=object), label=LEARNED.numpy())
    assert "only tensors and numbers are safe to load" in refused("dc", "text.pt")
    assert "Careless" in refused("dc", "objects.pt")
    assert "not a file of torch.save" in refused("dc", "half.pt")
    content = Path(_npz(image=np.zeros((1, 2, 2, 1)))).read_bytes()
    directory = content.index(b"PK\x01\x02")  # the flags of the first entry there: encrypted
    Path("locked.npz").write_bytes(content[: directory + 8] + b"\x01" + content[directory + 9 :])
    for file in ("text.npz", "one.npy", "pickled.npz", "locked.npz"):
        assert "is not an .npz file of arrays" in refused("frepo", file)


def test_content_that_does_not_fit():
    images = pixels() * 4 - 2
    assert "no entry 'data'; found images" in refused("dc", _saved({"images": images}))
    assert "no entry 'data'; found Tensor" in refused("dc", _saved(images))
    assert "a list of pairs" in refused("dc", _saved({"data": [images]}))
    assert "no entry 'label'; found image" in refused("frepo", _npz(image=images.numpy()))
    assert "'images' must be (images, channels, height, width), found (3, 8, 8)" in refused(
        "dc", write_dc(pairs=[[images[0], CLASSES]])
    )
    assert "must be a tensor of numbers, found str" in refused("dc", write_dc(pairs=[["x", CLASSES]]))
    assert "'label' must be (images, classes)" in refused("frepo", write_frepo(label=np.zeros(6)))
    assert "one whole number per image" in refused("dc", write_dc(pairs=[[images, CLASSES + 0.5]]))
    assert "they are (3, 8, 7)" in refused("dc", write_dc(pairs=[[images[..., 1:], CLASSES]]))
    assert "(1, 8, 8)" in refused("dc", write_dc(pairs=[[images[:, :1], CLASSES]]))
    assert "6 images and 5 labels" in refused("dc", write_dc(pairs=[[images, CLASSES[1:]]]))
    assert "NaN or infinite" in refused("dc", write_dc(pairs=[[images * math.inf, CLASSES]]))
    assert "classes 0 to 1, Colours has 3" in refused("dc", write_dc(pairs=[[images, CLASSES.clamp(max=1)]]))
    assert "classes 0 to 3, Colours has 3" in refused("frepo", write_frepo(labels=torch.zeros(6, 4)))
    assert "equally many images, found 1 to 3" in refused(
        "dc", write_dc(pairs=[[images, torch.tensor([0, 0, 0, 1, 1, 2])]])
    )
    assert "equally many images" in refused("dc", write_dc(pairs=[[images[1:], CLASSES[1:]]]))


def test_images_that_cannot_be_in_the_stated_space():
    images = pixels()
    assert "pixels must lie in [0, 1], found" in refused(**write_mtt(images * 4 - 2), preprocessing="pixels")
    assert "state preprocessing pixels" in refused(**write_mtt(images))
    assert "state preprocessing pixels" in refused(**write_mtt((images * 255).to(torch.uint8)))


def test_folders_that_do_not_fit():
    three = ["new000", "new001", "new002"]
    assert "numbers 0 to 2" in refused("sre2l", write_folders(pixels(), ["a", "b", "c"], "{}{}", "a"), "pixels")
    shifted = write_folders(pixels(), ["new001", "new002", "new003"], "{}{}", "b")
    assert "found 3: new001, new002, new003" in refused("sre2l", shifted, "pixels")
    (Path("empty") / "new000").mkdir(parents=True)
    for name in three[1:]:
        (Path("empty") / name).mkdir()
    assert "hold no image files" in refused("sre2l", "empty", "pixels")
    unequal = write_folders(pixels(), three, "{}{}", "c")
    next((unequal / "new001").iterdir()).unlink()
    assert "equally many images, found 1 to 2" in refused("sre2l", unequal, "pixels")
    broken = write_folders(pixels(), three, "{}{}", "d")
    next((broken / "new001").iterdir()).write_text("no image")
    assert "cannot decode the image" in refused("sre2l", broken, "pixels")
    large = write_folders(torch.zeros(6, 3, 9, 9), three, "{}{}", "e")
    assert "they are (3, 9, 9)" in refused("rded", large, "pixels")


def _saved(content) -> str:
    torch.save(content, "content.pt")
    return "content.pt"


def _npz(**arrays) -> str:
    np.savez("content.npz", **arrays)
    return "content.npz"
