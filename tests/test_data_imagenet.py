"""ImageNet and the sets drawn from it, and the Hugging Face hub: which files are read, and what labels mean."""

import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from lightning_dd.data import DATA_SETS, HuggingFace, ImageNet, ImageNette, ImageWoof, TinyImageNet
from lightning_dd.data.imagenet import imagenet_names
from lightning_dd.data.readers import CLASS_GROUPS, choose_classes, relabel
from lightning_dd.utils.errors import UserError

REAL_DATA = os.environ.get("LIGHTNING_DD_DATA")  # read before the fixture below hides it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_DD_DATA", raising=False)
    return tmp_path / "cache"


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def picture(value: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), value, np.uint8))


def encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


def shards(file: Path, labels: list[int], values: list[int], names: list[str]) -> None:
    """A parquet file in which every image has one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": encoded(value), "path": None} for value in values], struct)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata), file)


# --- ten-class subsets -----------------------------------------------------------------------------------------


def test_the_groups_are_ten_different_classes_each():
    assert sorted(CLASS_GROUPS) == sorted(["nette", "woof", "meow", "squawk", "fruit", "yellow", "mammals", *"abcde"])
    for group in CLASS_GROUPS.values():
        assert len(set(group)) == 10
        assert set(group) < set(range(1000))
    names = imagenet_names()
    assert len(names) == 1000
    assert [names[index] for index in CLASS_GROUPS["nette"]] == [
        "tench",
        "English springer",
        "cassette player",
        "chain saw",
        "church",
        "French horn",
        "garbage truck",
        "gas pump",
        "golf ball",
        "parachute",
    ]
    assert names[CLASS_GROUPS["woof"][0]] == "Australian terrier"
    assert names[CLASS_GROUPS["meow"][0]] == "tabby"


def test_relabelling():
    labels = torch.tensor([4, 0, 2, 2, 4])
    assert relabel(labels, [2, 4], 5).tolist() == [1, -1, 0, 0, 1]
    for bad in ([5], [-1]):
        with pytest.raises(UserError, match=r"labels must be in \[0, 5\)"):
            relabel(torch.tensor(bad), [2, 4], 5)
    assert choose_classes("squawk", [""] * 1000) == list(CLASS_GROUPS["squawk"])


@pytest.fixture
def thousand(tmp_path) -> Path:
    """ImageNet with one tiny image of each class, in both layouts; the red of an image is its class modulo 251."""
    folder = tmp_path / "imagenet"
    ids = [f"n{index:08d}" for index in range(1000)]
    source = picture(0)
    for split in ("train", "val"):
        for index, name in enumerate(ids):
            (folder / split / name).mkdir(parents=True)
            if index in CLASS_GROUPS["woof"] or index < 2:
                source.paste((index % 251, 1, 2), (0, 0, 8, 8))
                source.save(folder / split / name / "0.png")
    return tmp_path


def test_a_group_of_imagenet_is_labelled_in_the_published_order(thousand, monkeypatch):
    monkeypatch.chdir(thousand)
    data = ImageNet(image_size=8, classes="woof")
    train, test = data.read(train=True), data.read(train=False)
    order = CLASS_GROUPS["woof"]
    reds = train.images[train.labels.argsort(), 0, 0, 0]
    assert reds.tolist() == [index % 251 for index in order]
    assert test.images[test.labels.argsort(), 0, 0, 0].tolist() == reds.tolist()
    assert train.class_names == tuple(imagenet_names()[index] for index in order)
    assert data.spec() | {"classes": "woof", "image_size": 8} == data.spec()
    zoomed = ImageNet(image_size=4, test_resize=8, classes="woof").read(train=False)
    assert torch.equal(zoomed.images, test.images[:, :, 2:6, 2:6])
    two = ImageNet(image_size=8, classes=["beagle", 0], root=str(thousand)).read(train=True)
    assert two.class_names == ("beagle", "tench")
    assert two.images[two.labels.argsort(), 0, 0, 0].tolist() == [162, 0]
    with pytest.raises(UserError, match="class 'great white shark' has no images"):  # of all 1,000 classes
        ImageNet(image_size=8, root=str(thousand / "imagenet"), val_fraction=0).setup("fit")


def test_imagenet_from_the_hubs_shards(tmp_path):
    names = [f"name {index}" for index in range(1000)]
    order = CLASS_GROUPS["fruit"]
    shards(tmp_path / "data" / "train-00000-of-00001.parquet", sorted(order), [i % 251 for i in sorted(order)], names)
    shards(tmp_path / "data" / "validation-00000-of-00001.parquet", [order[3], 1], [7, 8], names)
    data = ImageNet(image_size=8, classes="fruit", root=str(tmp_path))
    train = data.read(train=True)
    assert train.class_names == tuple(imagenet_names()[index] for index in order)
    assert train.images[train.labels.argsort(), 0, 0, 0].tolist() == [index % 251 for index in order]
    assert data.read(train=False).labels.tolist() == [3]


def test_statistics_of_imagenet_follow_the_size():
    assert ImageNet(image_size=64).channel_mean == (0.4815, 0.4578, 0.4082)
    assert ImageNet(image_size=32).channel_std == (0.2604, 0.2532, 0.2682)
    assert ImageNet(image_size=224).channel_mean == (0.485, 0.456, 0.406)
    assert ImageNet(image_size=64, classes="e").channel_std == (0.2686, 0.2613, 0.2758)


@pytest.mark.parametrize(
    ("cls", "slug", "group"), [(ImageNette, "imagenette2-160", "nette"), (ImageWoof, "imagewoof2-160", "woof")]
)
def test_an_archive_of_ten_classes_agrees_with_the_group_of_imagenet(tmp_path, cls, slug, group):
    in_archive = sorted(CLASS_GROUPS[group])  # ids sort as indices do
    for split in ("train", "val"):
        for index in in_archive:
            (tmp_path / slug / split / f"n{index:08d}").mkdir(parents=True)
            picture(index % 251).save(tmp_path / slug / split / f"n{index:08d}" / "0.png")
    data = cls(image_size=8, root=str(tmp_path))
    train = data.read(train=True)
    order = CLASS_GROUPS[group]
    assert train.class_names == tuple(imagenet_names()[index] for index in order)
    assert train.images[train.labels.argsort(), 0, 0, 0].tolist() == [index % 251 for index in order]
    assert data.read(train=False).class_names == train.class_names
    assert DATA_SETS[cls.__name__](**data.spec()).spec() == data.spec()  # found without a path
    assert data.archives[0] == slug
    assert cls(image_size=200).archives == [slug.replace("160", "320"), slug.removesuffix("-160")]
    data.prepare_data()  # nothing is downloaded
    (tmp_path / slug / "train" / "n99999999").mkdir()
    with pytest.raises(UserError, match=f"{cls.__name__} has 10 classes and 11 were found"):
        cls(image_size=8, root=str(tmp_path)).read(train=True)


def test_imagenette_is_downloaded_where_it_is_missing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torchvision.datasets, "Imagenette", lambda root, size, download: asked.append((root, size, download))
    )
    ImageNette(root=str(tmp_path)).prepare_data()
    ImageNette(image_size=224).prepare_data()
    ImageNette(image_size=500).prepare_data()
    assert asked == [(str(tmp_path), "160px", True), ("data", "320px", True), ("data", "full", True)]

    def unreachable(root, size, download):
        raise OSError("no route\nand more")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", unreachable)
    with pytest.raises(
        UserError, match=r"ImageNette could not be downloaded to data.root='data' \(no route\)"
    ) as error:
        ImageNette().prepare_data()
    one_line(error)


# --- Tiny-ImageNet ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The archive as it is unpacked, with three classes."""
    folder = tmp_path / "tiny-imagenet-200"
    for place, name in enumerate(("n02", "n01", "n03")):
        (folder / "train" / name / "images").mkdir(parents=True)
        (folder / "train" / name / f"{name}_boxes.txt").write_text("")
        for number in range(2):
            picture(100 * place + number).save(folder / "train" / name / "images" / f"{name}_{number}.JPEG", "PNG")
    for part in ("val", "test"):
        (folder / part / "images").mkdir(parents=True)
        for number in range(3):
            picture(number + 50).save(folder / part / "images" / f"{part}_{number}.JPEG", "PNG")
    lines = ["val_1.JPEG\tn03\t0\t0\t1\t1", "val_0.JPEG\tn02\t0\t0\t1\t1", "val_2.JPEG\tn01\t0\t0\t1\t1"]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_tiny_imagenet_from_its_archive(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    data = TinyImageNet(image_size=8, val_fraction=0)
    train, test = data.read(train=True), data.read(train=False)
    assert train.class_names == ("n01", "n02", "n03")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.images[:, 0, 0, 0].tolist() == [100, 101, 0, 1, 200, 201]
    assert test.labels.tolist() == [1, 2, 0]  # of val_0, val_1, val_2
    assert test.images[:, 0, 0, 0].tolist() == [50, 51, 52]
    some = TinyImageNet(image_size=8, classes=["n03", "n01"], root=str(tiny))
    assert some.read(train=True).labels.tolist() == [1, 1, 0, 0]
    assert some.read(train=False).labels.tolist() == [0, 1]
    assert TinyImageNet().channel_mean == (0.4759, 0.4481, 0.3926)
    data.setup()
    assert data.preprocessing.std.tolist() == pytest.approx([0.2763, 0.2687, 0.2813])


def test_tiny_imagenet_with_val_sorted_into_folders(tiny):
    folder = tiny / "tiny-imagenet-200" / "val"
    for number, name in enumerate(("n02", "n03", "n01")):
        (folder / name).mkdir()
        (folder / "images" / f"val_{number}.JPEG").rename(folder / name / f"val_{number}.JPEG")
    (folder / "images").rmdir()
    test = TinyImageNet(image_size=8, root=str(tiny)).read(train=False)
    assert test.labels.tolist() == [0, 1, 2]
    assert test.images[:, 0, 0, 0].tolist() == [52, 50, 51]


def test_tiny_imagenet_from_shards_agrees_with_the_archive(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    names = ["n01 ant", "n02 big dog", "n03 cat"]
    shards(folder / "tiny-imagenet-train-0.parquet", [2, 0], [5, 6], names)
    shards(folder / "tiny-imagenet-train-1.parquet", [1, 0], [7, 8], names)
    shards(folder / "tiny-imagenet-val.parquet", [1], [9], names)
    monkeypatch.setenv("LIGHTNING_DD_DATA", str(folder))
    monkeypatch.chdir(folder)
    train = TinyImageNet(image_size=8).read(train=True)
    assert train.class_names == TinyImageNet(image_size=8, root=str(tiny)).read(train=True).class_names
    assert train.labels.tolist() == [2, 0, 1, 0]
    assert train.images.shape == (4, 3, 8, 8)  # three channels, though every image is grey
    shards(tmp_path / "mixed" / "tiny-imagenet-train.parquet", [0, 1], [5, 6], ["n02 b", "n01 a"])
    shards(tmp_path / "mixed" / "tiny-imagenet-val.parquet", [0], [5], ["n02 b", "n01 a"])
    with pytest.raises(UserError, match="WordNet ids"):
        TinyImageNet(root=str(tmp_path / "mixed")).read(train=True)


def test_a_set_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"TinyImageNet was found neither as 'tiny-imagenet-200/train' nor as") as error:
        TinyImageNet().read(train=True)
    assert "'.' or 'data'; set data.root" in one_line(error)
    monkeypatch.setenv("LIGHTNING_DD_DATA", "/some/folder")
    with pytest.raises(UserError, match=r"in '.' or 'data' or '/some/folder'"):
        ImageNet().read(train=True)
    with pytest.raises(UserError, match=r"in '.*nowhere'; set data.root"):
        ImageWoof(root=str(tmp_path / "nowhere")).read(train=True)
    with pytest.raises(UserError, match=r"data.image_size must be at least 1, got 0"):
        ImageNet(image_size=0)
    with pytest.raises(UserError, match=r"data.classes must be a list or one of nette, woof"):
        ImageNet(classes="wolf")
    (tmp_path / "few" / "imagenet" / "train" / "n01").mkdir(parents=True)
    with pytest.raises(UserError, match="ImageNet has 1,000 classes and 1 were found; use ImageFolder"):
        ImageNet(root=str(tmp_path / "few")).read(train=True)


@pytest.mark.slow
def test_the_real_tiny_imagenet(request, monkeypatch):
    folder = Path(REAL_DATA or request.config.rootpath.parent / "shared" / "data")
    if not (folder / "tiny-imagenet-val.parquet").is_file():
        pytest.skip(f"no tiny-imagenet parquet files in {folder}; set LIGHTNING_DD_DATA")
    monkeypatch.setenv("LIGHTNING_DD_DATA", str(folder))
    data = TinyImageNet(classes=["n01443537", "n01629819", "n02099601"], preprocessing="zca", zca_block=32)
    data.setup()
    assert data.facts.class_names == ("n01443537", "n01629819", "n02099601")
    assert data.train.labels.bincount().tolist() == [450] * 3
    assert data.test.labels.bincount().tolist() == [50] * 3
    assert data.preprocessing.zca_stride == 2
    pixels = data.preprocessing.inverse(data.test.everything().images)
    assert -0.01 < float(pixels.min()) < float(pixels.max()) < 1.01


# --- the Hugging Face hub --------------------------------------------------------------------------------------


class FakeTable:
    """As much of the library's table as is used."""

    def __init__(self, columns: dict, features: dict, file: Path) -> None:
        self.columns, self.features = columns, features
        self.cache_files = [{"filename": str(file)}]
        self.column_names = list(columns)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}

    def cast_column(self, name: str, feature):
        assert feature.decode is False
        return self

    def select_columns(self, names: list[str]):
        return FakeTable({name: self.columns[name] for name in names}, self.features, Path())


