"""Formats for other tools: each is read back, and what it loses is said."""

import numpy as np
import pytest
import torch
from helpers import make_distilled
from test_cli import only_line, status

from lightning_dd.cli import main
from lightning_dd.data import ImageFolder, MNIST5k, ParquetImages
from lightning_dd.distilled.export import eight_bit_loss, folder_names


@pytest.fixture
def file(tmp_path):
    made = make_distilled(ipc=5, data=MNIST5k)
    made.images[0, 0, 0, 0] = 9.0  # beyond white
    return made, str(made.save(tmp_path / "set.safetensors"))


def test_images_are_a_folder_that_can_be_read_again(file, capsys):
    made, path = file
    assert main(["export", path, "--format=images", "--output=pictures"]) == 0
    said = capsys.readouterr().out
    assert "wrote pictures: 50 PNG files in 10 folders" in said
    assert eight_bit_loss(made) in said
    assert "0.0% of the values are clipped" in said
    assert "left out: the learned labels" in said
    again = ImageFolder("pictures", 28, channels=1)
    files = again._listed(again._train_folder())
    assert [label for _, label in files] == made.classes.tolist()
    pixels = again.decode(train=True).images
    assert pixels.shape[1:] == (1, 28, 28)


def test_parquet_is_the_layout_of_the_hub_with_the_labels_beside_it(file):
    from pyarrow.parquet import read_table

    made, path = file
    assert main(["export", path, "--format=parquet", "--output=set.parquet"]) == 0
    table = read_table("set.parquet")
    torch.testing.assert_close(torch.tensor(table["target"].to_pylist()), made.labels)
    assert b"half squared error" in table.schema.metadata[b"loss"]
    main(["export", path, "--format=parquet", "--output=test.parquet"])
    read = ParquetImages("set.parquet", "test.parquet").read(train=True)
    assert read.class_names == made.class_names
    assert read.labels.equal(made.classes)
    assert (read.images.float() / 255 - made.pixels()).abs().max() < 0.51 / 255


def test_npz_loses_nothing_and_holds_no_objects(file, capsys):
    made, path = file
    assert main(["export", path, "--format=npz", "--output=set.npz"]) == 0
    assert "8-bit" not in capsys.readouterr().out
    with np.load("set.npz", allow_pickle=False) as arrays:
        assert torch.from_numpy(arrays["images"]).equal(made.images)
        assert torch.from_numpy(arrays["labels"]).equal(made.labels)
        assert tuple(arrays["class_names"]) == made.class_names
        assert arrays["preprocessing_mean"] == made.preprocessing.mean.numpy()


def test_the_loss_of_eight_bits_is_measured():
    made = make_distilled(ipc=2, data=MNIST5k)  # real digits, which are 8-bit
    assert "0.0% of the values are clipped to [0, 1]; the images move by 0.0% of their norm" in eight_bit_loss(made)
    made.images *= 2
    moved = float(eight_bit_loss(made).rpartition("move by ")[2].partition("%")[0])
    assert moved > 20


def test_an_unknown_format_and_names_that_are_paths(file, capsys):
    assert status(["export", file[1], "--format=gif", "--output=x"]) == 2
    assert "unknown format 'gif'; known: images, npz, parquet, set" in only_line(capsys)
    assert not any("/" in name or name.startswith(".") for name in folder_names(["..", "a/../b", "/etc", ""]))
