"""Augmentation: each operation against what it says, differentiable, and repeatable."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as vision

from lightning_dd.augment.crops import draw_crops
from lightning_dd.augment.crops import resample as resample_crops
from lightning_dd.augment.frepo import OPERATIONS, Augmentation, apply
from lightning_dd.augment.siamese import digits, siamese
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


def test_cutout_fills_a_whole_square_of_a_quarter_side_with_zero():
    holes = OPERATIONS["cutout"](torch.ones(500, 1, 16, 16), generator())[:, 0] == 0
    assert (holes.sum((1, 2)) == 4 * 4).all()
    tops = holes.any(2).float().argmax(1)
    assert set(tops.tolist()) == set(range(13))


@pytest.mark.parametrize("name", ["crop", "rotate", "translate"])
def test_what_comes_into_view_repeats_the_edge(name):
    torch.testing.assert_close(OPERATIONS[name](torch.ones(64, 1, 16, 16), generator()), torch.ones(64, 1, 16, 16))


def test_crop_zooms_log_uniformly_at_a_random_place():
    ramp = torch.arange(32.0).expand(2000, 1, 32, 32)
    middle = OPERATIONS["crop"](ramp, generator())[:, 0, 16, 15:17]
    window, shift = middle[:, 1] - middle[:, 0], middle.mean(1) - 15.5
    assert float(window.log().median()) == pytest.approx(0, abs=0.02)
    assert (float(window.min()), float(window.max())) == pytest.approx((0.8, 1.25), abs=0.002)
    furthest = 16 * (1 - window).abs()  # 4 pixels at most
    assert (shift.abs() <= furthest + 1e-3).all()
    assert float((shift / furthest)[furthest > 0.1].std()) == pytest.approx(3**-0.5, abs=0.02)


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


@pytest.mark.parametrize("side", [32, 96])
def test_random_resized_crops_are_drawn_as_torchvision_draws_them(side):
    boxes = draw_crops(4000, (side, side), 0.08, generator()) * side
    torch.testing.assert_close(boxes, boxes.round())  # whole pixels
    image = torch.zeros(1, side, side)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = torch.tensor(drawn).float()[:, [1, 0, 3, 2]]
    for ours, other in zip(
        (boxes.mean(0), (boxes[:, 2] / boxes[:, 3]).log().std(), areas(boxes).quantile(places)),
        (theirs.mean(0), (theirs[:, 2] / theirs[:, 3]).log().std(), areas(theirs).quantile(places)),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, rtol=0.05, atol=0.02 * side)
    assert float((areas(boxes) > 0.9 * side**2).float().mean()) < 0.05


places = torch.tensor([0.1, 0.5, 0.9, 0.97])


def areas(boxes):
    return boxes[:, 2] * boxes[:, 3]


def test_a_box_that_never_fits_becomes_the_largest_one_about_the_centre():
    assert draw_crops(1, (12, 32), 1.0, generator()).tolist() == [[0.25, 0.0, 0.5, 1.0]]


def test_crops_are_brought_back_to_size_as_torchvision_does():
    images = torch.randn(30, 3, 28, 20, generator=generator())
    boxes, flips = draw_crops(30, (28, 20), 0.08, generator()), torch.arange(30) % 2 == 0
    for image, (left, top, width, height), flipped, ours in zip(
        images,
        (boxes * torch.tensor([20, 28, 20, 28])).round().int().tolist(),
        flips,
        resample_crops(images, boxes, flips),
        strict=True,
    ):
        theirs = vision.resized_crop(image, top, left, height, width, [28, 20], antialias=True)
        torch.testing.assert_close(ours, theirs.flip(-1) if flipped else theirs, rtol=1e-4, atol=1e-4)


def test_digits_are_shifted_resized_or_turned_each_by_itself():
    bar = torch.zeros(600, 1, 28, 28)
    bar[:, :, 6:22, 12:16] = 1
    changed = digits(bar, generator())[:, 0]
    mean = bar.mean()
    corner = changed[:, 0, 0]
    on_zeros, on_the_mean = ((corner - ground).abs() < 1e-4 for ground in (torch.zeros(()), mean))
    whole = ((changed - 1).abs() < 1e-4).sum((1, 2)) == 16 * 4
    shifted = (changed[:, :, 13] - changed[:, :, 14]).abs().sum(1) < 1e-4  # a shift keeps the bar upright
    assert 120 < int(on_the_mean.sum()) < 480  # shifted down and to the right, or turned
    assert min(int(whole.sum()), int((on_zeros & ~whole).sum())) > 120
    rows = (changed > 0.5).any(2).float()
    tops = rows.argmax(1)[whole & shifted]
    assert set(tops.tolist()) == set(range(6 - 3, 6 + 4 + 1))
    heights = rows.sum(1)[on_zeros & ~whole]
    assert (float(heights.min()), float(heights.max())) == pytest.approx((13, 19), abs=1)
    turned = changed[on_the_mean & ~whole]
    assert float(turned[:, 13:15, 13:15].min()) > 0.9  # about the centre
