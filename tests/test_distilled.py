"""The distilled-set file: round trip, matching transform, and every way it can be unusable."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_dd.data.preprocess import fit_preprocessing
from lightning_dd.distilled.header import FORMAT_VERSION, checksum
from lightning_dd.distilled.set import DistilledSet, find_set
from lightning_dd.jobs import tensor_digest
from lightning_dd.losses.labels import student_loss
from lightning_dd.utils.errors import UserError


def make_set(kind="zca", **changes):
    pixels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    preprocessing = fit_preprocessing(kind, pixels)
    settings = {
        "images": preprocessing(pixels[:6]),
        "labels": torch.randn(6, 3, generator=torch.Generator().manual_seed(1)),
        "classes": torch.arange(3).repeat_interleave(2),
        "label_kind": "learned",
        "class_names": ("a", "b", "c"),
        "preprocessing": preprocessing,
        "data": {"name": "MNIST5k", "spec": {"val_fraction": 0.1}, "fingerprint": "f"},
        "method": "FRePo",
        "config": {"ipc": 2, "architecture": "conv"},
        "training": {"outer_step": 7},
        "run": {"seed_everything": 3},
    }
    return DistilledSet(**(settings | changes))


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_round_trip_keeps_everything(tmp_path, kind):
    distilled = make_set(kind)
    loaded = DistilledSet.load(distilled.save(tmp_path / "deep" / "set.safetensors"))
    for name in ("images", "labels", "classes"):
        assert torch.equal(getattr(loaded, name), getattr(distilled, name))
    for name in ("label_kind", "class_names", "data", "method", "config", "training", "run", "ipc", "architecture"):
        assert getattr(loaded, name) == getattr(distilled, name)
    pixels = torch.rand(5, 1, 4, 4)
    assert torch.equal(loaded.test_transform(pixels), distilled.preprocessing(pixels))
    assert len(loaded.dataset) == len(loaded) == 6
    assert loaded.pixels().min() >= 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set.safetensors"]  # no temporary left


@pytest.mark.parametrize(
    ("kind", "name"), [("learned", "half squared error"), ("hard", "cross-entropy"), ("soft", "KL divergence")]
)
def test_a_set_brings_the_loss_of_its_labels_and_says_so(kind, name, tmp_path):
    labels = torch.eye(3)[torch.arange(3).repeat_interleave(2)]
    distilled = make_set(label_kind=kind, labels=labels, temperature=4.0 if kind == "soft" else 1.0)
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    expected = student_loss(outputs, labels, kind, distilled.temperature)
    assert distilled.loss(outputs, labels).equal(expected)
    shown = repr(distilled)
    assert name in shown
    assert "FRePo of MNIST5k" in shown
    assert "\n" not in shown
    assert len(shown) < 160
    with safe_open(distilled.save(tmp_path / "set.safetensors"), framework="pt") as file:
        assert json.loads(file.metadata()["lightning_dd"])["loss"].startswith(name)


def test_whitening_takes_a_third_of_its_bytes_and_whitens_as_before(tmp_path):
    pixels = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    preprocessing = fit_preprocessing("zca", pixels)
    distilled = make_set(images=preprocessing(pixels[:6]), preprocessing=preprocessing)
    path = distilled.save(tmp_path / "set.safetensors")
    whole = preprocessing.zca_whiten.nbytes + preprocessing.zca_unwhiten.nbytes
    assert path.stat().st_size < 0.42 * whole + distilled.images.nbytes + 4000
    loaded = DistilledSet.load(path)
    torch.testing.assert_close(loaded.test_transform(pixels), preprocessing(pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.pixels(), pixels[:6], rtol=0, atol=2e-3)
    again = DistilledSet.load(loaded.save(tmp_path / "again.safetensors")).preprocessing.state_dict()
    assert all(again[name].equal(value) for name, value in loaded.preprocessing.state_dict().items())
    whole = {f"preprocessing.{name}": value for name, value in preprocessing.state_dict().items()}
    older = {name: value for name, value in load_file(path).items() if not name.endswith("_lower")} | whole
    save_file(older, path, {"lightning_dd": safe_open(path, framework="pt").metadata()["lightning_dd"]})
    assert DistilledSet.load(path).preprocessing.zca_unwhiten.equal(preprocessing.zca_unwhiten)


def test_whitening_that_half_precision_would_spoil_stays_as_it_is(tmp_path):
    pixels = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(3) / 8
    preprocessing = fit_preprocessing("zca", pixels, zca_ridge=1e-7)
    distilled = make_set(images=preprocessing(pixels[:6]), preprocessing=preprocessing)
    loaded = DistilledSet.load(distilled.save(tmp_path / "set.safetensors"))
    torch.testing.assert_close(loaded.pixels(), distilled.pixels(), rtol=0, atol=1e-4)


def test_pixels_undo_the_preprocessing():
    pixels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(make_set("zca").pixels(), pixels[:6], rtol=1e-3, atol=1e-3)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        make_set(config={"not json": torch}).save(path)
    assert path.read_bytes() == before


def test_a_folder_of_runs_is_its_newest_one_that_has_a_set(tmp_path):
    for version, time in ((0, 3), (1, 2), (2, 4)):
        run = tmp_path / f"version_{version}"
        run.mkdir()
        if version < 2:  # the newest run failed
            make_set().save(run / "last.safetensors")
        os.utime(run, (time, time))
    assert find_set(tmp_path) == tmp_path / "version_0" / "last.safetensors"


def test_missing_truncated_and_foreign_files_give_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no such file"):
        DistilledSet.load(tmp_path / "nothing.safetensors")
    path = make_set().save(tmp_path / "set.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"not a safetensors file, or truncated"):
        DistilledSet.load(truncated)
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(UserError, match=r"not a safetensors file, or truncated"):
        DistilledSet.load(text)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match=r"not one written by lightning_dd"):
        DistilledSet.load(foreign)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (json.dumps({"format_version": FORMAT_VERSION + 1}), "upgrade lightning_dd"),
        ("{", "header is damaged"),
        (json.dumps({"format_version": 1}), "incomplete"),
    ],
)
def test_unusable_headers_give_one_line(tmp_path, header, message):
    path = tmp_path / "set.safetensors"
    tensors = {"images": torch.zeros(2, 1, 2, 2), "labels": torch.zeros(2, 2), "classes": torch.arange(2)}
    save_file(tensors, path, {"lightning_dd": header})
    with pytest.raises(UserError, match=message):
        DistilledSet.load(path)


def test_disagreeing_shapes_and_nan_are_refused():
    with pytest.raises(UserError, match="shapes disagree"):
        make_set(labels=torch.zeros(6, 4))
    with pytest.raises(UserError, match="NaN"):
        make_set(images=torch.full((6, 1, 4, 4), float("nan")))


def test_an_unwritable_folder_gives_one_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match=r"cannot write to folder"):
        make_set().save(blocker / "set.safetensors")


# ---- a file from somebody else -----------------------------------------------------------------------------------


def rewritten(path, header=None, tensors=None, checksum=False, **metadata):
    """A file as another program would write it: some header fields and tensors are others."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    text = json.dumps(json.loads(old["lightning_dd"]) | (header or {}))
    kept = {"checksum": old["checksum"]} if checksum else {}
    save_file(load_file(path) | (tensors or {}), path, {"lightning_dd": text, **kept, **metadata})
    return path


