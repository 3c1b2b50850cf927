"""The distilled-set file: round trip, matching transform, and every way it can be unusable."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_dd.data.preprocess import fit_preprocessing
from lightning_dd.distilled.set import FORMAT_VERSION, DistilledSet
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
    }
    return DistilledSet(**(settings | changes))


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_round_trip_keeps_everything(tmp_path, kind):
    distilled = make_set(kind)
    loaded = DistilledSet.load(distilled.save(tmp_path / "deep" / "set.safetensors"))
    for name in ("images", "labels", "classes"):
        assert torch.equal(getattr(loaded, name), getattr(distilled, name))
    for name in ("label_kind", "class_names", "data", "method", "config", "training", "ipc", "architecture"):
        assert getattr(loaded, name) == getattr(distilled, name)
    pixels = torch.rand(5, 1, 4, 4)
    assert torch.equal(loaded.test_transform(pixels), distilled.preprocessing(pixels))
    assert len(loaded.dataset) == len(loaded) == 6
    assert loaded.pixels().min() >= 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set.safetensors"]  # no temporary left


def test_pixels_undo_the_preprocessing():
    pixels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(make_set("zca").pixels(), pixels[:6], rtol=1e-3, atol=1e-3)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        make_set(config={"not json": torch}).save(path)
    assert path.read_bytes() == before


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
