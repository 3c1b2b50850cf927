"""The readers: what they read, what they cache, and what they say about bad input."""

import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from safetensors import safe_open
from torchvision.transforms import CenterCrop, Compose, Resize

from lightning_dd.data import DATA_SETS, ImageFolder, MNIST5k, ParquetImages, RawSplit, RealData, tables
from lightning_dd.data import cache as cache_module
from lightning_dd.data.cache import cache_folder, cached_split, content_key
from lightning_dd.data.parts import build_data
from lightning_dd.data.readers import CachedData, decode_images
from lightning_dd.utils.errors import UserError

REAL_DATA = os.environ.get("LIGHTNING_DD_DATA")  # read before the fixture below hides it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(folder))
    monkeypatch.delenv("LIGHTNING_DD_DATA", raising=False)
    return folder


def one_line(error: pytest.ExceptionInfo) -> str:
    """The promise of a UserError: one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


# --- cache -----------------------------------------------------------------------------------------------------


def a_split(allocate=None, count: int = 6) -> RawSplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=generator)
    return RawSplit(images, torch.arange(count) % 2, ("böse", "gut"))


def must_not_decode(allocate=None) -> RawSplit:
    raise AssertionError("decoded although cached")


def assert_same_split(one: RawSplit, other: RawSplit) -> None:
    assert one.class_names == other.class_names
    assert one.images.dtype == other.images.dtype
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


def test_the_cache_gives_back_what_was_decoded(cache):
    first = cached_split("k", a_split)
    assert_same_split(first, a_split())
    assert_same_split(cached_split("k", must_not_decode), first)
    assert {file.name for file in cache.iterdir()} == {"k.npy", "k.safetensors"}  # and no temporary file


def test_the_cache_keeps_a_view_that_is_not_contiguous():
    split = a_split()
    turned = RawSplit(split.images.permute(0, 1, 3, 2), split.labels.flip(0)[::2], split.class_names)
    turned = turned._replace(images=turned.images[::2])
    cached_split("k", lambda _: turned)
    assert_same_split(cached_split("k", must_not_decode), turned)


def test_a_cached_split_may_be_written_to_without_changing_the_file():
    cached_split("k", a_split)
    cached_split("k", must_not_decode).images.zero_()
    assert_same_split(cached_split("k", must_not_decode), a_split())


DAMAGES = ["truncated", "empty", "garbage", "one bit", "folder"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("k.npy", damage) for damage in DAMAGES),
        *(("k.safetensors", damage) for damage in [*DAMAGES, "other tensors"]),
    ],
)
def test_a_damaged_cache_file_is_decoded_again(cache, name, damage):
    cached_split("k", a_split)
    file = cache / name
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "other tensors":
        from safetensors.torch import save_file

        save_file({"weights": torch.zeros(1)}, file)
    else:
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        bad = {"truncated": whole[:-5], "empty": b"", "garbage": b"x" * 100, "one bit": flipped}
        file.write_bytes(bad[damage])
    with pytest.warns(UserWarning, match="damaged"):
        assert_same_split(cached_split("k", a_split), a_split())
    if damage != "folder":  # a folder cannot be replaced by a file; that costs one more warning, no more
        assert_same_split(cached_split("k", must_not_decode), a_split())


def test_an_unwritable_cache_costs_only_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="LIGHTNING_DD_CACHE") as caught:
        assert_same_split(cached_split("k", a_split), a_split())
    assert len(caught) == 1


def test_a_failing_write_leaves_nothing_behind_and_keeps_the_old_file(cache, monkeypatch):
    def full_disk(path, array):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    cached_split("old", a_split)
    monkeypatch.setattr(np, "save", full_disk)
    with pytest.warns(UserWarning, match="no space left"):
        cached_split("new", a_split)
    assert {file.name for file in cache.iterdir()} == {"old.npy", "old.safetensors"}


def test_no_reader_ever_sees_half_a_file(cache):
    """Many writers and readers of one key: every read is whole or misses, and never warns of damage."""
    stop, seen = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            cache_module.store_split(cache / "k.npy", a_split(count=200))

    def read() -> None:
        for _ in range(100):
            split = cache_module.load_split(cache / "k.npy")
            seen.append(split is None or torch.equal(split.images, a_split(count=200).images))

    writers = [threading.Thread(target=write) for _ in range(2)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    for thread in writers:
        thread.join()
    assert len(seen) == 200
    assert all(seen)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_DD_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.setenv("LIGHTNING_DD_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lightning_dd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lightning_dd"


def test_the_key_depends_on_the_bytes_of_a_file_and_not_on_its_name(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert content_key("x", one) == content_key("x", two) != content_key("y", one)
    two.write_bytes(b"abd")
    assert content_key("x", one) != content_key("x", two)
    assert content_key("ab", "c") != content_key("a", "bc")


def test_several_processes_decode_once(tmp_path):
    class Slow(CachedData):
        decoded = 0

        def source_key(self, *, train):
            return f"slow-{train}"

        def decode(self, *, train, allocate=None):
            Slow.decoded += 1
            return a_split()

    data = Slow()
    for world, testing, expected in [(1, False, 0), (2, False, 1), (2, True, 2)]:
        data.trainer = SimpleNamespace(world_size=world, testing=testing, predicting=False)
        data.prepare_data()
        assert Slow.decoded == expected


# --- MNIST5k ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mnist")


@pytest.fixture
def mnist(mnist_cache, monkeypatch) -> MNIST5k:
    """MNIST5k over a cache that the module shares: parsing takes seconds."""
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(mnist_cache))
    return MNIST5k()


def test_a_folder_that_mnist5k_does_not_read_is_said():
    with pytest.warns(UserWarning, match=r"data\.root='elsewhere' is not used"):
        MNIST5k(root="elsewhere").prepare_data()


def test_mnist5k_has_a_balanced_and_disjoint_split(mnist):
    train, test = mnist.read(train=True), mnist.read(train=False)
    assert train.images.shape == (4000, 1, 28, 28)
    assert test.images.shape == (1000, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert train.class_names == test.class_names == tuple("0123456789")
    rows = {image.numpy().tobytes() for image in train.images}
    assert not rows & {image.numpy().tobytes() for image in test.images}
    pixels = train.images.float() / 255
    assert float(pixels.mean()) == pytest.approx(0.1307, abs=0.005)  # it really is MNIST
    assert float(pixels.std()) == pytest.approx(0.3081, abs=0.005)


def test_mnist5k_is_the_same_every_time_and_comes_from_the_cache(mnist, monkeypatch):
    first = mnist.read(train=True), mnist.read(train=False)
    monkeypatch.setattr(MNIST5k, "decode", lambda self, **_: must_not_decode())
    again = MNIST5k(split_seed=9)  # the test split is no matter of the run's seeds
    assert_same_split(again.read(train=True), first[0])
    assert_same_split(again.read(train=False), first[1])
    again.setup("fit")
    assert again.facts.image_shape == (1, 28, 28)
    assert again.preprocessing is not None
    assert again.preprocessing.mean.tolist() == pytest.approx([0.1307])


# --- image decoding --------------------------------------------------------------------------------------------


def picture(seed: int, width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(16, 16), (23, 16), (16, 23), (40, 31), (9, 30), (5, 5)])
def test_resizing_is_torchvisions(size):
    image = picture(0, *size)
    ours = decode_images([("it", encoded(image))], 1, image_size=16)
    theirs = np.asarray(Compose([Resize(16), CenterCrop(16)])(image))
    assert ours.shape == (1, 3, 16, 16)
    assert torch.equal(ours[0], torch.from_numpy(theirs.copy()).permute(2, 0, 1))


def test_test_images_are_resized_and_cropped_as_imagenet_is_evaluated(tmp_path):
    wide = picture(3, 40, 31)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            wide.save(tmp_path / split / name / "0.png")
    data = ImageFolder(str(tmp_path), 14, test_resize=16)
    for train, transform in ((True, [Resize(14), CenterCrop(14)]), (False, [Resize(16), CenterCrop(14)])):
        theirs = torch.from_numpy(np.asarray(Compose(transform)(wide)).copy()).permute(2, 0, 1)
        assert torch.equal(data.read(train=train).images[0], theirs)
    assert data.source_key(train=True) == ImageFolder(str(tmp_path), 14).source_key(train=True)
    assert data.source_key(train=False) != ImageFolder(str(tmp_path), 14).source_key(train=False)
    assert data.spec()["test_resize"] == 16
    assert "test_resize" not in ImageFolder(str(tmp_path), 14).spec()
    with pytest.raises(UserError, match=r"data.test_resize must be at least data.image_size \(14\), got 8"):
        ImageFolder(str(tmp_path), 14, test_resize=8)


def test_decoding_keeps_the_order_over_tasks_and_rounds(monkeypatch):
    monkeypatch.setattr("lightning_dd.data.readers._TASK", 3)
    monkeypatch.setattr("lightning_dd.data.readers._ROUND", 7)
    images = [picture(seed) for seed in range(23)]
    ours = decode_images(((str(i), encoded(image)) for i, image in enumerate(images)), 23)
    theirs = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    assert torch.equal(ours, theirs)


def test_sixteen_bit_images_are_refused_rather_than_clipped():
    deep = Image.fromarray(np.full((8, 8), 60000, np.uint16))
    with pytest.raises(UserError, match="in 'x', row 3: mode I;16 has more than 8 bits"):
        decode_images([("in 'x', row 3", encoded(deep))], 1)


# --- parquet ---------------------------------------------------------------------------------------------------


def write_parquet(
    file: Path,
    images: list[bytes | None],
    labels: list[int | None],
    names: list[str] | None = None,
    image_column: str = "image",
    label_column: str = "label",
    label_type: pa.DataType | None = None,
) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        image_column: pa.array([{"bytes": image, "path": None} for image in images], struct),
        label_column: pa.array(labels, label_type or pa.int64()),
    }
    table = pa.table(columns)
    if names is not None:
        features = {image_column: {"_type": "Image"}, label_column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=4)


@pytest.fixture
def hub(tmp_path) -> Path:
    """Two training shards with one grayscale image among colour, and an all-grayscale test file."""
    folder = tmp_path / "hub"
    folder.mkdir()
    colour = [encoded(picture(seed)) for seed in range(12)]
    colour[5] = encoded(picture(5, mode="L"))
    write_parquet(folder / "train-0.parquet", colour[:6], [0, 1] * 3, ["cat", "dog"])
    write_parquet(folder / "train-1.parquet", colour[6:], [1, 0] * 3, ["cat", "dog"])
    write_parquet(folder / "test.parquet", [encoded(picture(s, mode="L")) for s in (90, 91)], [1, 0], ["cat", "dog"])
    return folder


def test_parquet_reads_the_hugging_face_layout(hub):
    data = ParquetImages("train-*.parquet", "test.parquet", root=str(hub), val_fraction=0.25)
    train, test = data.read(train=True), data.read(train=False)
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 1] * 3 + [1, 0] * 3
    assert train.images.shape == (12, 3, 8, 8)
    assert train.images.dtype == torch.uint8
    expected = torch.from_numpy(np.asarray(picture(7)).copy()).permute(2, 0, 1)
    assert torch.equal(train.images[7], expected)
    grey = torch.from_numpy(np.asarray(picture(5, mode="L")).copy())
    assert torch.equal(train.images[5], grey.expand(3, 8, 8))  # a grayscale file in a colour set
    assert test.images.shape == (2, 3, 8, 8)  # all grayscale, but train has colour
    data.setup()
    assert data.facts.class_names == ("cat", "dog")


def test_a_wholly_grayscale_set_keeps_one_channel(tmp_path):
    for name, seeds in (("train", range(4)), ("test", range(4, 6))):
        images = [encoded(picture(seed, mode="L")) for seed in seeds]
        write_parquet(tmp_path / f"{name}.parquet", images, [0, 1] * (len(images) // 2), ["a", "b"])
    data = ParquetImages("train.parquet", "test.parquet", root=str(tmp_path))
    assert data.read(train=False).images.shape == (2, 1, 8, 8)
    assert data.read(train=True).images.shape == (4, 1, 8, 8)


def test_a_second_read_comes_from_the_cache_until_the_bytes_change(hub, cache, monkeypatch):
    def reader() -> ParquetImages:
        return ParquetImages("train-*.parquet", "test.parquet", root=str(hub))

    first = reader().read(train=True)
    with monkeypatch.context() as patch:
        patch.setattr(ParquetImages, "decode", lambda self, **_: must_not_decode())
        assert_same_split(reader().read(train=True), first)
    assert len(list(cache.iterdir())) == 2
    write_parquet(hub / "train-1.parquet", [encoded(picture(77))], [0], ["cat", "dog"])
    assert len(reader().read(train=True).labels) == 7


def test_no_more_of_the_files_is_read_than_the_rows_need(hub, monkeypatch):
    data = ParquetImages("train-*.parquet", "test.parquet", root=str(hub))
    data.labels(train=True)
    opened = []
    whole = tables._opened
    monkeypatch.setattr(tables, "_opened", lambda file: opened.append(file.name) or whole(file))
    assert len(list(data.encoded(train=True, rows=torch.tensor([0, 5])))) == 2
    assert opened == ["train-0.parquet"]


def test_parquet_without_names_other_columns_and_plain_binary(tmp_path):
    for name, labels in (("a", [0, 2, 1]), ("b", [1])):
        images = pa.array([encoded(picture(label)) for label in labels], pa.large_binary())
        table = pa.table({"img": images, "fine_label": pa.array(labels, pa.uint8())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    data = ParquetImages("a.parquet", ["b.parquet"], root=str(tmp_path), image_column="img", label_column="fine_label")
    assert data.read(train=True).class_names == data.read(train=False).class_names == ("0", "1", "2")
    assert data.read(train=True).labels.dtype == torch.int64


def test_images_of_several_sizes_need_image_size(tmp_path):
    images = [encoded(picture(0, 8, 8)), encoded(picture(1, 12, 10))]
    write_parquet(tmp_path / "train.parquet", images, [0, 1])
    write_parquet(tmp_path / "test.parquet", [encoded(picture(2, 30, 9))], [0])
    arguments = {"train_files": "train.parquet", "test_files": "test.parquet", "root": str(tmp_path)}
    with pytest.raises(UserError, match=r"'train.parquet', row 1 is 12x10.*8x8.*data.image_size") as error:
        ParquetImages(**arguments).read(train=True)
    one_line(error)
    data = ParquetImages(**arguments, image_size=6)
    assert data.read(train=True).images.shape == (2, 3, 6, 6)
    assert data.read(train=False).images.shape == (1, 3, 6, 6)


def test_files_are_looked_for_in_the_working_folder_then_in_the_environment(hub, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    data = ParquetImages("train-*.parquet", "test.parquet")
    with pytest.raises(UserError, match=r"data.train_files: no file matches 'train-\*.parquet' in '.'"):
        data.read(train=True)
    monkeypatch.setenv("LIGHTNING_DD_DATA", str(hub))
    assert len(data.read(train=True).labels) == 12
    monkeypatch.chdir(hub)
    monkeypatch.delenv("LIGHTNING_DD_DATA")
    assert len(data.read(train=True).labels) == 12
    absolute = ParquetImages(str(hub / "train-*.parquet"), str(hub / "test.parquet"), root=str(empty))
    assert len(absolute.read(train=True).labels) == 12


def test_overlapping_patterns_and_names_with_brackets(hub):
    (hub / "train-0.parquet").rename(hub / "train[0].parquet")
    (hub / "train-link.parquet").symlink_to(hub / "train-1.parquet")
    both = ["train[0].parquet", "train*.parquet"]
    data = ParquetImages(both, "test.parquet", root=str(hub))
    assert data.read(train=True).labels.tolist() == [0, 1] * 3 + [1, 0] * 3


def test_the_spec_of_parquet_rebuilds_it_without_paths(hub, monkeypatch):
    data = ParquetImages(["train-0.parquet", str(hub / "train-1.parquet")], "../hub/test.parquet", root=str(hub))
    spec = data.spec()
    assert spec["train_files"] == ["train-0.parquet", "train-1.parquet"]
    assert spec["test_files"] == ["test.parquet"]
    assert str(hub) not in json.dumps(spec)
    monkeypatch.setenv("LIGHTNING_DD_DATA", str(hub))
    rebuilt = DATA_SETS["ParquetImages"](**spec)
    data.setup()
    rebuilt.setup()
    assert rebuilt.facts == data.facts


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([encoded(picture(0)), b"no image"], r"'train.parquet', row 1: not a known image format"),
        ([encoded(picture(0)), encoded(picture(1), "JPEG")[:200]], r"'train.parquet', row 1: .*"),
        ([encoded(picture(0)), encoded(picture(1))[:60]], r"'train.parquet', row 1: .*"),
        ([encoded(picture(0)), None], r"'train.parquet', row 1: it has no bytes"),
        ([], r"data.train_files: there are no rows to read"),
    ],
)
def test_broken_images_are_named(tmp_path, images, message):
    write_parquet(tmp_path / "train.parquet", images, [0, 1][: len(images)], ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [encoded(picture(0))], [0], ["a", "b"])
    with pytest.raises(UserError, match=message) as error:
        ParquetImages("train.parquet", "test.parquet", root=str(tmp_path)).read(train=True)
    assert "0x" not in one_line(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_files": "nothing-*.parquet"}, r"data.train_files: no file matches 'nothing-\*.parquet'"),
        ({"test_files": "missing.parquet"}, r"data.test_files: no file matches 'missing.parquet'"),
        ({"train_files": []}, "data.train_files must name at least one file"),
        ({"image_column": "img"}, r"has no column 'img' \(it has image, label\); set data.image_column"),
        ({"label_column": "fine"}, r"has no column 'fine'"),
        ({"label_column": "image"}, r"column 'image' holds struct.*, not integers"),
        ({"image_column": "label"}, r"column 'label' holds int64, not the bytes of images"),
        ({"test_files": "train-0.parquet"}, "is in data.train_files and in data.test_files"),
        ({"train_files": "text.parquet"}, "cannot read '.*text.parquet' as parquet"),
        ({"test_files": "other-names.parquet"}, "'train-0.parquet' and 'other-names.parquet' disagree"),
        ({"train_files": "null.parquet"}, "'null.parquet': column 'label' has rows without a label"),
        ({"test_files": "wide.parquet"}, r"data.test_files: the images are \(3, 8, 9\).*\(3, 8, 8\)"),
    ],
)
def test_bad_parquet_arguments(hub, changes, message):
    (hub / "text.parquet").write_text("no parquet")
    image = encoded(picture(0))
    write_parquet(hub / "other-names.parquet", [image], [0], ["dog", "cat"])
    write_parquet(hub / "null.parquet", [image, image], [0, None], ["cat", "dog"])
    write_parquet(hub / "wide.parquet", [encoded(picture(0, 9, 8))], [0], ["cat", "dog"])
    arguments = {"train_files": "train-*.parquet", "test_files": "test.parquet", "root": str(hub)}
    data = ParquetImages(**arguments | changes)
    with pytest.raises(UserError, match=message) as error:
        _ = data.read(train=True), data.read(train=False)
    one_line(error)


def test_a_colour_test_split_of_a_grayscale_set_is_refused(hub):
    (hub / "test.parquet").rename(hub / "grey.parquet")
    data = ParquetImages("grey.parquet", "train-*.parquet", root=str(hub))
    with pytest.raises(UserError, match=r"\(3, 8, 8\).*\(1, 8, 8\)"):
        data.read(train=False)


def test_labels_out_of_range_of_the_names(tmp_path):
    image = encoded(picture(0))
    write_parquet(tmp_path / "train.parquet", [image] * 3, [0, 1, 2], ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [image], [0], ["a", "b"])
    with pytest.raises(UserError, match=r"labels must be in \[0, 2\), found 0..2"):
        ParquetImages("train.parquet", "test.parquet", root=str(tmp_path), val_fraction=0).setup("fit")


def test_metadata_that_is_not_hugging_faces_is_passed_over(tmp_path):
    for name, metadata in (("train", b"{no json"), ("test", b'{"info": {"features": []}}')):
        table = pa.table({"image": pa.array([encoded(picture(0))]), "label": [0]})
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / f"{name}.parquet")
    data = ParquetImages("train.parquet", "test.parquet", root=str(tmp_path))
    assert data.read(train=True).class_names == ("0",)


def test_classes_chosen_from_parquet_are_labelled_in_the_order_of_the_choice(tmp_path, cache):
    names = ["ant", "bee", "cat", "dog"]
    labels = [3, 1, 0, 2, 1, 3, 0, 2]
    images = [encoded(picture(seed)) for seed in range(8)]
    images[2] = b"not chosen, so not decoded"
    write_parquet(tmp_path / "train-0.parquet", images[:4], labels[:4], names)
    write_parquet(tmp_path / "train-1.parquet", images[4:], labels[4:], names)
    write_parquet(tmp_path / "test.parquet", images[:2], labels[:2], names)
    files = ("train-*.parquet", "test.parquet")
    data = ParquetImages(*files, root=str(tmp_path), classes=["dog", 1])
    split = data.read(train=True)
    assert split.class_names == ("dog", "bee")
    assert split.labels.tolist() == [0, 1, 1, 0]  # rows 0, 1, 4 and 5
    expected = torch.stack([torch.from_numpy(np.asarray(picture(s)).copy()).permute(2, 0, 1) for s in (0, 1, 4, 5)])
    assert torch.equal(split.images, expected)
    assert data.read(train=False).labels.tolist() == [0, 1]
    assert data.spec()["classes"] == ["dog", 1]
    other = ParquetImages(*files, root=str(tmp_path), classes=["bee", "dog"]).read(train=True)
    assert other.labels.tolist() == [1, 0, 0, 1]  # not the cached one
    for classes, message in [
        (["cow"], "there is no class 'cow' among the 4 classes"),
        ([4], "there is no class 4"),
        (["bee", 1], "data.classes names 'bee' twice"),
        ([], "at least one class"),
        ("nette", "data.classes='nette' chooses among ImageNet's 1,000 classes; here are 4"),
        ("bees", "data.classes must be a list or one of nette, woof, meow"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            ParquetImages(*files, root=str(tmp_path), classes=classes).read(train=True)
        one_line(error)


def test_parquet_channels_can_be_said(tmp_path):
    for name, seeds in (("train", range(4)), ("test", range(4, 6))):
        images = [encoded(picture(seed, mode="L")) for seed in seeds]
        write_parquet(tmp_path / f"{name}.parquet", images, [0, 1] * (len(images) // 2), ["a", "b"])
    assert ParquetImages("train.parquet", "test.parquet", root=str(tmp_path), channels=3).read(
        train=True
    ).images.shape == (
        4,
        3,
        8,
        8,
    )


def test_parquet_on_disk_is_known_by_sizes_and_times(hub, monkeypatch):
    data = ParquetImages("train-*.parquet", "test.parquet", root=str(hub), on_disk=True, val_fraction=0.25)
    plain = ParquetImages("train-*.parquet", "test.parquet", root=str(hub), val_fraction=0.25)
    data.setup()
    plain.setup()
    assert data.facts == plain.facts
    assert torch.equal(
        data.test.everything().images[:], plain.test.everything().images
    )  # grayscale in a set with colour
    key = ParquetImages("train-*.parquet", "test.parquet", root=str(hub), on_disk=True).source_key(train=True)
    assert key == data.source_key(train=True) != plain.source_key(train=True)
    os.utime(hub / "train-0.parquet", ns=(1, 1))
    assert data.source_key(train=True) != key


# --- folders ---------------------------------------------------------------------------------------------------


def fill(folder: Path, classes: dict[str, int], first: int = 0) -> None:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(first + number, 10, 8).save(folder / name / f"{number}.png")


def test_a_folder_with_train_and_test(tmp_path):
    fill(tmp_path / "train", {"dog": 3, "cat": 2})
    fill(tmp_path / "test", {"cat": 1}, first=50)
    fill(tmp_path / "val", {"cat": 4}, first=60)
    picture(30, 9, 9, "L").save(tmp_path / "train" / "cat" / "grey.JPG")
    deeper = tmp_path / "train" / "cat" / "deeper"
    deeper.mkdir()
    picture(31).save(deeper / "image.jpeg")
    for stray in ("train/cat/notes.txt", "train/cat/._0.png", "train/list.csv"):
        (tmp_path / stray).write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = ImageFolder(str(tmp_path), 8)
    train, test = data.read(train=True), data.read(train=False)
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 3
    assert train.images.shape == (7, 3, 8, 8)
    assert len(test.labels) == 1  # test, not val
    expected = torch.from_numpy(np.asarray(picture(1, 10, 8).crop((1, 0, 9, 8))).copy()).permute(2, 0, 1)
    assert torch.equal(train.images[1], expected)
    assert torch.equal(train.images[3, 0], train.images[3, 2])  # grey.JPG
    assert ImageFolder(str(tmp_path), 8, channels=1).read(train=True).images.shape == (7, 1, 8, 8)
    assert data.spec().items() >= {"image_size": 8, "channels": 3}.items()
    assert str(tmp_path) not in json.dumps(data.spec())


def test_val_is_the_test_split_where_there_is_no_test(tmp_path):
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "val", {"a": 2, "b": 2}, first=50)
    data = ImageFolder(str(tmp_path), 8)
    assert len(data.read(train=True).labels) == 6
    assert len(data.read(train=False).labels) == 4


def test_without_test_or_val_a_fixed_fifth_of_train_is_the_test_split(tmp_path):
    fill(tmp_path / "train", {"a": 10, "b": 5}, first=0)
    for number in range(5):  # make every image different
        picture(100 + number, 10, 8).save(tmp_path / "train" / "b" / f"{number}.png")
    data = ImageFolder(str(tmp_path), 8, split_seed=3)
    train, test = data.read(train=True), data.read(train=False)
    assert train.labels.bincount().tolist() == [8, 4]
    assert test.labels.bincount().tolist() == [2, 1]
    rows = [image.numpy().tobytes() for image in torch.cat([train.images, test.images])]
    assert len(set(rows)) == 15
    assert_same_split(ImageFolder(str(tmp_path), 8).read(train=False), test)


def test_a_folder_is_read_again_when_a_file_changes(tmp_path, monkeypatch):
    fill(tmp_path / "train", {"a": 2, "b": 2})
    fill(tmp_path / "test", {"a": 1})
    first = ImageFolder(str(tmp_path), 8).read(train=True)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "decode", lambda self, **_: must_not_decode())
        assert_same_split(ImageFolder(str(tmp_path), 8).read(train=True), first)
    changed = tmp_path / "train" / "a" / "0.png"
    picture(99, 10, 8).save(changed)
    os.utime(changed, ns=(1, 1))
    assert not torch.equal(ImageFolder(str(tmp_path), 8).read(train=True).images, first.images)
    assert ImageFolder(str(tmp_path), 4).read(train=True).images.shape[-1] == 4


def test_classes_chosen_from_a_folder_are_labelled_in_the_order_of_the_choice(tmp_path):
    fill(tmp_path / "train", {"ant": 2, "bee": 3, "cat": 1})
    fill(tmp_path / "test", {"ant": 1, "bee": 2, "cat": 1}, first=50)
    data = ImageFolder(str(tmp_path), 8, classes=["cat", "ant"])
    split = data.read(train=True)
    assert split.class_names == ("cat", "ant")
    assert split.labels.tolist() == [1, 1, 0]
    assert data.read(train=False).labels.tolist() == [1, 0]
    by_place = ImageFolder(str(tmp_path), 8, classes=[2, 0]).read(train=True)
    assert_same_split(by_place, split)
    assert len(ImageFolder(str(tmp_path), 8).read(train=True).labels) == 6
    with pytest.raises(UserError, match="there is no class 'dog' among the 3 classes"):
        ImageFolder(str(tmp_path), 8, classes=["dog"]).read(train=True)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"data.channels must be 1 or 3, got 2"):
        ImageFolder(str(tmp_path), 8, channels=2)
    with pytest.raises(UserError, match=r"data.image_size must be at least 1, got 0"):
        ImageFolder(str(tmp_path), 0)
    with pytest.raises(UserError, match=r"data.image_size must be at least 1, got -1"):
        ParquetImages("a", "b", image_size=-1)
    with pytest.raises(UserError, match=r"data.root='.*' must hold a folder 'train'") as error:
        ImageFolder(str(tmp_path / "nowhere"), 8).read(train=True)
    one_line(error)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"data.root: no images in"):
        ImageFolder(str(tmp_path), 8).read(train=True)
    fill(tmp_path / "train", {"a": 3, "b": 1})
    with pytest.raises(UserError, match="no folder 'test' or 'val', and no test split can be cut") as error:
        ImageFolder(str(tmp_path), 8).read(train=True)
    one_line(error)
    fill(tmp_path / "test", {"c": 1})
    with pytest.raises(UserError, match=r"'.*c' is a class that '.*train' lacks"):
        ImageFolder(str(tmp_path), 8).read(train=False)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot decode the image .*0.png: not a known image format"):
        ImageFolder(str(tmp_path), 8).read(train=True)


def test_an_empty_class_folder_is_named(tmp_path):
    fill(tmp_path / "train", {"a": 3, "b": 0, "c": 3})
    fill(tmp_path / "test", {"a": 1})
    with pytest.raises(UserError, match="class 'b' has no images"):
        ImageFolder(str(tmp_path), 8, val_fraction=0).setup("fit")


# --- torchvision -----------------------------------------------------------------------------------------------

COUNT = 20


class Standin:
    """What torchvision's class of the same name keeps, without files or a network."""

    calls: list[tuple[str, bool]]

    def __init__(self, name, root, download, train=None, split=None):
        train = split == "train" if train is None else train
        type(self).calls.append((root, download, train))
        generator = np.random.default_rng(train)
        labels = np.arange(COUNT) % 10
        if name in ("MNIST", "FashionMNIST"):
            self.data = torch.from_numpy(generator.integers(0, 256, (COUNT, 28, 28), dtype=np.uint8))
            self.targets = torch.from_numpy(labels)
        elif name == "SVHN":
            self.data = generator.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8)
            self.labels = labels
            return
        else:
            self.data = generator.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
            self.targets = labels.tolist()
        self.classes = [f"thing {label}" for label in range(10)]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_torchvision_sets(name, monkeypatch):
    Standin.calls = []
    monkeypatch.setattr(torchvision.datasets, name, lambda root, **k: Standin(name, root, **k))
    data = DATA_SETS[name](root="somewhere", val_fraction=0.5)
    data.prepare_data()
    assert Standin.calls == [("somewhere", True, True), ("somewhere", True, False)]
    raw = data.read(train=True)
    assert Standin.calls[-1] == ("somewhere", False, True)
    grey = "MNIST" in name
    assert raw.images.shape == (COUNT, 1, 28, 28) if grey else (COUNT, 3, 32, 32)
    assert raw.images.dtype == torch.uint8
    assert raw.images.is_contiguous()
    assert raw.labels.dtype == torch.int64
    digits = name in ("MNIST", "SVHN")
    assert raw.class_names[3] == ("3" if digits else "thing 3")
    source = torch.as_tensor(Standin(name, "", download=False, train=True).data)
    pixel = source[4, 7, 9:10] if grey else source[4, :, 7, 9] if name == "SVHN" else source[4, 7, 9]
    assert torch.equal(raw.images[4, :, 7, 9], pixel)
    data.setup()
    assert data.test is not None
    assert not torch.equal(data.read(train=False).images, raw.images)
    assert data.preprocessing is not None
    if name == "CIFAR10":  # FRePo's, not the .2023 of other repositories
        assert data.preprocessing.std.tolist() == pytest.approx([0.2470, 0.2435, 0.2616])
    if name == "SVHN":
        kept = data.preprocessing.inverse(data.train.everything().images).mean((0, 2, 3))
        assert torch.allclose(data.preprocessing.mean, kept, atol=1e-4)


