"""RDED: the selection against a brute-force computation, the tiling, and bad settings."""

import pytest
import torch
from helpers import TinyData, tiny_trainer
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, resized_crop, to_pil_image

from lightning_dd.augment.crops import draw_crops
from lightning_dd.data import ImageFolder
from lightning_dd.data.sampling import stratified_cut
from lightning_dd.distilled.views import ViewStyle
from lightning_dd.distillers import RDED
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.rded import tile
from lightning_dd.pretrained.classifier import Teacher
from lightning_dd.synthetic import TeacherLabels
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator

TINY = {
    "architecture": "convnet:width=4,depth=2",
    "labels": "hard",
    "probe": Probe(steps=1),
    "teacher": Teacher(steps=60, lr=0.02),
    "candidates": 7,
    "crops": 3,
}


def run(folder, source=None, **changes):
    model = RDED(**(TINY | changes))
    tiny_trainer(folder, 1, callbacks=[]).fit(model, source or TinyData(val_fraction=0.25))
    return model


@pytest.mark.parametrize(("ipc", "patches"), [(2, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("preprocessing", ["standardise", "zca"])
def test_the_surest_crops_are_chosen_and_tiled(ipc, patches, preprocessing, tmp_path):
    source = TinyData(val_fraction=0.25, preprocessing=preprocessing)
    model = run(tmp_path, source, ipc=ipc, patches=patches, crop_min_scale=0.3)
    generator = make_generator(0, "candidates")
    train, to_normalised = source.train, source.preprocessing
    expected = []
    for label in range(3):
        own = (train.labels == label).nonzero().flatten()
        order = own[torch.randperm(len(own), generator=generator)[:7]]
        boxes = draw_crops(21, (8, 8), 0.3, generator, ratio=1.0)
        torch.testing.assert_close(boxes[:, 2], boxes[:, 3])  # square
        best = []
        for place, row in enumerate(order.tolist()):
            pixels = train.pixels(slice(row, row + 1))
            tries = []
            for box in boxes[3 * place : 3 * place + 3]:
                left, top, size, _ = (8 * box).round().int().tolist()
                crop = resized_crop(pixels, top, left, size, size, [8 // patches] * 2, antialias=True)
                margin = (8 - 8 // patches) // 2
                if preprocessing == "standardise":
                    seen = F.pad(to_normalised(crop), [margin] * 4)  # as the official selector: zeros around a tile
                else:  # which whitens whole images: a tile on the mean
                    seen = to_normalised.inverse(torch.zeros(1, 1, 8, 8))
                    seen[:, :, margin : 8 - margin, margin : 8 - margin] = crop
                    seen = to_normalised(seen)
                logits = model.network(seen)
                tries.append((float(F.cross_entropy(logits, torch.tensor([label]))), crop[0, 0]))
            best.append(min(tries, key=lambda pair: pair[0]))
        surest = [crop for _, crop in sorted(best, key=lambda pair: pair[0])[: ipc * patches**2]]
        for index in range(ipc):
            if patches == 1:
                expected.append(surest[index])
                continue
            small = surest[index::ipc]
            expected.append(torch.cat([torch.cat(small[:2], 1), torch.cat(small[2:], 1)]))
    expected = to_normalised(torch.stack(expected)[:, None])
    torch.testing.assert_close(model.synthetic.images.detach(), expected, rtol=1e-3, atol=1e-3)


def test_tiles_lie_row_by_row_and_the_best_are_spread_over_the_images():
    pixels = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 2, 2)
    tiled = tile(pixels, 2)
    assert tiled.shape == (2, 3, 4, 4)
    corners = [(0, 0), (0, 3), (3, 0), (3, 3)]
    assert [float(tiled[0, 2, row, column]) for row, column in corners] == pytest.approx([0, 2, 4, 6])
    assert [float(tiled[1, 0, row, column]) for row, column in corners] == pytest.approx([1, 3, 5, 7])
    assert torch.equal(tile(pixels, 1), pixels)


def test_fewer_images_than_candidates_are_all_candidates(tmp_path):
    few, all_ = (run(tmp_path, ipc=9, candidates=count, crops=1, crop_min_scale=1.0) for count in (9, 300))
    assert torch.equal(few.synthetic.images, all_.synthetic.images)
    # Nine whole images of nine: the class itself, the surest first.
    own = few.trainer.datamodule.train
    torch.testing.assert_close(
        few.synthetic.images[:9].detach().flatten(1).sort(0).values,
        own.take(own.labels == 0).images.flatten(1).sort(0).values,
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_selection_follows_the_seed(tmp_path):
    first, again, other = (run(tmp_path, seed=seed).synthetic.images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_are_soft_unless_asked_otherwise():
    assert RDED().label_strategy.style == RDED(patches=1).label_strategy.style == ViewStyle(min_scale=1.0)
    assert RDED(patches=2).label_strategy.style == ViewStyle(min_scale=0.5, tiles=2)
    # Views of whole images also where only their number is said.
    assert RDED(labels=TeacherLabels(epochs=7)).label_strategy.style == ViewStyle(min_scale=1.0)
    assert RDED(patches=2, labels=TeacherLabels(min_scale=0.3)).label_strategy.style == ViewStyle(0.3, tiles=2)
    assert RDED(labels="hard").label_strategy is None
    with pytest.raises(UserError, match="labels of RDED must be one of hard, centred, soft, got 'learned'"):
        RDED(labels="learned")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"crop_min_scale": 0.0}, r"crop_min_scale must be in \(0, 1\], got 0.0"),
        ({"patches": 3}, r"patches=3 do not divide images of \(8, 8\) pixels"),
        ({"ipc": 2, "patches": 2}, "ipc=2 with patches=2 needs 8 candidates of every class, and class 0 has 7"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **settings)


def photos(folder, size):
    """Write 24 files of three classes, larger than the images and of other proportions, and return their data."""
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("a", "b", "c")):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "test" / name).mkdir(parents=True)
        for number in range(8):
            noise = torch.randint(0, 80, (3, size[0] + number, size[1]), generator=generator, dtype=torch.uint8)
            noise[label] += 150
            for split in ("train", "test"):
                to_pil_image(noise).save(folder / split / name / f"{number}.png")
    return ImageFolder(str(folder), image_size=8, val_fraction=0.25)


def test_crops_are_of_the_original_files(tmp_path):
    data = photos(tmp_path / "photos", (20, 30))
    settings = {"ipc": 1, "patches": 2, "candidates": 5, "crops": 2, "crop_min_scale": 0.5}
    model = run(tmp_path / "run", data, **settings)
    generator = make_generator(0, "candidates")
    drawn = torch.cat([model.candidates_of(data.train, label, generator) for label in range(3)]).sort().values
    surest = {label: [] for label in range(3)}
    files = sorted((tmp_path / "photos" / "train").rglob("*.png"))
    kept, _ = stratified_cut(torch.arange(3).repeat_interleave(8), 0.25, data.split_seed)
    for row in drawn.tolist():
        whole = pil_to_tensor(Image.open(files[kept[row]])).float() / 255
        height, width = whole.shape[1:]
        assert height >= 20
        assert width == 30
        boxes = draw_crops(2, (height, width), 0.5, generator, ratio=1.0)
        tries = []
        for box in (boxes * torch.tensor([width, height, width, height])).round().int().tolist():
            crop = resized_crop(whole[None], box[1], box[0], box[3], box[2], [4, 4], antialias=True)
            seen = F.pad(data.preprocessing(crop), [2] * 4)
            label = torch.tensor([kept[row] // 8])
            tries.append((float(F.cross_entropy(model.network(seen), label)), crop[0]))
        surest[int(kept[row]) // 8].append(min(tries, key=lambda pair: pair[0]))
    for label, own in surest.items():
        best = [crop for _, crop in sorted(own, key=lambda pair: pair[0])[:4]]
        expected = torch.cat([torch.cat(best[:2], 2), torch.cat(best[2:], 2)], 1)
        found = data.preprocessing.inverse(model.synthetic.images.detach())[label]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_broken_file_that_was_left_out_shifts_no_row(tmp_path):
    data = photos(tmp_path / "photos", (20, 30))
    (tmp_path / "photos" / "train" / "a" / "0.png").write_bytes(b"none")
    skipping = ImageFolder(data.root, image_size=8, val_fraction=0.25, skip_broken=True)
    model = run(tmp_path / "run", skipping, ipc=1, patches=2, candidates=5)
    assert skipping.train.whole is None
    assert model.synthetic.images.shape == (3, 3, 8, 8)