def test_a_checksum_is_of_names_shapes_types_and_values():
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(2, 3)}
    others = [
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"].view(2, 3), "b": tensors["b"]},
        {"a": tensors["a"].int().view(torch.float32), "b": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"].int()},
    ]
    first = checksum("header", tensors)
    assert first == checksum("header", {"b": tensors["b"].clone(), "a": tensors["a"].clone()})
    assert len({first, checksum("other", tensors), *(checksum("header", other) for other in others)}) == 6
    assert tensor_digest(tensors) != tensor_digest({"a": tensors["a"], "c": tensors["b"]})  # in the same order


def test_an_edited_or_damaged_file_is_named_and_one_without_a_checksum_loads(tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="its checksum differs"):
        DistilledSet.load(path)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="its checksum differs"):
        DistilledSet.load(rewritten(path, {"method": "Other"}, checksum=True))
    assert DistilledSet.load(rewritten(path, {"method": "Other"})).method == "Other"
    with pytest.raises(UserError, match="unknown entry 'checksun'"):
        DistilledSet.load(rewritten(path, checksun="0"))


def test_loaded_tensors_stay_when_the_file_changes(tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    loaded = DistilledSet.load(path)
    before = loaded.images.clone()
    with path.open("r+b") as file:
        file.seek(-2000, 2)
        file.write(bytes(2000))
    assert torch.equal(loaded.images, before)
    assert torch.equal(loaded.preprocessing.zca_whiten, make_set().preprocessing.zca_whiten)


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"format_version": "1"}, "'format_version' must not be a str"),
        ({"label_kind": ["hard"]}, "'label_kind' must not be a list"),
        ({"class_names": "abc"}, "'class_names' must not be a str"),
        ({"class_names": [1, 2, 3]}, "'class_names' must hold names"),
        ({"data": []}, "'data' must not be a list"),
        ({"data": {"fingerprint": {}}}, "'fingerprint' must not be a dict"),
        ({"config": None}, "'config' must not be a NoneType"),
        ({"training": 1.5}, "'training' must not be a float"),
        ({"temperature": "hot"}, "'temperature' must not be a str"),
        ({"temperature": float("inf")}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"class_names": ["a", "b"]}, "shapes disagree"),
        ({"label_kind": "hard"}, "hard labels must be largest at the row's class"),
    ],
)
def test_header_fields_of_another_type_are_named(tmp_path, header, field):
    path = rewritten(make_set().save(tmp_path / "set.safetensors"), header)
    with pytest.raises(UserError, match=field) as caught:
        DistilledSet.load(path)
    assert "\n" not in str(caught.value)