class FakeImage:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A stand-in for the library; ``asked`` keeps what it was asked for."""
    picture(30).save(tmp_path / "on_disk.png")
    (tmp_path / "table.arrow").write_bytes(b"table")
    module = ModuleType("datasets")
    module.asked = []
    module.features = {"image": FakeImage(), "label": SimpleNamespace(names=["ant", "bee", "cat"])}
    module.labels = {"train": [2, 0, 1, 2, 0, 1], "test": [1, 2]}

    def load_dataset(path, subset, *, split, revision, cache_dir):
        module.asked.append((path, subset, split, revision, cache_dir))
        if split not in module.labels:
            raise ValueError(f"Unknown split '{split}'.\nMore.")
        labels = module.labels[split]
        images = [{"bytes": encoded(10 * row), "path": None} for row in range(len(labels))]
        images[-1] = {"bytes": None, "path": str(tmp_path / "on_disk.png")}
        return FakeTable({"image": images, "label": labels}, module.features, tmp_path / "table.arrow")

    module.Image, module.load_dataset = FakeImage, load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_set_of_the_hub(library, tmp_path):
    data = HuggingFace("somebody/pictures", subset="small", revision="v2", val_fraction=0.5, root=str(tmp_path / "hf"))
    data.setup("fit")
    data.read(train=False)
    assert library.asked == [
        ("somebody/pictures", "small", "train", "v2", str(tmp_path / "hf")),
        ("somebody/pictures", "small", "test", "v2", str(tmp_path / "hf")),
    ]
    assert data.facts.class_names == ("ant", "bee", "cat")
    train = data.read(train=True)
    assert train.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert train.images.shape == (6, 3, 8, 8)
    assert train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 30]
    assert data.spec()["path"] == "somebody/pictures"
    assert HuggingFace("/home/me/pictures").spec()["path"] == "pictures"
    some = HuggingFace("somebody/pictures", classes=["cat", "ant"], on_disk=True).read(train=True)
    assert some.labels.tolist() == [0, 1, 0, 1]
    assert some.class_names == ("cat", "ant")
    assert some.images[:, 0, 0, 0].tolist() == [0, 10, 30, 40]


def test_a_set_of_the_hub_without_class_names(library):
    library.features["label"] = SimpleNamespace(dtype="int64")
    assert HuggingFace("somebody/pictures").read(train=False).class_names == ("0", "1", "2")  # those of train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_split": "tset"}, r"cannot load split 'tset' of 'a/b': Unknown split 'tset'\.$"),
        ({"image_column": "img"}, r"'a/b' has no column 'img' \(it has image, label\); set data.image_column"),
        ({"label_column": "fine"}, r"has no column 'fine'.*set data.label_column"),
        ({"image_column": "label"}, "column 'label' does not hold images"),
        ({"label_column": "image"}, "column 'image' does not hold integers"),
        ({"image_size": 0}, "data.image_size must be at least 1, got 0"),
        ({"classes": ["dog"]}, "there is no class 'dog'"),
    ],
)
def test_bad_sets_of_the_hub(library, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        HuggingFace("a/b", val_fraction=0, **arguments).setup()
    one_line(error)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"HuggingFace needs the library 'datasets' \(pip install datasets\)"):
        HuggingFace("a/b").setup()


def test_the_library_itself(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shards(tmp_path / "set" / "train.parquet", [0, 1, 0, 1], [1, 2, 3, 4], ["a", "b"])
    shards(tmp_path / "set" / "test.parquet", [1], [5], ["a", "b"])
    data = HuggingFace(str(tmp_path / "set"), root=str(tmp_path / "hf"), val_fraction=0)
    data.setup("fit")
    assert data.facts.class_names == ("a", "b")
    assert data.read(train=True).images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
