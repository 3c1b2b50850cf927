"""Images that do not stay on the device: drawn by rows, from memory or from a mapped file, with the same results."""

import os
from pathlib import Path

import pytest
import torch
from helpers import TinyData, make_distilled, tiny_trainer
from pytorch_lightning import Callback

from lightning_dd.callbacks import MetaDD, PoolAlternation
from lightning_dd.data import CIFAR10, ImageFolder, MNIST5k, ParquetImages, Preprocessing, RawSplit
from lightning_dd.data.cache import cache_folder, cached_split, load_split, new_pixels
from lightning_dd.data.images import Split
from lightning_dd.data.readers import CachedData
from lightning_dd.data.sampling import EvalBatches, ShuffledStream, next_batch
from lightning_dd.distillers import FRePo, Herding
from lightning_dd.distillers.base import Probe
from lightning_dd.evaluators.matrix import ALL_REAL, SOURCES, random_real
from lightning_dd.pretrained import ClassifierRecipe
from lightning_dd.pretrained.classifier import Teacher
from lightning_dd.utils.errors import UserError

REAL_DATA = os.environ.get("LIGHTNING_DD_DATA")  # read before the fixture below hides it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_DD_DATA", raising=False)
    return tmp_path / "cache"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator(), dtype=torch.uint8)


