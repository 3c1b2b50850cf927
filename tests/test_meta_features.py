"""What maps have in common, by brute force and by hand."""

import itertools

import pytest
import torch

from lightning_dd.losses.meta_features import (
    Partition,
    focus_weights,
    map_centres,
    map_entropy,
    map_variance,
    meta_partition,
    positivity,
    shared_map,
)


def random_maps(count=3, rows=4, side=5, seed=0):
    return torch.rand(count, rows, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_partition_by_brute_force():
    maps = random_maps()
    alive = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]]).bool()
    maps = maps * alive[:, :, None, None]
    for threshold, mask in itertools.product((0.3, 0.5, 0.7), (None, alive)):
        part = meta_partition(maps, threshold, mask)
        for n in range(4):
            live = [m for m in range(3) if mask is None or mask[m, n]]
            both, any_high = 0, 0
            for i, j in itertools.product(range(5), range(5)):
                high = [bool(maps[m, n, i, j] >= threshold) for m in range(3)]
                meta = len(live) >= 2 and all(high[m] for m in live)
                assert part.meta[n, i, j] == meta
                for m in range(3):
                    assert part.heterogeneous[m, n, i, j] == (high[m] and m in live and not meta)
                both, any_high = both + meta, any_high + any(high[m] for m in live)
            assert part.ratio[n] == pytest.approx(both / any_high if any_high else 0.0)


def test_variance_by_brute_force_and_its_closed_derivative():
    maps = random_maps().requires_grad_()
    alive = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]]).bool()
    expected, slope = 0.0, torch.zeros_like(maps)
    for n in range(4):
        live = alive[:, n].nonzero()[:, 0]
        if len(live) >= 2:
            values = maps.detach()[live, n]
            expected += values.var(0, correction=0).mean() / 4
            slope[live, n] = 2 / len(live) * (values - values.mean(0)) / (4 * 25)
    variance = map_variance(maps, alive)
    torch.testing.assert_close(variance, torch.as_tensor(expected))
    torch.testing.assert_close(torch.autograd.grad(variance, maps)[0], slope)
    assert map_variance(maps, torch.zeros(3, 4, dtype=torch.bool)) == 0


@pytest.mark.parametrize("form", ["meta", "heterogeneous"])
def test_positivity_rewards_high_maps_inside_the_mask_only(form):
    maps, meta = random_maps().requires_grad_(), random_maps(1, seed=1)[0] > 0.6
    meta[2] = False
    alive = torch.ones(3, 4, dtype=torch.bool)
    alive[1, 0] = False
    expected = [(1 - maps[alive[:, n], n][:, meta[n]]).mean() if meta[n].any() else torch.tensor(0.0) for n in range(4)]
    none = torch.zeros_like(meta)
    part = Partition(meta, torch.stack([none] * 3), none) if form == "meta" else Partition(none, meta[None], none)
    found = positivity(maps, part, alive, form)
    torch.testing.assert_close(found, torch.stack([e.double() for e in expected]).mean())
    slope = torch.autograd.grad(found, maps)[0]
    assert (slope[:, ~meta] == 0).all()
    assert (slope[0][meta] < 0).all()


def test_position_is_how_far_apart_the_centres_of_mass_are():
    corners = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    corners[0, 0, 0, 0] = corners[1, 0, 4, 0] = 0.7  # one below the other, a whole side apart
    assert map_centres(corners).squeeze().tolist() == [[0, 0], [1, 0]]
    alive = torch.ones(2, 1, dtype=torch.bool)
    part = meta_partition(corners, alive=alive)
    assert positivity(corners, part, alive, "position") == pytest.approx(
        0.25 / 2
    )  # of (0.25, 0), the mean of both ways
    maps = random_maps(2, rows=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: positivity(maps, part, alive, "position"), maps)
    dead = torch.cat([corners, torch.zeros(1, 1, 5, 5)])
    alive = torch.tensor([[True], [True], [False]])
    assert positivity(dead, part, alive, "position") == pytest.approx(0.25 / 2)


def test_map_entropy_is_one_for_flat_maps_and_zero_for_a_point():
    point = torch.zeros(1, 4, 4)
    point[0, 1, 2] = 0.3
    assert map_entropy(torch.full((1, 4, 4), 0.2)) == pytest.approx(1)
    assert map_entropy(point) == 0
    assert map_entropy(torch.cat([point, torch.zeros(2, 4, 4), torch.ones(1, 4, 4)])) == pytest.approx(0.5)
    assert map_entropy(torch.zeros(2, 4, 4)) == 0


def test_the_shared_map_is_the_meta_partition_without_its_threshold():
    maps = random_maps()
    alive = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).bool()
    shared = shared_map(maps * alive[:, :, None, None], alive)
    for threshold in (0.2, 0.5, 0.7):
        meta = meta_partition(maps, threshold, alive).meta
        assert torch.equal(shared[:3] >= threshold, meta[:3])
    assert (shared[3] == 1).all()  # nobody says anything of it


def test_focus_moves_a_gradient_to_the_shared_map_and_keeps_each_images_norm():
    gradient = torch.randn(3, 2, 10, 10, generator=torch.Generator().manual_seed(0)).double()
    shared = random_maps(1)[0][:3]
    shared[2] = 0
    assert (focus_weights(gradient, shared, 0.0) == 1).all()
    for focus in (0.4, 1.0):
        focused = gradient * focus_weights(gradient, shared, focus)
        torch.testing.assert_close(focused.flatten(1).norm(dim=1), gradient.flatten(1).norm(dim=1))
        ratio = (focused / gradient)[0, 0]
        inside = 1 - focus + focus * torch.nn.functional.interpolate(shared[None, :1], (10, 10), mode="bilinear")[0, 0]
        torch.testing.assert_close(ratio / ratio.max(), inside / inside.max())
    assert torch.equal(focused[2], gradient[2])  # nothing is shared: the gradient is left as it is
