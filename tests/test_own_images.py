"""A folder of photos as people have them, to a report, by the commands that README writes."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dd import DistilledSet
from lightning_dd.cli import main
from lightning_dd.data import ImageFolder
from lightning_dd.utils.errors import UserError

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^lightning-dd (.*(?:photos|images-folder).*)$", TEXT, re.MULTILINE)
QUICK = {
    "fit": ["--trainer.accelerator=cpu", "--model.architecture=conv:width=4,depth=2", "--model.probe.steps=1"],
    "evaluate": ["--seeds=1", "--steps=1", "--accelerator=cpu"],
}


def photo(path, colour, size=(40, 30), **save):
    """A plain image whose left third is black, so that one that is turned shows it."""
    pixels = np.full((size[1], size[0], len(colour)), colour, np.uint8)
    pixels[:, : size[0] // 3, :3] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **save)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for index in range(12):
        size = (30 + index, 44 - index)
        photo(root / "äpfel und birnen" / f"bild {index}.png", (200, 10 * index, 0), size)
        photo(root / "猫" / f"{index}.JPG", (0, 200, 10 * index), size)
    (root / "猫" / "broken.jpg").write_bytes(b"no image at all")
    (root / "猫" / "notes.txt").write_text("not an image")
    (root / "猫" / ".hidden.png").write_bytes(b"")
    (root / "猫" / "Thumbs.db").write_bytes(b"")
    photo(root / "__MACOSX" / "猫" / "._0.JPG", (0, 0, 0))  # what a zip file from a Mac leaves behind
    return root


@pytest.mark.filterwarnings("ignore:left out")
def test_readme_takes_a_folder_of_photos_to_a_report(photos, caplog):
    assert len(COMMANDS) == 2
    for command in COMMANDS:
        words = shlex.split(command.replace("max_steps 1000", "max_steps 2").replace("image_size 64", "image_size 16"))
        words = ["convnet:width=4,depth=2" if word == "unseen-small" else word for word in words]
        words = ["conv:width=4,depth=2,norm=none" if word == "conv:norm=none" else word for word in words]
        assert main([*words, *QUICK[words[0]]]) == 0
    said = next(text for text in caplog.messages if text.startswith("ImageFolder: "))
    for part in (
        "17 training and 2 validation images of 16x16 with 3 channel(s), 2 classes (äpfel und birnen, 猫), standardise",
        "short side resized to 16, centre cropped",
        "no folder 'test': a fixed 20% of each class is the test split",
        "1 file(s) of 20 cannot be decoded and are left out",
        "passed over as no images: notes.txt",
    ):
        assert part in said
    rows = json.loads(Path("report/results.json").read_text())
    assert {row["set"] for row in rows} == {"FRePo-ImageFolder-ipc1-seed0"}
    assert not any(row["other_data"] for row in rows)
    file = Path("runs/images-folder/version_0/last.safetensors")
    assert file.stat().st_size < 40_000  # no matrices
    assert DistilledSet.load(file).class_names == ("äpfel und birnen", "猫")


def test_photos_are_turned_and_laid_on_white(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: what is left in the file is at the top of the picture
    for index in range(4):
        photo(tmp_path / "train" / "a" / f"{index}.jpg", (250, 250, 250), (30, 30), exif=exif, quality=100)
        photo(tmp_path / "train" / "b" / f"{index}.png", (9, 9, 9, 0), (30, 30))
    seen = ImageFolder(str(tmp_path), 30, val_fraction=0).read(train=True)
    turned, clear = (seen.images[seen.labels == label].float().mean((0, 1)) for label in (0, 1))
    assert turned[:8].max() < 20
    assert turned[12:].min() > 230
    assert clear.min() == 255
    raw = ImageFolder(str(tmp_path), 30, photos=False).read(train=True).images
    assert not torch.equal(raw, seen.images)


def test_a_broken_file_is_refused_unless_it_may_be_left_out(tmp_path):
    for name in "ab":
        for index in range(10):
            photo(tmp_path / name / f"{index}.png", (index, 0, 0))
    (tmp_path / "a" / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot decode the image .*3\.png"):
        ImageFolder(str(tmp_path), 8, val_fraction=0.25).setup()
    kept = ImageFolder(str(tmp_path), 8, skip_broken=True, val_fraction=0.25)
    with pytest.warns(UserWarning, match=r"left out: cannot decode the image .*3\.png"):
        kept.setup()
    assert sum(map(len, (kept.train, kept.val, kept.test))) == 19