def streamed(count: int = 40, workers: int = 0) -> tuple[Split, torch.Tensor]:
    """Every other row of the pixels as a split, and its normalised images as an ordinary tensor."""
    rows = torch.arange(0, 2 * count, 2)
    normalise = Preprocessing([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    source, labels = pixels(2 * count), torch.arange(count) % 5
    return Split(source, labels, normalise, threads=workers, rows=rows), normalise(source[rows].float() / 255)


# --- the images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_rows_are_those_of_the_tensor_it_stands_for(workers, kept):
    split, plain = streamed(200, workers)
    if kept:
        source, labels, normalise = split._source, split.labels, split.preprocessing
        split = Split(source, labels, normalise, threads=workers, keep_normalised=True, rows=split._rows)
    rows = torch.randperm(200, generator=generator())[:150]
    mask = torch.arange(200) % 3 == 0
    for chosen in (rows, mask, slice(5, 190, 7), slice(None), rows[:0], rows[:1]):
        images, labels = split.take(chosen)
        assert torch.equal(images, plain[chosen])
        assert torch.equal(labels, split.labels[chosen])
        torch.testing.assert_close(split.preprocessing(split.pixels(chosen)), images)
    assert (len(split), split.image_shape) == (200, (3, 4, 4))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_reading_ahead_changes_nothing(workers):
    split, plain = streamed(workers=workers)
    expected, other = torch.tensor([3, 1, 7]), torch.tensor([2, 2])
    split.read_ahead(expected)
    assert torch.equal(split.take(expected).images, plain[expected])
    split.read_ahead(expected)
    assert torch.equal(split.take(other).images, plain[other])  # something else was asked for
    assert torch.equal(split.take(expected).images, plain[expected])


def test_what_was_read_ahead_is_not_read_again():
    split, plain = streamed(workers=2)
    split.read_ahead(slice(0, 4))
    for part in split._ahead[2]:
        part.result()
    split._source = torch.zeros_like(split._source)
    assert torch.equal(split.take(torch.arange(4)).images, plain[:4])


def test_an_error_while_reading_ahead_is_raised_when_the_rows_are_asked_for():
    split, _ = streamed(workers=2)
    split._source = split._source[:10]  # as if the file had been cut
    split.read_ahead(slice(20, 24))
    with pytest.raises(IndexError):
        split.take(slice(20, 24))


def test_images_can_be_drawn_inside_inference_mode():
    split, plain = streamed(workers=2)
    with torch.inference_mode():
        split.read_ahead(slice(0, 4))
        assert torch.equal(split.take(slice(0, 4)).images, plain[0:4])
        assert torch.equal(split.take(slice(4, 8)).images, plain[4:8])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pixels_through_another_map(workers):
    split, _ = streamed(workers=workers)
    other = Preprocessing([0.0] * 3, [0.5] * 3)
    batch = split.through(other).take(torch.tensor([5, 0]))
    assert torch.equal(batch.images, other(split.pixels(torch.tensor([5, 0]))))
    assert batch.labels.tolist() == [0, 0]


@pytest.mark.parametrize(("count", "ranks"), [(40, 1), (41, 3), (2, 3)])
def test_evaluation_batches_hold_every_image_once(count, ranks):
    split, plain = streamed(count, workers=2)
    for rank in range(ranks):
        batches = list(EvalBatches(split, 6, rank, ranks))
        images = torch.cat([batch.images for batch in batches] or [plain[:0]])
        labels = torch.cat([batch.labels for batch in batches] or [split.labels[:0]])
        assert torch.equal(images, plain[rank::ranks])
        assert torch.equal(labels, split.labels[rank::ranks])


# --- peeking at the stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", range(6))
def test_peeking_leaves_stream_and_state_as_they_are(before):
    peeked, plain = ShuffledStream(10, 3, generator()), ShuffledStream(10, 3, generator())
    for _ in range(before):
        assert torch.equal(peeked.next(), plain.next())
        assert torch.equal(peeked.peek(), peeked.peek())
    state = peeked.state_dict()
    assert state["position"] == plain.state_dict()["position"]
    assert torch.equal(state["generator"], plain.state_dict()["generator"])
    assert torch.equal(state["order"], plain.state_dict()["order"])
    resumed = ShuffledStream(10, 3, generator(9))
    resumed.peek()
    resumed.load_state_dict(state)
    expected = [plain.next().tolist() for _ in range(7)]
    assert [peeked.next().tolist() for _ in range(7)] == expected
    assert [resumed.next().tolist() for _ in range(7)] == expected


@pytest.mark.parametrize("batch_size", [7, 40])
def test_batches_of_a_stream_are_the_same_streamed_or_not(batch_size):
    (ahead, _), (plain, _) = streamed(workers=2), streamed()
    ours, theirs = ShuffledStream(40, batch_size, generator()), ShuffledStream(40, batch_size, generator())
    for _ in range(12):
        one, other = next_batch(ahead, ours, "cpu"), next_batch(plain, theirs, "cpu")
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


# --- the data module -------------------------------------------------------------------------------------------


class CachedTiny(CachedData):
    """TinyData through the cache."""

    decoded = 0

    def source_key(self, *, train):
        return f"tiny-{train}"

    def decode(self, *, train, allocate=new_pixels):
        type(self).decoded += 1
        images, labels, names = TinyData.read(TinyData(), train=train)
        array = allocate(tuple(images.shape))
        array[:] = images.numpy()
        return RawSplit(torch.from_numpy(array), labels, names)


STORAGES = [{}, {"keep_on_device": False}, {"on_disk": True}, {"on_disk": True, "workers": 0}]


def made(storage: dict, **kwargs) -> CachedTiny:
    data = CachedTiny(**storage, **kwargs)
    data.setup()
    return data


@pytest.mark.parametrize("storage", STORAGES[1:])
@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_data_is_the_same_wherever_it_is_kept(storage, kind):
    plain, data = made({}, preprocessing=kind), made(storage, preprocessing=kind)
    assert data.facts == plain.facts  # the fingerprint included
    for name, value in plain.preprocessing.state_dict().items():
        assert torch.equal(data.preprocessing.state_dict()[name], value)
    for split in ("train", "val", "test"):
        one, other = getattr(data, split).everything(), getattr(plain, split).everything()
        assert torch.equal(one.labels, other.labels)
        if kind == "standardise":
            assert torch.equal(one.images, other.images)
        else:  # a matrix product may round with the number of rows
            assert torch.allclose(one.images, other.images, atol=1e-6)
    assert len(list(data.val_dataloader())) == len(list(plain.val_dataloader()))


class SaveHalfway(Callback):
    """Write a checkpoint after two outer steps, when the batch of the third is being read ahead."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def run(folder: Path, storage: dict, ckpt: Path | None = None) -> torch.Tensor:
    model = FRePo(
        architecture="conv:width=4,depth=2",
        pool_size=2,
        real_batch_size=8,
        inner_batch_size=3,
        probe=Probe(steps=2),
        lr=0.01,
    )
    callbacks = [PoolAlternation(), SaveHalfway(folder / "halfway.ckpt")]
    trainer = tiny_trainer(folder, 4, limit_val_batches=1, val_check_interval=2, callbacks=callbacks)
    trainer.fit(model, CachedTiny(**storage), ckpt_path=ckpt)
    return model.synthetic.images.detach().clone()


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return run(tmp_path_factory.mktemp("plain"), {})


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_a_distiller_learns_the_same_wherever_images_are_kept(plain_run, storage, tmp_path):
    assert torch.equal(run(tmp_path, storage), plain_run)


def test_a_streamed_run_resumes_exactly(plain_run, tmp_path):
    run(tmp_path, {"on_disk": True})
    assert torch.equal(run(tmp_path, {"on_disk": True}, ckpt=tmp_path / "halfway.ckpt"), plain_run)


def test_coresets_and_architectures_take_streamed_data(tmp_path):
    images = []
    for storage in STORAGES[:3]:
        model = Herding(
            ipc=1,
            architecture="conv:width=4,depth=2",
            teacher=Teacher(steps=30),
            probe=Probe(steps=1),
        )
        tiny_trainer(tmp_path, 1, limit_val_batches=0).fit(model, CachedTiny(**storage))
        images.append(model.synthetic.images.detach())
        (tmp_path / "cache" / "classifiers").rename(tmp_path / f"used{len(images)}")  # train it anew
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_metadd_takes_streamed_whitened_data(tmp_path):
    callback = MetaDD(["conv:width=4,depth=2", "conv:width=6,depth=1"], training=ClassifierRecipe(steps=40))
    model = FRePo(architecture="conv:width=4,depth=2", pool_size=1, real_batch_size=8, probe=Probe(steps=1))
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0, callbacks=[PoolAlternation(), callback])
    trainer.fit(model, CachedTiny(on_disk=True, preprocessing="zca"))
    assert len(callback.accuracies) == 2


def test_random_real_images_are_the_same_wherever_images_are_kept():
    distilled = make_distilled(ipc=2)
    one, other = (random_real(distilled, made(storage), seed=3) for storage in (STORAGES[0], STORAGES[2]))
    assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("storage", STORAGES)
def test_all_real_images_are_not_drawn_into_memory_from_a_file(storage):
    distilled, data = make_distilled(ipc=2), made(storage)
    if data.on_disk:
        with pytest.raises(UserError, match=r"is read from disk: training on all of it needs it in memory"):
            SOURCES[ALL_REAL](distilled, data, 0)
    else:
        assert torch.equal(SOURCES[ALL_REAL](distilled, data, 0).images, data.train.everything().images)


def test_images_on_disk_are_hashed_and_fitted_once(monkeypatch):
    first = made({"on_disk": True}, preprocessing="zca")
    monkeypatch.setattr("lightning_dd.data.base._hashed", lambda *_: pytest.fail("hashed again"))
    monkeypatch.setattr("lightning_dd.data.base.fit_preprocessing", lambda *_, **__: pytest.fail("fitted again"))
    again = made({"on_disk": True}, preprocessing="zca")
    assert again.facts == first.facts
    assert torch.equal(again.preprocessing.zca_whiten, first.preprocessing.zca_whiten)
    with pytest.raises(pytest.fail.Exception, match="hashed again"):
        made({"on_disk": True}, split_seed=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CIFAR10(on_disk=True), "CIFAR10 is read whole into memory; set data.keep_on_device=false instead"),
        (lambda: MNIST5k(workers=-1), "data.workers must be at least 0, got -1"),
        (lambda: MNIST5k(zca_block=0), "data.zca_block must be at least 1, got 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_set_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr("lightning_dd.data.base.memory_of", lambda device: 1000)
    with pytest.raises(UserError, match=r"CachedTiny takes 0.0 GiB.*data.keep_on_device=false or data.on_disk=true"):
        made({})
    with pytest.raises(UserError, match=r"set data.keep_on_device=false$"):
        TinyData().setup()
    made({"on_disk": True})
    made({"keep_on_device": False})


# --- the mapped file -------------------------------------------------------------------------------------------


def mapped_split(key: str, decode) -> RawSplit:
    return cached_split(key, decode, on_disk=True)


def a_split(allocate=new_pixels, count: int = 6) -> RawSplit:
    array = allocate((count, 3, 4, 5))
    array[:] = torch.arange(array.size, dtype=torch.uint8).view(array.shape).numpy()
    return RawSplit(torch.from_numpy(array), torch.arange(count) % 2, ("böse", "gut"))


def must_not_decode(allocate=None) -> RawSplit:
    raise AssertionError("decoded although cached")


def assert_same(one: RawSplit, other: RawSplit) -> None:
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert one.class_names == other.class_names


def test_a_mapped_split_is_an_ordinary_cache_file(cache):
    split = mapped_split("k", a_split)
    assert_same(split, a_split())
    assert {file.name for file in cache.iterdir()} == {"k.npy", "k.safetensors"}  # and no temporary file
    assert_same(mapped_split("k", must_not_decode), split)
    assert_same(cached_split("k", must_not_decode), split)  # with its checksum
    cached_split("other", a_split)
    assert_same(mapped_split("other", must_not_decode), split)


def test_a_mapped_split_lies_in_the_file_and_not_in_memory():
    def large(allocate) -> RawSplit:
        array = allocate((6000, 3, 64, 64))  # 74 MB, in a file that is mostly a hole
        return RawSplit(torch.from_numpy(array), torch.arange(6000) % 2, ("a", "b"))

    mapped_split("k", large)
    before = resident()
    split = mapped_split("k", must_not_decode)
    assert int(split.images[::600].sum()) == 0
    assert resident() - before < 30 * 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("no /proc here")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("decoder", ["one channel", "own array", "small labels", "another shape", "turned", "fewer"])
def test_pixels_that_are_not_in_the_file_are_written_to_it(decoder):
    def decode(allocate) -> RawSplit:
        split = a_split(new_pixels if decoder == "own array" else allocate)
        if decoder == "one channel":
            return split._replace(images=split.images[:, :1].clone())
        if decoder == "another shape":
            return split._replace(images=split.images.view(6, 3, 5, 4))
        if decoder == "fewer":
            return split.take(torch.arange(4))._replace(images=split.images[:4])
        if decoder == "turned":
            return split._replace(images=split.images.transpose(2, 3))
        return split._replace(labels=split.labels.to(torch.int32)) if decoder == "small labels" else split

    expected = decode(new_pixels)
    assert_same(mapped_split("k", decode), expected)
    assert_same(cached_split("k", must_not_decode), expected)


def test_very_many_class_names_still_fit():
    names = tuple(f"class {index}" for index in range(200_000))
    mapped_split("k", lambda allocate: a_split(allocate)._replace(class_names=names))
    assert mapped_split("k", must_not_decode).class_names == names


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_a_damaged_file_is_decoded_again(cache, damage):
    mapped_split("k", a_split)
    file = cache / "k.npy"
    file.write_bytes(file.read_bytes()[:-5] if damage == "truncated" else b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(mapped_split("k", a_split), a_split())
    assert_same(mapped_split("k", must_not_decode), a_split())


def test_a_decoder_that_fails_leaves_nothing_behind(cache):
    def fail(allocate) -> RawSplit:
        a_split(allocate)
        raise UserError("cannot decode the image: broken")

    with pytest.raises(UserError, match=r"^cannot decode the image: broken$"):
        mapped_split("k", fail)
    assert list(cache.iterdir()) == []


def test_a_full_disk_and_an_unwritable_cache_are_one_line(cache, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="No space left on device"):
            mapped_split("k", a_split)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"data.on_disk needs a cache folder \(LIGHTNING_DD_CACHE\)") as error:
        mapped_split("k", a_split)
    assert "\n" not in str(error.value)


def test_folders_decode_into_the_file(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (40 * number, 0, 90)).save(tmp_path / "set" / split / name / f"{number}.png")
    one, other = ImageFolder(str(tmp_path / "set"), 8), ImageFolder(str(tmp_path / "set"), 8, on_disk=True)
    plain = one.read(train=True)
    file = cache_folder() / f"{one.source_key(train=True)}.npy"
    file.unlink()
    assert_same(other.read(train=True), plain)
    assert load_split(file) is not None


@pytest.mark.slow
def test_the_real_tiny_imagenet_streams(request):
    folder = Path(REAL_DATA or request.config.rootpath.parent / "shared" / "data")
    if not (folder / "tiny-imagenet-val.parquet").is_file():
        pytest.skip(f"no tiny-imagenet parquet files in {folder}; set LIGHTNING_DD_DATA")
    files = ("tiny-imagenet-val.parquet", "tiny-imagenet-train-00000-of-00004.parquet")
    data = [ParquetImages(*files, root=str(folder), **storage) for storage in ({}, {"on_disk": True})]
    for part in data:
        part.setup("fit")
    assert data[0].facts == data[1].facts
    streams = [ShuffledStream(len(part.train.labels), 512, generator()) for part in data]
    for _ in range(20):
        one, other = (next_batch(part.train, stream, "cpu") for part, stream in zip(data, streams, strict=True))
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
