"""The synthetic set: order, labels, initialisation."""

import pytest
import torch
from helpers import split_of

from lightning_dd.data.images import DataFacts, Patches, Split
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.data.sampling import draw_per_class
from lightning_dd.distillers import FRePo, Random
from lightning_dd.losses.krr import initial_labels
from lightning_dd.pretrained.task import Task
from lightning_dd.synthetic import Pixels, SyntheticSet
from lightning_dd.utils.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def synthetic_set(ipc, num_classes, shape, kind="learned"):
    facts = DataFacts("toy", tuple(map(str, range(num_classes))), shape, "standardise", "none")
    task = Task(facts, Preprocessing([0.0] * shape[0], [1.0] * shape[0]), {})
    return SyntheticSet(Pixels(), ipc, kind, task)


def test_labels_are_centred_and_scaled_by_the_number_of_classes():
    for classes in (10, 100):
        labels = initial_labels(torch.arange(classes), classes, "learned")
        torch.testing.assert_close(labels.sum(1), torch.zeros(classes), atol=1e-5, rtol=0)
        scale = (classes / 10) ** 0.5
        torch.testing.assert_close(labels[3, 3], torch.tensor((1 - 1 / classes) / scale))
    torch.testing.assert_close(initial_labels(torch.arange(3), 3, "hard"), torch.eye(3))


@pytest.mark.parametrize(("kind", "learned"), [("learned", True), ("centred", False), ("hard", False)])
def test_only_learned_labels_are_parameters(kind, learned):
    names = dict(synthetic_set(2, 3, (1, 4, 4), kind).named_parameters())
    assert ("labels" in names) == learned
    assert "parameterisation.images" in names


def test_real_initialisation_takes_distinct_rows_of_the_right_class_in_blocks():
    labels = torch.randint(0, 3, (60,), generator=generator(1))
    images = torch.arange(60.0).view(60, 1, 1, 1)
    synthetic = synthetic_set(4, 3, (1, 1, 1))
    synthetic.parameterisation.start("real", split_of(images, labels), 4, generator())
    rows = synthetic.images.detach().flatten().long()
    assert torch.equal(labels[rows], synthetic.classes)
    assert synthetic.classes.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(rows.unique()) == 12
    other = synthetic_set(4, 3, (1, 1, 1))
    other.parameterisation.start("real", split_of(images, labels), 4, generator(2))
    assert not torch.equal(other.images, synthetic.images)


def test_patches_are_square_crops_of_pixels_brought_to_full_size_and_normalised_afterwards():
    side, labels = 16, torch.arange(2).repeat(20)
    ramp = (torch.arange(side) + 0.5) / side
    pixels = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])
    split = Split(pixels.repeat(40, 1, 1, 1), labels, Preprocessing([0.5] * 3, [0.5] * 3), keep_normalised=True)
    synthetic = synthetic_set(15, 2, (3, side, side))
    synthetic.parameterisation.start("real", Patches(split, generator()), 15, generator())
    across, down, other = (0.5 * synthetic.images.detach() + 0.5).unbind(1)
    torch.testing.assert_close(other, torch.zeros_like(other))
    torch.testing.assert_close(across, across[:, :1].expand_as(across))
    widths, heights = across[:, 0, -2] - across[:, 0, 1], down[:, -2, 0] - down[:, 1, 0]
    torch.testing.assert_close(widths, heights)
    shares = widths * side / (side - 3)
    assert 0.45 < float(shares.min()) < 0.65 < 0.85 < float(shares.max()) <= 1.01
    assert len(across[:, 0, 0].unique()) > 5  # from different places


def test_noise_is_standard_normal_and_repeatable():
    first, second = synthetic_set(5, 10, (1, 16, 16)), synthetic_set(5, 10, (1, 16, 16))
    first.parameterisation.start("noise", None, 5, generator())
    second.parameterisation.start("noise", None, 5, generator())
    assert torch.equal(first.images, second.images)
    assert abs(float(first.images.detach().std()) - 1) < 0.05


def test_every_draw_per_class_is_possible():
    labels = torch.tensor([0, 1, 0, 1, 1])
    drawn = {tuple(draw_per_class(labels, 1, 2, generator(seed)).tolist()) for seed in range(200)}
    assert drawn == {(a, b) for a in (0, 2) for b in (1, 3, 4)}


def test_bad_settings_name_the_setting_and_the_limit():
    with pytest.raises(UserError, match=r"ipc \(images per class\) must be at least 1, got 0"):
        Random(ipc=0, labels="hard")
    with pytest.raises(UserError, match="labels of FRePo must be one of learned, centred, hard, soft, got 'smooth'"):
        FRePo(labels="smooth")
    with pytest.raises(UserError, match="largest possible ipc is 2"):
        draw_per_class(torch.tensor([0, 1, 0, 1, 1]), 3, 2, generator())
