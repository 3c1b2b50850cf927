"""Images as sums of levels: what is rendered, the basis of colours, and runs."""

from itertools import pairwise

import pytest
import torch
from helpers import TinyData, split_of, tiny_trainer
from torch.nn import functional as F

from lightning_dd.data.images import DataFacts, Split
from lightning_dd.data.preprocess import fit_preprocessing
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import DM
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.checkpoint import distilled_from_checkpoint
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic import Pixels, Pyramid, SyntheticSet
from lightning_dd.utils.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(count=60, side=8):
    """Pixels whose channels move together, and one of which hardly moves."""
    mixing = torch.tensor([[0.2, 0.18, 0.02], [0.02, -0.02, 0.0], [0.0, 0.01, 0.03]])
    noise = torch.randn(count, 3, side, side, generator=generator(3))
    return (0.5 + torch.einsum("nchw,cd->ndhw", noise, mixing)).clamp(0, 1)


def made_of(space, pixels, kind="standardise", ipc=2, init="real"):
    preprocessing, labels = fit_preprocessing(kind, pixels), torch.arange(len(pixels)) % 3
    task = Task(DataFacts("toy", ("a", "b", "c"), tuple(pixels.shape[1:]), kind, "none"), preprocessing, {})
    made = SyntheticSet(space, ipc, "hard", task)
    made.parameterisation.start(init, Split(pixels, labels, preprocessing), ipc, generator())
    return made


@pytest.mark.parametrize("kind", ["standardise", "zca"])
@pytest.mark.parametrize("init", ["real", "noise"])
@pytest.mark.parametrize("options", [{}, {"levels": 1}, {"levels": 3}, {"decorrelate": False}])
def test_a_start_renders_what_pixels_start_with(options, init, kind):
    pixels = photographs()
    expected = made_of(Pixels(), pixels, kind, init=init).images
    found = made_of(Pyramid(**options), pixels, kind, init=init).images
    torch.testing.assert_close(found, expected, atol=2e-3 if kind == "zca" else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (1, 3)])
def test_levels_halve_down_to_one_pixel_and_any_image_can_be_said(shape):
    images = torch.randn(6, 3, *shape, generator=generator(1))
    made = made_of(Pyramid(decorrelate=False), torch.rand(6, 3, *shape, generator=generator(2))).parameterisation
    sizes = [tuple(level.shape[2:]) for level in made.levels]
    assert (sizes[0], sizes[-1]) == ((1, 1), shape)
    assert all(tuple(-(-side // 2) for side in fine) == coarse for coarse, fine in pairwise(sizes))
    made.encode(images)
    torch.testing.assert_close(made.render(), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.levels[0][:, :, 0, 0], images.mean((2, 3)))


def test_the_image_is_the_sum_of_the_enlarged_levels_in_its_colours():
    made = made_of(Pyramid(levels=3), photographs()).parameterisation
    with torch.no_grad():
        for place, level in enumerate(made.levels):
            level.copy_(torch.randn(level.shape, generator=generator(place)))
    total = sum(F.interpolate(level, (8, 8), mode="bilinear") for level in made.levels)
    torch.testing.assert_close(made.render(), torch.einsum("nchw,cd->ndhw", total, made.colours))
    assert not torch.allclose(made.colours, torch.eye(3), atol=0.1)


def test_colours_of_the_training_images_are_uncorrelated_and_of_variance_one_in_the_basis():
    pixels = photographs(200)
    preprocessing = fit_preprocessing("standardise", pixels)
    made = made_of(Pyramid(), pixels).parameterisation
    colours = preprocessing(pixels).transpose(0, 1).flatten(1)
    basis = torch.linalg.inv(made.colours) @ colours
    torch.testing.assert_close(torch.cov(basis), torch.eye(3), atol=0.05, rtol=0.05)
    grey = made_of(Pyramid(), photographs()[:, :1].repeat(1, 3, 1, 1)).parameterisation  # all of one colour
    assert torch.linalg.cond(grey.colours) < 100


@pytest.mark.parametrize(("step", "constant", "checkered"), [("sgd", 1.0, 0.25), ("adam", 4.0, 1.0)])
def test_a_step_moves_coarse_structure_more_than_detail_and_no_more_than_a_method_can_bear(step, constant, checkered):
    made = made_of(Pyramid(decorrelate=False), photographs()).parameterisation  # four levels
    board = torch.ones(8, 8)
    board[::2, ::2] = board[1::2, 1::2] = -1
    for pattern, expected in ((torch.ones(8, 8), constant), (board, checkered)):
        before, made.level0.grad = made.render().detach(), None
        gradients = torch.autograd.grad((made.render() * pattern).sum(), made.levels)
        moved = [0.01 * (gradient.sign() if step == "adam" else gradient) for gradient in gradients]
        if step == "adam" and pattern is board:  # which the coarser levels do not see
            moved = [
                torch.where(gradient.abs() < 1e-6, 0, part) for gradient, part in zip(gradients, moved, strict=True)
            ]
        with torch.no_grad():
            for level, part in zip(made.levels, moved, strict=True):
                level.add_(part)
        change = ((made.render() - before) * pattern).mean() / 0.01
        assert float(change) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_clipping_reaches_the_pixels(kind):
    pixels = photographs()
    made, preprocessing = made_of(Pyramid(), pixels, kind).parameterisation, fit_preprocessing(kind, pixels)
    with torch.no_grad():
        made.level1.mul_(30)
    expected = preprocessing.inverse(made.render().detach()).clamp(0, 1)
    made.clip(preprocessing)
    torch.testing.assert_close(preprocessing.inverse(made.render().detach()), expected, atol=1e-3, rtol=1e-3)


def test_impossible_numbers_of_levels_are_refused():
    with pytest.raises(UserError, match="pyramid: levels must be at least 1, got 0"):
        Pyramid(0)
    with pytest.raises(UserError, match="pyramid: levels must be at most 4 for images of 8x8, got 5"):
        made_of(Pyramid(5), photographs())


def test_streamed_pixels_of_one_channel_have_a_basis_too():
    made = made_of(Pyramid(), torch.rand(12, 1, 4, 4, generator=generator(1))).parameterisation
    assert made.colours.shape == (1, 1)
    plain = split_of(torch.randn(9, 1, 4, 4, generator=generator(2)), torch.arange(9) % 3)  # normalised already
    made.start("real", plain, 2, generator())


class Colour(TinyData):
    channels = 3


def test_the_file_holds_plain_images_and_a_checkpoint_its_basis(tmp_path):
    settings = {"architecture": "convnet:width=4,depth=2", "real_per_class": 6, "probe": Probe(steps=2), "lr": 0.1}
    model = DM(parameterisation=Pyramid(levels=2), **settings)
    trainer = tiny_trainer(tmp_path, 3)
    trainer.fit(model, Colour())
    distilled = model.distilled_set()
    assert distilled.stored is None
    loaded = DistilledSet.load(distilled.save(tmp_path / "set.safetensors"))
    assert torch.equal(loaded.images, model.synthetic.images.detach())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(distilled_from_checkpoint(tmp_path / "last.ckpt").images, distilled.images)
    start = DM(parameterisation=Pyramid(levels=2), **settings)
    tiny_trainer(tmp_path, 0).fit(start, Colour())
    assert all(
        not torch.equal(*pair)
        for pair in zip(*(m.synthetic.parameterisation.levels for m in (model, start)), strict=True)
    )