def test_deep_and_long_headers_are_damaged(tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    for text in ("[" * 200_000 + "]" * 200_000, '{"format_version": 1e999}', " " * 2**24 + "{}"):
        save_file(load_file(path), path, {"lightning_dd": text})
        with pytest.raises(UserError, match=r"header is damaged|must not be a float"):
            DistilledSet.load(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("preprocessing.std", lambda value: value * 0, "std above 0"),
        ("preprocessing.std", lambda value: -value, "std above 0"),
        ("preprocessing.mean", lambda value: value / 0, "finite"),
        ("preprocessing.mean", lambda value: value.repeat(2), "one finite number per channel"),
        ("preprocessing.zca_whiten_lower", lambda value: value * torch.nan, "zca_whiten must hold finite"),
        ("preprocessing.zca_whiten_lower", lambda value: value * 0, "do not undo each other"),
        ("preprocessing.zca_whiten_lower", lambda value: value[:10], "does not go with matrices"),
        ("preprocessing.zca_whiten_lower", lambda value: value[:-1], "is no packed matrix"),
        ("preprocessing.zca_whiten_lower", lambda value: value.double(), "is no packed matrix"),
        ("preprocessing.zca_whiten", lambda value: torch.eye(16), "zca_whiten stands there twice"),
        ("preprocessing.zca_mean", lambda value: value.double(), "zca_mean must hold finite float32"),
        ("preprocessing.other", lambda value: torch.zeros(1), "preprocessing: expected"),
        ("other", lambda value: torch.zeros(1), "other must be left out"),
        ("images", lambda value: value * 1e6, "images: pixels lie in"),
        ("images", lambda value: value.double(), "images must be torch.float32"),
        ("images", lambda value: value[:, :, :0], "shapes disagree"),
        ("images", lambda value: value.repeat(1, 2, 1, 1), "preprocessing is of other images"),
        ("classes", lambda value: value + 1, r"classes must be in \[0, 3\), found 1 to 3"),
        ("classes", lambda value: value * 0, "equally many images, found 0 to 6"),
        ("classes", lambda value: value.int(), "classes must be torch.int64"),
    ],
)
def test_what_no_run_can_have_written_is_named(tmp_path, name, change, message):
    path = make_set().save(tmp_path / "set.safetensors")
    changed = change(load_file(path).get(name)).contiguous()
    with pytest.raises(UserError, match=message) as caught:
        DistilledSet.load(rewritten(path, tensors={name: changed}))
    assert "\n" not in str(caught.value)


def test_a_map_that_lacks_a_matrix_is_refused(tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    header = {"lightning_dd": safe_open(path, framework="pt").metadata()["lightning_dd"]}
    for name in ("zca_mean", "zca_whiten", "zca_unwhiten"):
        kept = {key: value for key, value in load_file(path).items() if not key.removesuffix("_lower").endswith(name)}
        save_file(kept, tmp_path / "less.safetensors", header)
        with pytest.raises(UserError, match="preprocessing: expected mean, std, zca_mean"):
            DistilledSet.load(tmp_path / "less.safetensors")


def test_names_reach_no_terminal_raw(tmp_path):
    path = rewritten(make_set().save(tmp_path / "set.safetensors"), {"label_kind": "\x1b[2Jhard\nsecond line\u202e"})
    with pytest.raises(UserError) as caught:
        DistilledSet.load(path)
    assert str(caught.value).isprintable()
