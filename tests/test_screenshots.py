"""The page of a report and TensorBoard, as a browser draws them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_dd.cli import main

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import screenshots

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(screenshots.browser() is None, reason="no browser is installed"),
]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_report_fits_its_window_and_shows_its_pictures(tmp_path):
    quick = ["--architectures=conv:width=4,depth=2,norm=none", "--seeds=1", "--steps=1", "--accelerator=cpu"]
    assert main(["evaluate", "builtin:mnist5k_frepo_ipc1", "--output=report", *quick]) == 0
    page = (tmp_path / "report" / "report.html").resolve().as_uri()
    shot = pixels(screenshots.shoot(page, tmp_path / "report.png", (1160, 1560)))
    assert shot.shape == (1560, 1160, 3)
    assert (shot[:, -10:] == 255).all()  # nothing runs out of the window on the right
    assert (shot.max(2) < 30).mean() > 0.02  # letters, and the black of ten digits


def test_tensorboard_shows_a_runs_pictures(tmp_path):
    with SummaryWriter(tmp_path / "runs" / "one") as board:
        board.add_image("synthetic/images", torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 64, 64))
    shot = pixels(screenshots.shoot_board(tmp_path / "runs", tmp_path / "board.png", (1200, 500)))
    assert (shot[5, 5] == shot[5, 600]).all()
    assert ((shot[..., 1] > 200) & (shot[..., 0] < 60)).sum() > 1000  # the green picture
