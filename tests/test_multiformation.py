"""Several images in the bytes of one: rendering, the start, what is stored, and what baselines are given."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import TinyData, split_of, tiny_trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lightning_dd.api import evaluate
from lightning_dd.data.images import DataFacts
from lightning_dd.data.preprocess import Preprocessing, fit_preprocessing
from lightning_dd.distilled.card import facts_of
from lightning_dd.distilled.multiformation import MultiFormed
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.union import union
from lightning_dd.distillers import DM, KCenter, Random
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.checkpoint import distilled_from_checkpoint
from lightning_dd.evaluators.matrix import SOURCES
from lightning_dd.pretrained import Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic import MultiFormation, Pixels, SyntheticSet, TeacherLabels
from lightning_dd.utils.errors import UserError

STANDARD = Preprocessing([0.3], [0.2])
DM_SETTINGS = {"architecture": "convnet:width=4,depth=2", "real_per_class": 6, "probe": Probe(steps=2)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def formed(factor=2, ipc=1, shape=(1, 8, 8), preprocessing=STANDARD):
    task = Task(DataFacts("toy", ("a", "b", "c"), shape, preprocessing.kind, "none"), preprocessing, {})
    return SyntheticSet(MultiFormation(factor), ipc, "hard", task)


def fitted(folder, model, steps=2, data=None, **kwargs):
    trainer = tiny_trainer(folder, steps, **kwargs)
    trainer.fit(model, data or TinyData())
    return model


def stored_by(folder, factor=2, data=None, **settings):
    return fitted(folder, DM(parameterisation=MultiFormation(factor), **(DM_SETTINGS | settings)), data=data)


# ---- rendering and the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "side"), [(2, 8), (3, 8), (5, 28), (8, 8)])
def test_every_part_is_enlarged_to_an_image_of_its_stored_images_class(factor, side):
    made = formed(factor, ipc=2, shape=(2, side, side), preprocessing=Preprocessing([0.3, 0.3], [0.2, 0.2]))
    stored = made.parameterisation.images
    with torch.no_grad():
        stored.copy_(torch.randn(stored.shape, generator=generator()))
    assert (len(stored), len(made)) == (6, 6 * factor**2)
    assert made.classes.tolist() == [label for label in range(3) for _ in range(2 * factor**2)]
    cuts = [round(side * cut / factor) for cut in range(factor + 1)]
    for row in range(factor):
        for column in range(factor):
            part = stored[:, :, cuts[row] : cuts[row + 1], cuts[column] : cuts[column + 1]]
            expected = F.interpolate(part, (side, side), mode="bilinear")
            torch.testing.assert_close(made.images[row * factor + column :: factor**2], expected)


def test_a_start_from_real_images_shows_distinct_shrunken_ones_of_the_right_class():
    labels = torch.randint(0, 3, (90,), generator=generator(1))
    images = torch.arange(90.0).view(90, 1, 1, 1).expand(-1, 1, 8, 8)
    made = formed(ipc=3)
    made.parameterisation.start("real", split_of(images, labels), 12, generator())
    rows = made.images.detach().flatten(1)
    torch.testing.assert_close(rows, rows.round(), atol=1e-3, rtol=0)  # a flat image stays as it is
    rows = rows[:, 0].round().long()
    assert torch.equal(labels[rows], made.classes)
    assert len(rows.unique()) == 36


def test_a_class_of_too_few_images_shows_all_of_them_before_one_again():
    labels = torch.tensor([0] * 30 + [1] * 3 + [2] * 30)
    made = formed()
    images = torch.arange(63.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    made.parameterisation.start("real", split_of(images, labels), 4, generator())
    rows = made.images.detach()[:, 0, 0, 0].round().long().view(3, 4)
    assert [len(row.unique()) for row in rows] == [4, 3, 4]


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_real_images_are_shrunk_by_means_over_areas_before_any_whitening(kind):
    pixels = torch.rand(50, 1, 8, 8, generator=generator(2))
    preprocessing = fit_preprocessing(kind, pixels)
    made = formed(preprocessing=preprocessing).parameterisation
    made.encode(preprocessing(pixels[:12]))
    expected = F.interpolate(F.avg_pool2d(pixels[:12], 2), (8, 8), mode="bilinear")
    torch.testing.assert_close(preprocessing.inverse(made.render().detach()), expected, atol=1e-3, rtol=1e-3)


def test_noise_is_that_of_the_stored_images_and_clipping_reaches_their_pixels():
    made = formed(ipc=30).parameterisation
    made.start("noise", None, 120, generator())
    assert abs(float(made.images.detach().std()) - 1) < 0.05
    made.clip(STANDARD)
    pixels = STANDARD.inverse(made.images.detach())
    assert (float(pixels.min()), float(pixels.max())) == pytest.approx((0, 1), abs=1e-6)


@pytest.mark.parametrize("factor", [1, 9, 2.0, "2", True])
def test_a_factor_that_cannot_be_is_refused_at_once(factor):
    with pytest.raises(UserError, match="multi-formation: factor must be a whole number from 2 to 8, got"):
        MultiFormation(factor)
    with pytest.raises(UserError, match="from 2 to 4, got 5"):
        formed(5, shape=(1, 4, 4))


# ---- what is stored ----------------------------------------------------------------------------------------------


class Whitened(TinyData):
    def __init__(self, **kwargs):
        super().__init__(preprocessing="zca", **kwargs)


@pytest.mark.parametrize("data", [TinyData, Whitened])
def test_the_file_keeps_the_learned_images_and_shows_what_students_see(data, tmp_path):
    model = stored_by(tmp_path, ipc=2, data=data())
    distilled = model.distilled_set()
    path = distilled.save(tmp_path / "set.safetensors")
    tensors, loaded = load_file(path), DistilledSet.load(path)
    assert torch.equal(tensors["stored"], model.synthetic.parameterisation.images.detach())
    assert "images" not in tensors
    assert torch.equal(loaded.images, distilled.images)
    torch.testing.assert_close(loaded.images, model.synthetic.images.detach())
    assert (loaded.ipc, loaded.shown_ipc, len(loaded), loaded.image_bytes) == (2, 8, 24, 6 * 64 * 4)
    assert "3 classes x 2 of 1x8x8 (shown as 8), hard labels" in repr(loaded)
    facts = facts_of(loaded, path)
    assert "3 classes x 2 images of 1x8x8 (shown as 8)" in facts["set"]
    assert ": images 1,536, labels 288" in facts["bytes"]
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lightning_dd"])
    assert (header["format_version"], header["ipc"]) == (3, 2)
    assert header["decoding"] == {"name": "multiformation", "factor": 2}
    assert torch.equal(DistilledSet.load(loaded.save(tmp_path / "again.safetensors")).images, loaded.images)


def test_images_that_no_longer_come_from_the_stored_ones_are_not_written(tmp_path):
    distilled = stored_by(tmp_path).distilled_set()
    with pytest.raises(UserError, match="its images were changed, and the stored ones"):
        replace(distilled, images=distilled.images + 1).save(tmp_path / "set.safetensors")


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ({"name": "generator", "factor": 2}, "the decoding of stored images must be multiformation"),
        ("multiformation", "the decoding of stored images must be multiformation"),
        ({"name": "multiformation"}, "factor must be a whole number from 2 to 8, got None"),
        ({"name": "multiformation", "factor": 10**9}, "factor must be a whole number from 2 to 8"),
        ({"name": "multiformation", "factor": 3}, "3 stored images at factor 3, and 12 labels"),
    ],
)
def test_a_file_that_asks_for_another_decoding_is_refused(decoding, message, tmp_path):
    path = stored_by(tmp_path).distilled_set().save(tmp_path / "set.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lightning_dd"])
    save_file(load_file(path), path, {"lightning_dd": json.dumps(header | {"decoding": decoding})})
    with pytest.raises(UserError, match=message):
        DistilledSet.load(path)


def test_stored_images_beside_images_or_without_their_decoding_are_refused(tmp_path):
    path = stored_by(tmp_path).distilled_set().save(tmp_path / "set.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lightning_dd"])
    tensors = load_file(path)
    both = tensors | {"images": torch.zeros(12, 1, 8, 8)}
    plain = {name: value for name, value in header.items() if name != "decoding"}
    for content, said, message in [(both, header, "images must be left out"), (both, plain, "stored must be left out")]:
        save_file(content, path, {"lightning_dd": json.dumps(said)})
        with pytest.raises(UserError, match=message):
            DistilledSet.load(path)


def test_a_checkpoint_gives_the_set_and_one_of_another_factor_is_refused(tmp_path):
    model = stored_by(tmp_path, ipc=2)
    model.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(distilled_from_checkpoint(tmp_path / "last.ckpt").images, model.distilled_set().images)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["parameterisation"]["init_args"]["factor"] = 8
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="ipc is not that of its labels"):
        distilled_from_checkpoint(tmp_path / "other.ckpt")


def test_a_teacher_labels_what_is_shown(tmp_path):
    labels = TeacherLabels(Teacher("convnet:width=4,depth=2", steps=20), epochs=2)
    loaded = DistilledSet.load(stored_by(tmp_path, labels=labels).distilled_set().save(tmp_path / "set.safetensors"))
    assert len(loaded.views) == len(loaded.labels) == 12
    assert loaded.ipc == 1


def test_a_union_stores_what_its_parts_store():
    def part(name):
        stored = MultiFormed(torch.randn(3, 1, 4, 4, generator=generator(len(name))), 2)
        labels = torch.eye(3).repeat_interleave(4, 0)
        classes, names = labels.argmax(1), tuple(f"{name}{label}" for label in range(3))
        data = {"name": "toy", "fingerprint": name, "spec": {"classes": list(names)}}
        return DistilledSet(stored.shown(STANDARD), labels, classes, "hard", names, STANDARD, data, stored=stored)

    parts = part("a"), part("bb")
    whole = union(parts)
    assert (whole.ipc, whole.shown_ipc) == (1, 4)
    torch.testing.assert_close(whole.stored.shown(STANDARD), torch.cat([piece.images for piece in parts]))
    plain = replace(parts[1], stored=None)
    with pytest.raises(UserError, match="different images per class"):
        union([parts[0], plain])


# ---- baselines ---------------------------------------------------------------------------------------------------


def test_selected_images_fill_the_parts(tmp_path):
    for cls in (Random, KCenter):
        teacher = Teacher("convnet:width=4,depth=2", steps=20)
        distilled = fitted(tmp_path, cls(ipc=2, parameterisation=MultiFormation(), teacher=teacher)).distilled_set()
        assert (distilled.ipc, distilled.shown_ipc) == (2, 8)
        data = TinyData()
        data.setup("fit")
        shrunk = F.interpolate(F.avg_pool2d(data.train.everything().images, 2), (8, 8), mode="bilinear")
        distances = torch.cdist(distilled.images.flatten(1), shrunk.flatten(1))
        nearest = distances.min(1)
        assert float(nearest.values.max()) < 0.01
        assert torch.equal(data.train.labels[nearest.indices], distilled.classes)
        assert len(nearest.indices.unique()) == 24


def test_random_real_images_are_as_many_as_are_stored_and_those_with_its_labels_as_are_shown(tmp_path):
    distilled = stored_by(tmp_path, ipc=2).distilled_set()
    real = TinyData()
    real.use_preprocessing(distilled.preprocessing)
    real.setup("test")
    drawn, same = (SOURCES[name](distilled, real, 0) for name in ("random-real", "random-same-labels"))
    assert (len(drawn), drawn.image_bytes) == (6, distilled.image_bytes)
    assert (len(same), same.image_bytes) == (24, distilled.image_bytes)
    assert torch.equal(same.labels, distilled.labels)


def test_the_report_counts_stored_images_and_trains_both_for_the_same_steps(tmp_path):
    distilled = stored_by(tmp_path, ipc=2).distilled_set()
    plain = fitted(tmp_path, DM(parameterisation=Pixels(), ipc=2, **DM_SETTINGS)).distilled_set()
    files = [part.save(tmp_path / f"{name}.safetensors") for name, part in (("four", distilled), ("one", plain))]
    data = {"data": "test_multiformation.TinyData"}
    rows = evaluate(files, ["conv:width=4,depth=2"], tmp_path / "out", seeds=1, steps=2, **data)
    assert {(row.set, row.ipc, row.shown_ipc) for row in rows} == {("four", 2, 8), ("one", 2, None)}
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 4
    assert "2, 2 (shown as 8) image(s) per class" in (tmp_path / "out" / "results.md").read_text()
