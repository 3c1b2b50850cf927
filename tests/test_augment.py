"""Augmentation: each operation against what it says, differentiable, and repeatable."""

import pytest
import torch

from lightning_dd.augment.frepo import OPERATIONS, Augmentation, apply
from lightning_dd.augment.siamese import siamese
from lightning_dd.utils.arguments import nothing_imported
from lightning_dd.utils.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=64, channels=3, side=16):
    return torch.randn(n, channels, side, side, generator=generator(7))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_shape_vary_by_sample_and_pass_gradients(name):
    images = batch(1).repeat(64, 1, 1, 1).requires_grad_()
    result = OPERATIONS[name](images, generator())
    assert result.shape == images.shape
    assert torch.isfinite(result).all()
    assert not torch.allclose(result[0], result[1:].mean(0))
    assert len({round(float(image.detach().sum()), 3) for image in result}) > 1 or name == "flip"
    result.square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_flip_mirrors_about_half():
    images = batch(400)
    flipped = (OPERATIONS["flip"](images, generator()) == images.flip(-1)).flatten(1).all(1)
    kept = (OPERATIONS["flip"](images, generator()) == images).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 150 < int(flipped.sum()) < 250


def test_cutout_fills_a_hole_of_a_quarter_side_with_zero():
    holes = (OPERATIONS["cutout"](torch.ones(500, 1, 16, 16), generator()) == 0).sum((1, 2, 3))
    assert holes.max() <= 5 * 5
    assert holes.median() >= 12
    assert holes.min() >= 1


def test_translate_moves_by_at_most_an_eighth():
    images = torch.zeros(200, 1, 16, 16)
    images[:, :, 8, 8] = 1
    moved = OPERATIONS["translate"](images, generator())
    rows = torch.arange(16.0)
    centre = (moved.sum((1, 3)) * rows).sum(1) / moved.sum((1, 2, 3))
    assert (centre - 8).abs().max() <= 2 + 1e-3
    assert (centre - 8).abs().max() > 1.5


def test_rotation_keeps_the_mass_of_a_disc_and_crop_scales_it():
    grid = torch.linspace(-1, 1, 32)
    disc = ((grid[:, None] ** 2 + grid**2) < 0.25).float().expand(100, 1, 32, 32)
    mass = disc[0].sum()
    rotated = OPERATIONS["rotate"](disc, generator()).sum((1, 2, 3))
    torch.testing.assert_close(rotated, mass.expand(100), rtol=0.03, atol=0)
    zoomed = OPERATIONS["crop"](disc, generator()).sum((1, 2, 3)) / mass
    assert 0.55 < zoomed.min() < 0.75  # 0.8 squared
    assert 1.4 < zoomed.max() < 1.65  # 1.25 squared


def test_colour_without_change_of_saturation_for_one_channel():
    images = batch(8, channels=1)
    shifted = OPERATIONS["color"](images, generator())
    spread = shifted.std((1, 2, 3)) / images.std((1, 2, 3))
    assert spread.log().abs().max() <= 0.25 + 1e-4
    assert (shifted.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs().max() <= 0.25 + 1e-4


def test_one_operation_per_batch_and_the_same_draw_repeats():
    augment = Augmentation("auto")
    draw = augment.draw(generator(3))
    images = batch()
    assert torch.equal(apply(images, draw), apply(images, draw))
    assert torch.equal(augment(images, generator(5)), augment(images, generator(5)))
    drawn = {augment.draw(source).operation for source in [generator()] for _ in range(200)}
    assert drawn == set(OPERATIONS.values())


def test_no_strategy_leaves_images_alone_and_unknown_names_are_refused():
    images = batch()
    assert Augmentation("none")(images, generator()) is images
    with pytest.raises(UserError, match="unknown augmentation 'blur'"):
        Augmentation("flip_blur")


def darken(images, generator):
    return images - torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)


NO_OPERATION = 3


def test_an_operation_of_ones_own_is_given_by_its_path():
    assert len(Augmentation("flip_crop+test_augment.darken").operations) == 3
    augment, images = Augmentation("test_augment.darken"), torch.zeros(8, 1, 4, 4, requires_grad=True)
    drawn = augment(images, generator())
    assert len(drawn[:, 0, 0, 0].unique()) == 8
    drawn.sum().backward()
    assert (images.grad == 1).all()


def test_in_siamese_use_ones_own_operation_treats_all_images_alike():
    draw = siamese("test_augment.darken").draw(generator())
    real, synthetic = apply(torch.zeros(8, 1, 4, 4), draw), apply(torch.zeros(2, 1, 4, 4), draw)
    assert len(real.unique()) == 1
    assert torch.equal(real[:2], synthetic)
    own = siamese("test_augment.darken", shared=False)(torch.zeros(8, 1, 4, 4), generator())
    assert len(own.unique()) == 8


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            "test_augment.lighten",
            "augmentation 'test_augment.lighten' cannot be imported: module",
        ),
        ("flip+no_package.blur", r"augmentation 'no_package.blur' cannot be imported: No module named 'no_package'"),
        ("test_augment.NO_OPERATION", "must be a function of images"),
        ("flip+", "unknown augmentation ''"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(strategy, message):
    with pytest.raises(UserError, match=message) as caught:
        Augmentation(strategy)
    assert "\n" not in str(caught.value)


def test_for_a_file_nothing_is_imported():
    with nothing_imported():
        assert Augmentation("test_augment.darken").operations  # has been imported
        with pytest.raises(UserError, match="nothing is imported for a file"):
            Augmentation("antigravity.geohash")


def test_digits_are_not_mirrored():
    assert Augmentation("auto").strategy == "flip_color_crop_rotate_translate_cutout"
    assert Augmentation("auto", mirror=False).strategy == "color_crop_rotate_translate_cutout"
    own = Augmentation("auto+test_augment.darken", mirror=False)
    assert own.strategy == "color_crop_rotate_translate_cutout+test_augment.darken"
    assert own.operations[-1] is darken
    for nothing in ("", "none"):
        assert Augmentation(nothing).strategy == nothing