def test_missing_torchvision_files_name_the_root(tmp_path):
    for name in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"):
        with pytest.raises(UserError, match=rf"{name} was not found in data.root='.*nothing'") as error:
            DATA_SETS[name](root=str(tmp_path / "nothing")).read(train=True)
        one_line(error)


def test_a_failed_download_is_one_line(monkeypatch):
    def unreachable(root, train, download):
        raise OSError("<urlopen error [Errno -2] Name or service not known>\nand more")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    with pytest.raises(UserError, match=r"could not be downloaded to data.root='data' \(<urlopen") as error:
        DATA_SETS["CIFAR10"]().prepare_data()
    assert "and more" not in one_line(error)


def test_a_set_is_found_where_it_was_defined_before():
    for path in ("lightning_dd.data.mnist5k.MNIST5k", "lightning_dd.data.MNIST5k", "MNIST5k"):
        assert isinstance(build_data(path), MNIST5k)
    with pytest.raises(UserError, match=r"unknown data set 'MNIST6k'; did you mean 'MNIST5k'"):
        build_data("lightning_dd.data.mnist5k.MNIST6k")


# --- together --------------------------------------------------------------------------------------------------


def test_the_command_line_sees_every_argument(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RealData, "data")
    extra = {
        "ImageFolder": ["--data.root=here", "--data.image_size=8"],
        "ParquetImages": ["--data.train_files=a-*.parquet", "--data.test_files=[b, c]"],
        "HuggingFace": ["--data.path=somebody/pictures", "--data.classes=[cat, 0]"],
        "ImageNet": ["--data.classes=woof"],
    }
    for name in DATA_SETS:
        known = [f"--data=lightning_dd.data.{name}", *extra.get(name, [])]
        settings = parser.parse_args([*known, "--data.val_fraction=0.3", "--data.preprocessing=zca"]).data
        assert settings.init_args.val_fraction == 0.3
        assert settings.init_args.eval_batch_size == 500
        data = DATA_SETS[name](**vars(settings.init_args))
        assert data.name == name
        assert data.spec()["preprocessing"] == "zca"
        arguments = {"root": str(tmp_path)} if name == "ImageFolder" else {}
        assert DATA_SETS[name](**data.spec(), **arguments).spec() == data.spec()
        assert json.loads(json.dumps(data.spec())) == data.spec()
        with pytest.raises(jsonargparse.ArgumentError, match="nonsense"):
            parser.parse_args([*known, "--data.nonsense=1"])


def test_a_trainer_runs_over_a_reader(hub, tmp_path):
    class Count(LightningModule):
        seen = 0

        def test_step(self, batch, batch_index):
            assert batch[0].dtype == torch.float32
            self.seen += len(batch[1])

    module = Count()
    data = ParquetImages("train-*.parquet", "test.parquet", root=str(hub), eval_batch_size=1, val_fraction=0.25)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.test(module, data, verbose=False)
    assert module.seen == 2


def test_the_cache_is_no_pickle(hub, cache):
    ParquetImages("train-*.parquet", "test.parquet", root=str(hub)).read(train=True)
    with safe_open(next(cache.glob("*.safetensors")), framework="pt") as file:
        assert set(file.keys()) == {"labels"}
    assert np.load(next(cache.glob("*.npy")), allow_pickle=False).dtype == np.uint8


@pytest.mark.slow
def test_the_real_cifar10_and_tiny_imagenet(request):
    folder = Path(REAL_DATA or request.config.rootpath.parent / "shared" / "data")
    sets = {
        "cifar10": ("cifar10-train.parquet", "cifar10-test.parquet", 50_000, 32, 10),
        "tiny": ("tiny-imagenet-train-*.parquet", "tiny-imagenet-val.parquet", 100_000, 64, 200),
    }
    if not (folder / "cifar10-train.parquet").is_file():
        pytest.skip(f"no parquet files in {folder}; set LIGHTNING_DD_DATA")
    for train_files, test_files, count, size, classes in sets.values():
        data = ParquetImages(train_files, test_files, root=str(folder))
        train, test = data.read(train=True), data.read(train=False)
        assert train.images.shape == (count, 3, size, size)
        assert test.images.shape == (10_000, 3, size, size)
        assert len(train.class_names) == classes
        assert train.labels.bincount().tolist() == [count // classes] * classes
        assert_same_split(ParquetImages(train_files, test_files, root=str(folder)).read(train=True), train)
