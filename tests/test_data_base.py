"""The base data module, preprocessing and index streams."""

import numpy as np
import pytest
import torch
from helpers import other_shapes, split_of
from torch import Tensor

from lightning_dd.data import DataFacts, Preprocessing, RawSplit, RealData
from lightning_dd.data.preprocess import block_stride, fit_preprocessing, from_blocks, to_blocks, to_unit
from lightning_dd.data.sampling import EvalBatches, ShuffledStream, StepCounter, pass_through
from lightning_dd.distilled import DistilledSet
from lightning_dd.utils.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))


def smooth_pixels(count: int, channels: int = 3, side: int = 4, seed: int = 0) -> Tensor:
    """Correlated uint8 images, so that whitening has something to do."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, channels, side // 2, side // 2, generator=generator)
    images = torch.nn.functional.interpolate(low, size=side, mode="bilinear")
    noise = 0.1 * torch.rand(images.shape, generator=generator)
    return ((images * 0.8 + noise).clamp(0, 1) * 255).to(torch.uint8)


class Toy(RealData):
    """Splits given by a test; every image is different."""

    def __init__(self, train: RawSplit | None = None, test: RawSplit | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        names = ("a", "b", "c")
        self.splits = {
            True: train or RawSplit(smooth_pixels(60), torch.arange(60) % 3, names),
            False: test or RawSplit(smooth_pixels(12, seed=1), torch.arange(12) % 3, names),
        }
        self.reads: list[bool] = []

    def read(self, *, train: bool) -> RawSplit:
        self.reads.append(train)
        return self.splits[train]


def raw(images: Tensor, labels: list[int], names: tuple[str, ...] = ("a", "b")) -> RawSplit:
    return RawSplit(images, torch.tensor(labels, dtype=torch.int64), names)


# --- RealData --------------------------------------------------------------------------------------------------


def test_the_validation_split_is_stratified_disjoint_and_fixed():
    data = Toy(val_fraction=0.2)
    data.setup("fit")
    assert data.train.labels.bincount().tolist() == [16] * 3
    assert data.val.labels.bincount().tolist() == [4] * 3
    pixels = to_unit(data.splits[True].images)
    everything = torch.cat([data.train.everything().images, data.val.everything().images])
    back = data.preprocessing.inverse(everything)
    matches = torch.cdist(back.flatten(1), pixels.flatten(1)).argmin(1)
    assert sorted(matches.tolist()) == list(range(60))  # each image in exactly one part
    torch.manual_seed(123)
    again = Toy(val_fraction=0.2)
    again.setup("fit")
    assert torch.equal(again.val.everything().images, data.val.everything().images)
    other = Toy(val_fraction=0.2, split_seed=1)
    other.setup("fit")
    assert not torch.equal(other.val.everything().images, data.val.everything().images)
    assert other.facts.fingerprint != data.facts.fingerprint == again.facts.fingerprint


def test_a_fingerprint_is_of_the_training_rows_and_their_labels():
    names, pixels, labels = ("a", "b", "c"), smooth_pixels(60), torch.arange(60) % 3

    def fingerprint(images, classes, val_fraction=0.2):
        data = Toy(RawSplit(images, classes, names), val_fraction=val_fraction)
        data.setup("fit")
        return data.facts.fingerprint, data

    first, data = fingerprint(pixels, labels)
    trained = torch.cdist(
        data.preprocessing.inverse(data.train.everything().images).flatten(1), to_unit(pixels).flatten(1)
    ).argmin(1)
    held_out = torch.tensor(sorted(set(range(60)) - set(trained.tolist())))
    assert fingerprint(pixels, labels)[0] == first
    assert fingerprint(pixels, (labels + 1) % 3, 0)[0] != fingerprint(pixels, labels, 0)[0]  # of the same rows
    for rows, same in ((held_out, True), (trained[-3:], False)):
        changed = pixels.clone()
        changed[rows] = 255 - changed[rows]
        assert (fingerprint(changed, labels)[0] == first) == same


def test_no_validation_split_means_all_of_train_in_order():
    data = Toy(val_fraction=0)
    data.setup("fit")
    assert data.val is None
    assert data.val_dataloader() == []
    assert torch.equal(data.train.labels, data.splits[True].labels)


def test_the_test_split_is_read_only_when_it_is_tested():
    data = Toy()
    data.setup("fit")
    data.setup("validate")
    assert data.reads == [True]
    assert data.test is None
    data.setup("test")
    data.setup("test")
    assert data.reads == [True, False]
    images = torch.cat([images for images, _ in data.test_dataloader()])
    assert torch.equal(images, data.test.everything().images)
    assert images.dtype == torch.float32


def test_statistics_are_those_of_the_training_part_alone():
    data = Toy(val_fraction=0.2)
    data.setup()
    assert torch.allclose(data.train.everything().images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(data.train.everything().images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    expected = (to_unit(data.splits[False].images) - data.preprocessing.mean.view(1, 3, 1, 1)) / (
        data.preprocessing.std.view(1, 3, 1, 1)
    )
    assert torch.allclose(data.test.everything().images, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_a_preprocessing_from_outside_is_applied_to_all_splits(kind):
    theirs = fit_preprocessing(kind, smooth_pixels(80, seed=5))
    data = Toy(preprocessing="zca" if kind == "standardise" else "standardise")
    data.use_preprocessing(theirs)
    data.setup()
    assert data.preprocessing is theirs
    assert data.facts.preprocessing == data.spec()["preprocessing"] == kind
    assert torch.equal(data.test.everything().images, theirs(to_unit(data.splits[False].images)))
    assert torch.allclose(
        theirs.inverse(data.val.everything().images).clamp(0, 1),
        theirs.inverse(data.val.everything().images),
        atol=1e-3,
    )


def test_zca_is_fitted_on_train_and_applied_to_test():
    data = Toy(preprocessing="zca", val_fraction=0)
    data.setup()
    train = to_unit(data.splits[True].images)
    fitted = fit_preprocessing("zca", train)
    assert torch.allclose(data.test.everything().images, fitted(to_unit(data.splits[False].images)), atol=1e-5)


def test_facts_survive_a_round_trip():
    data = Toy()
    with pytest.raises(RuntimeError, match="setup"):
        _ = data.facts
    data.setup("fit")
    facts = data.facts
    assert facts.num_classes == 3
    assert facts.image_shape == (3, 4, 4)
    assert facts.name == "Toy"
    values = facts.to_dict()
    assert values["image_shape"] == [3, 4, 4]  # plain values, as JSON has them
    assert DataFacts.from_dict(values) == facts
    assert hash(DataFacts.from_dict(values)) == hash(facts)


def test_the_train_loader_counts_steps():
    assert len(Toy().train_dataloader()) == 1000


BAD_ARGUMENTS = [
    ({"preprocessing": "whiten"}, "data.preprocessing must be one of standardise, zca, kornia-zca, got 'whiten'"),
    ({"val_fraction": 1.0}, r"data.val_fraction must be in \[0, 1\), got 1.0"),
    ({"val_fraction": -0.1}, r"data.val_fraction must be in \[0, 1\)"),
    ({"val_fraction": float("nan")}, r"data.val_fraction must be in \[0, 1\)"),
    ({"eval_batch_size": 0}, "data.eval_batch_size must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Toy(**arguments)


FOUR = smooth_pixels(4)
NOT_A_NUMBER = torch.where(torch.arange(4).view(4, 1, 1, 1) == 2, torch.nan, to_unit(FOUR))
BAD_SPLITS = [
    (raw(FOUR, [0, 0, 0, 0]), "Toy .train split.: class 'b' has no images"),
    (raw(FOUR, [0, 1, 2, 0]), r"labels must be in \[0, 2\), found 0..2"),
    (raw(FOUR, [0, 1, -1, 0]), r"labels must be in \[0, 2\), found -1..1"),
    (raw(NOT_A_NUMBER, [0, 1, 0, 1]), "NaN or infinite"),
    (raw(to_unit(FOUR) / 0, [0, 1, 0, 1]), "NaN or infinite"),
    (raw(FOUR, [0, 1]), r"expected images \(N, C, H, W\)"),
    (raw(FOUR[0], [0, 1, 0]), r"expected images \(N, C, H, W\)"),
    (raw(FOUR[:0], []), "N > 0"),
]


@pytest.mark.parametrize(("split", "message"), BAD_SPLITS)
def test_bad_training_data(split, message):
    with pytest.raises(UserError, match=message) as error:
        Toy(train=split, val_fraction=0).setup("fit")
    assert "\n" not in str(error.value)


def test_bad_test_data():
    bad = raw(FOUR, [0, 1, 2, 3], ("a", "b", "c"))
    data = Toy(test=bad)
    data.setup("fit")
    with pytest.raises(UserError, match=r"Toy \(test split\): labels must be in \[0, 3\)"):
        data.setup("test")
    few = raw(FOUR, [0, 0, 1, 1], ("a", "b", "c"))
    with pytest.raises(UserError, match=r"Toy \(test split\): class 'c' has no images; every class needs at least one"):
        Toy(test=few).setup("test")


@pytest.mark.parametrize("fraction", [0.5, 0.01])
def test_a_validation_split_that_cannot_be_cut(fraction):
    split = raw(FOUR, [0, 0, 0, 1])
    with pytest.raises(UserError, match=f"data.val_fraction={fraction} cannot be cut from Toy") as error:
        Toy(train=split, val_fraction=fraction).setup("fit")
    assert "\n" not in str(error.value)


# --- preprocessing ---------------------------------------------------------------------------------------------


def fit_zca(images: Tensor, ridge: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, whitening and un-whitening matrices of images that are standardised already."""
    fitted = fit_preprocessing("zca", images, [0.0] * 3, [1.0] * 3, zca_ridge=ridge)
    return fitted.zca_mean, fitted.zca_whiten, fitted.zca_unwhiten


def reference_zca(rows: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The published formula, by another road: numpy float64 and an SVD of the regularised covariance."""
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    dims = covariance.shape[0]
    left, singular, _ = np.linalg.svd(covariance + ridge * np.trace(covariance) / dims * np.eye(dims))
    if len(rows) < dims:
        singular = np.concatenate([singular[: len(rows)], np.ones(dims - len(rows))])
    return mean, left @ np.diag(singular**-0.5) @ left.T, left @ np.diag(singular**0.5) @ left.T


@pytest.mark.parametrize("ridge", [0.1, 0.5])
def test_zca_is_the_published_formula(ridge):
    images = Preprocessing([0.5] * 3, [0.25] * 3)(to_unit(smooth_pixels(500)))
    mean, whiten, unwhiten = fit_zca(images, ridge)
    rows = images.flatten(1).double().numpy()
    expected = reference_zca(rows, ridge)
    for ours, theirs in zip((mean, whiten, unwhiten), expected, strict=True):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-5)
    # the covariance after whitening is W Sigma W, which the ridge keeps below the identity
    whitened = (rows - expected[0]) @ whiten.double().numpy()
    covariance = whitened.T @ whitened / len(rows)
    sigma = (rows - expected[0]).T @ (rows - expected[0]) / len(rows)
    np.testing.assert_allclose(covariance, expected[1] @ sigma @ expected[1], atol=1e-4)
    assert np.linalg.eigvalsh(covariance).max() < 1


def test_without_a_ridge_the_whitened_covariance_is_the_identity():
    images = Preprocessing([0.5] * 3, [0.25] * 3)(to_unit(smooth_pixels(500)))
    mean, whiten, _ = fit_zca(images, ridge=0)
    whitened = (images.flatten(1) - mean).double() @ whiten.double()
    covariance = whitened.T @ whitened / len(images)
    assert torch.allclose(covariance, torch.eye(48, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("count", [400, 20])  # more and fewer images than the 48 dimensions
def test_zca_round_trip(count):
    pixels = smooth_pixels(count)
    fitted = fit_preprocessing("zca", pixels)
    assert fitted.kind == "zca"
    back = fitted.inverse(fitted(to_unit(pixels)))
    assert float((back - to_unit(pixels)).abs().max()) < 1e-3
    fresh = to_unit(smooth_pixels(50, seed=9))  # images the matrix was not fitted on
    assert float((fitted.inverse(fitted(fresh)) - fresh).abs().max()) < 1e-3


def test_the_ridge_is_relative_to_the_variance():
    """Scaling the images by k scales the whitening matrix by 1/k; an absolute ridge would not."""
    images = Preprocessing([0.5] * 3, [0.25] * 3)(to_unit(smooth_pixels(500)))
    _, whiten, _ = fit_zca(images)
    _, scaled, _ = fit_zca(images * 7)
    assert torch.allclose(scaled * 7, whiten, rtol=1e-4, atol=1e-5)


def test_directions_without_images_are_left_alone():
    """With N < d, eigenvalues beyond N become 1: the null space of the images passes unchanged."""
    images = Preprocessing([0.5] * 3, [0.25] * 3)(to_unit(smooth_pixels(20)))
    mean, whiten, unwhiten = fit_zca(images)
    expected = reference_zca(images.flatten(1).double().numpy(), 0.1)
    # The SVD is degenerate where all ridge-only eigenvalues are equal, so compare what does not depend on its basis.
    values = torch.linalg.eigvalsh(whiten.double())
    np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(expected[1]), atol=1e-4)
    assert int(((values - 1).abs() < 1e-4).sum()) == 48 - 20
    centred = (images.flatten(1) - mean).double()
    ours = centred @ whiten.double()
    np.testing.assert_allclose(ours.numpy(), centred.numpy() @ expected[1], atol=1e-4)
    assert torch.allclose(whiten @ unwhiten, torch.eye(48), atol=1e-4)


def test_standardisation_and_its_inverse():
    pixels = to_unit(smooth_pixels(10))
    published = fit_preprocessing("standardise", smooth_pixels(10), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert published.kind == "standardise"
    normalised = published(pixels)
    assert torch.allclose(normalised[:, 1], (pixels[:, 1] - 0.2) / 0.6)
    assert torch.allclose(published.inverse(normalised), pixels, atol=1e-6)
    beyond = published(torch.tensor([-0.5, 0.25, 1.5]).view(3, 1, 1, 1).expand(3, 3, 2, 2))
    clipped = published(torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2))
    assert torch.allclose(published.clipped(beyond), clipped, atol=1e-6)


def test_a_constant_channel_does_not_divide_by_zero():
    fitted = fit_preprocessing("standardise", torch.full((4, 1, 2, 2), 7, dtype=torch.uint8))
    assert bool(torch.isfinite(fitted(torch.full((4, 1, 2, 2), 7 / 255))).all())


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_preprocessing_survives_its_state_dict(kind):
    pixels = smooth_pixels(60)
    fitted = fit_preprocessing(kind, pixels)
    state = fitted.state_dict()
    assert set(state) == {"mean", "std"} | ({"zca_mean", "zca_whiten", "zca_unwhiten"} if kind == "zca" else set())
    again = Preprocessing.from_state_dict(state)
    assert again.kind == kind
    assert torch.equal(again(to_unit(pixels)), fitted(to_unit(pixels)))


def test_autocast_does_not_blunt_whitening():
    pixels = smooth_pixels(60)
    fitted = fit_preprocessing("zca", pixels)
    expected = fitted(to_unit(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fitted(to_unit(pixels)), expected)


def test_unknown_preprocessing():
    with pytest.raises(UserError, match="preprocessing must be one of standardise, zca, kornia-zca, got 'pca'"):
        fit_preprocessing("pca", smooth_pixels(4))


def test_to_unit():
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    floats = torch.tensor([0.25])
    assert to_unit(floats) is floats


@pytest.mark.parametrize("images", [smooth_pixels(50), to_unit(smooth_pixels(50))])
def test_measured_statistics_are_those_of_all_pixels(images):
    measured = fit_preprocessing("standardise", images)
    spread, centre = torch.std_mean(to_unit(images).double(), dim=(0, 2, 3), correction=0)
    assert torch.equal(measured.mean, centre.float())
    assert torch.equal(measured.std, spread.float())


def test_a_fit_does_not_depend_on_how_many_images_are_read_at_a_time(monkeypatch):
    pixels = smooth_pixels(100)
    expected = fit_preprocessing("zca", pixels)
    monkeypatch.setattr("lightning_dd.data.preprocess._FIT_NUMBERS", 7 * 48)
    in_parts = fit_preprocessing("zca", pixels)
    for name, value in expected.state_dict().items():
        assert torch.allclose(in_parts.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    as_floats = fit_preprocessing("standardise", to_unit(pixels))
    assert torch.allclose(as_floats.std, expected.std, rtol=1e-6)


# --- blocks ----------------------------------------------------------------------------------------------------


def slow_blocks(images: np.ndarray, stride: int) -> np.ndarray:
    """Sub-grids by explicit indices: ``(N, stride**2, C * h * w)``."""
    grids = [images[:, :, i::stride, j::stride] for i in range(stride) for j in range(stride)]
    return np.stack([grid.reshape(len(images), -1) for grid in grids], axis=1)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 12), (3, 6, 6)])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_are_strided_sub_grids(shape, stride):
    images = torch.rand(5, *shape, generator=generator())
    for given in (images, images.contiguous(memory_format=torch.channels_last), images.double()):
        blocks = to_blocks(given, stride)
        assert torch.equal(
            blocks.flatten(1).view(5, stride**2, -1), torch.from_numpy(slow_blocks(given.numpy(), stride))
        )
        assert torch.equal(from_blocks(blocks, stride), given)


@pytest.mark.parametrize(("count", "stride"), [(300, 2), (10, 2), (300, 4)])  # 10 images are fewer than 48 dimensions
def test_block_zca_is_the_published_formula(count, stride):
    """One matrix, from the mean of the blocks' covariances about the mean image, applied to every block."""
    pixels = smooth_pixels(count, side=8)
    fitted = fit_preprocessing("zca", pixels, [0.5] * 3, [0.25] * 3, zca_block=8 // stride)
    assert fitted.zca_stride == stride
    images = ((to_unit(pixels) - 0.5) / 0.25).double().numpy()
    mean = images.mean(0)
    blocks = slow_blocks(images - mean, stride)
    size = blocks.shape[-1]
    covariance = sum(blocks[:, place].T @ blocks[:, place] / count for place in range(stride**2)) / stride**2
    values, vectors = np.linalg.eigh(covariance + 0.1 * np.trace(covariance) / size * np.eye(size))
    if count < size:
        values[: size - count] = 1  # in ascending order here
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    np.testing.assert_allclose(fitted.zca_mean.numpy(), mean.reshape(-1), atol=1e-5)
    np.testing.assert_allclose(fitted.zca_whiten.numpy(), whiten, atol=2e-4)
    np.testing.assert_allclose(fitted.zca_unwhiten.numpy(), np.linalg.inv(whiten), atol=2e-4)
    expected = np.empty_like(images)
    for i in range(stride):
        for j in range(stride):
            part = blocks[:, i * stride + j] @ whiten
            expected[:, :, i::stride, j::stride] = part.reshape(count, 3, 8 // stride, 8 // stride)
    whitened = fitted(to_unit(pixels))
    np.testing.assert_allclose(whitened.numpy(), expected, atol=1e-3)
    assert torch.allclose(fitted.inverse(whitened), to_unit(pixels), atol=1e-4)
    turned = whitened.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(fitted.inverse(turned), to_unit(pixels), atol=1e-4)


def test_blocks_of_the_whole_image_are_no_blocks():
    pixels = smooth_pixels(80)
    whole, one_block = fit_preprocessing("zca", pixels), fit_preprocessing("zca", pixels, zca_block=4)
    assert torch.equal(whole.zca_whiten, one_block.zca_whiten)
    assert str(whole) == whole.kind == "zca"
    assert str(fit_preprocessing("zca", pixels, zca_block=2)) == "zca in 2x2 blocks"


def test_block_zca_survives_its_state_dict_and_a_move():
    pixels = smooth_pixels(80, side=8)
    fitted = fit_preprocessing("zca", pixels, zca_block=4)
    assert fitted.zca_mean.shape == (192,)
    assert fitted.zca_whiten.shape == (48, 48)
    for again in (Preprocessing.from_state_dict(fitted.state_dict()), fitted.to("cpu")):
        assert again.zca_stride == 2
        assert torch.equal(again(to_unit(pixels)), fitted(to_unit(pixels)))


@pytest.mark.parametrize(
    ("size", "block", "stride"),
    [
        ((32, 32), None, 1),
        ((64, 64), None, 1),
        ((65, 65), None, None),
        ((96, 96), None, 2),
        ((128, 128), None, 2),
        ((224, 224), None, 4),
        ((480, 640), None, 10),
        ((128, 64), None, 2),
        ((97, 97), None, None),
        ((64, 64), 32, 2),
        ((64, 64), 64, 1),
        ((64, 64), 48, None),
        ((64, 64), 128, None),
        ((64, 48), 4, 16),
        ((64, 40), 4, None),
    ],
)
def test_the_stride_of_the_blocks(size, block, stride):
    if stride is not None:
        assert block_stride(*size, block) == stride
        return
    with pytest.raises(UserError, match=r"data\.zca_block") as error:
        block_stride(*size, block)
    assert "\n" not in str(error.value)


def test_data_is_whitened_in_blocks():
    splits = {
        "train": RawSplit(smooth_pixels(60, side=8), torch.arange(60) % 3, ("a", "b", "c")),
        "test": RawSplit(smooth_pixels(12, side=8, seed=1), torch.arange(12) % 3, ("a", "b", "c")),
    }
    data = Toy(preprocessing="zca", zca_block=4, **splits)
    data.setup()
    assert data.facts.preprocessing == "zca in 2x2 blocks"
    assert data.spec()["zca_block"] == 4
    assert torch.allclose(
        data.preprocessing.inverse(data.test.everything().images), to_unit(splits["test"].images), atol=1e-4
    )
    with pytest.raises(UserError, match=r"data.zca_block=3 must divide the sides of the images, 8x8"):
        Toy(preprocessing="zca", zca_block=3, **splits).setup()


def test_a_distilled_set_carries_its_block_whitening(tmp_path):
    pixels = smooth_pixels(30, side=8)
    fitted = fit_preprocessing("zca", pixels, zca_block=4)
    eye = torch.eye(2)
    distilled = DistilledSet(fitted(to_unit(pixels[:2])), eye, torch.arange(2), "hard", ("a", "b"), fitted)
    again = DistilledSet.load(distilled.save(tmp_path / "set.safetensors"))
    assert again.preprocessing.zca_stride == 2
    assert torch.allclose(again.pixels(), to_unit(pixels[:2]), atol=1e-3)
    assert torch.equal(again.test_transform(to_unit(pixels)), fitted(to_unit(pixels)))


def test_matrices_that_do_not_fit_the_mean_are_refused():
    state = fit_preprocessing("zca", smooth_pixels(60)).state_dict()
    for changes in ({"zca_mean": torch.zeros(47)}, {"zca_mean": torch.zeros(96)}, {"zca_unwhiten": torch.eye(12)}):
        with pytest.raises(UserError, match="preprocessing: a ZCA mean of"):
            Preprocessing.from_state_dict(state | changes)


def test_a_whitening_is_fitted_once_per_data(monkeypatch, tmp_path):
    fits = []

    def counted(*args, **kwargs):
        fits.append(args[0])
        return fit_preprocessing(*args, **kwargs)

    monkeypatch.setattr("lightning_dd.data.base.fit_preprocessing", counted)

    def whitened(**kwargs) -> Toy:
        data = Toy(**{"preprocessing": "zca", **kwargs})
        data.setup("fit")
        return data

    first, again = whitened(), whitened()
    assert fits == ["zca"]
    for name, value in first.preprocessing.state_dict().items():
        assert torch.equal(again.preprocessing.state_dict()[name], value)
    assert torch.equal(again.train.everything().images, first.train.everything().images)
    whitened(split_seed=1)  # other training images
    for _ in range(2):
        whitened(zca_block=2)
    monkeypatch.setattr(Toy, "channel_mean", (0.5, 0.5, 0.5))
    monkeypatch.setattr(Toy, "channel_std", (0.2, 0.2, 0.2))
    whitened()
    assert len(fits) == 4
    for file in (tmp_path / "cache" / "preprocessing").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="cached preprocessing .* is damaged"):
        whitened()
    assert len(fits) == 5
    other_shapes(max((tmp_path / "cache" / "preprocessing").iterdir(), key=lambda file: file.stat().st_mtime_ns))
    with pytest.warns(UserWarning, match="cached preprocessing .* other shapes"):
        whitened()
    assert len(fits) == 6


# --- streams ---------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_stream_shows_everything_once_per_pass():
    stream = ShuffledStream(12, 4, generator())
    passes = [torch.cat([stream.next() for _ in range(3)]) for _ in range(4)]
    for order in passes:
        assert sorted(order.tolist()) == list(range(12))
    assert len({tuple(order.tolist()) for order in passes}) == 4


def test_a_stream_drops_the_incomplete_batch():
    stream = ShuffledStream(10, 4, generator())
    for _ in range(5):
        one_pass = torch.cat([stream.next(), stream.next()])
        assert len(one_pass) == len(one_pass.unique()) == 8
    assert sorted(ShuffledStream(3, 99, generator()).next().tolist()) == [0, 1, 2]


@pytest.mark.parametrize("before", [0, 1, 3, 4, 7])
def test_a_stream_resumes_exactly(before):
    stream = ShuffledStream(10, 3, generator())
    for _ in range(before):
        stream.next()
    state = stream.state_dict()
    expected = [stream.next().tolist() for _ in range(9)]
    resumed = ShuffledStream(10, 3, generator(99))
    resumed.load_state_dict(state)
    assert [resumed.next().tolist() for _ in range(9)] == expected


def test_skipping_is_drawing():
    one, two = ShuffledStream(10, 3, generator()), ShuffledStream(10, 3, generator())
    for _ in range(7):
        one.next()
    two.skip(7)
    assert one.next().tolist() == two.next().tolist()


@pytest.mark.parametrize("count", [2, 7, 9, 10, 11])
def test_three_ranks_see_each_sample_exactly_once(count):
    split = split_of(torch.arange(count).view(count, 1, 1, 1).float(), torch.arange(count))
    seen: list[int] = []
    for rank in range(3):
        for batch_images, batch_labels in pass_through(EvalBatches(split, 2, rank, 3)):
            assert batch_images.flatten().tolist() == batch_labels.tolist()
            assert len(batch_labels) <= 2
            seen += batch_labels.tolist()
    assert sorted(seen) == list(range(count))


def test_the_step_counter_has_a_length():
    assert list(StepCounter(3)) == [0, 1, 2]
    assert len(StepCounter(3)) == 3


# --- preprocessing that papers chose ------------------------------------------------------------------------------


def test_statistics_and_regulariser_can_be_chosen():
    data = Toy(mean=[0.5, 0.4, 0.3], std=[0.2023, 0.1994, 0.2010])
    data.setup("fit")
    assert data.preprocessing.mean.tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert data.preprocessing.std.tolist() == pytest.approx([0.2023, 0.1994, 0.2010])
    assert data.spec()["std"] == [0.2023, 0.1994, 0.2010]
    assert Toy(**data.spec()).statistics == data.statistics
    assert data.facts.preprocessing.startswith("standardise, mean [0.5")  # so a checkpoint of other numbers is refused
    only_std = Toy(std=[0.25] * 3)
    only_std.setup("fit")
    measured = Toy()
    measured.setup("fit")
    assert torch.equal(only_std.preprocessing.mean, measured.preprocessing.mean)
    assert only_std.preprocessing.std.tolist() == [0.25] * 3
    ridges = Toy(preprocessing="zca", zca_ridge=0.3), Toy(preprocessing="zca", zca_ridge=0.1), Toy(preprocessing="zca")
    for data in ridges:
        data.setup("fit")
    larger, published, default = (data.preprocessing for data in ridges)
    assert torch.equal(published.zca_whiten, default.zca_whiten)
    assert float(larger.zca_whiten.norm()) < 0.9 * float(default.zca_whiten.norm())


def test_kornia_zca_whitens_raw_pixels_with_an_absolute_regulariser():
    data = Toy(preprocessing="kornia-zca", val_fraction=0)
    data.setup("fit")
    rows = to_unit(data.splits[True].images).flatten(1).double().numpy()
    left, values, _ = np.linalg.svd(np.cov(rows, rowvar=False))
    whiten = left @ np.diag(1 / np.sqrt(values + 0.1)) @ left.T
    expected = (rows - rows.mean(0)) @ whiten
    np.testing.assert_allclose(data.train.everything().images.flatten(1).numpy(), expected, atol=1e-5)
    assert data.facts.preprocessing == data.spec()["preprocessing"] == "kornia-zca"
    few = fit_preprocessing("kornia-zca", smooth_pixels(10))  # fewer images than dimensions: the ridge alone fills up
    torch.testing.assert_close(
        few.inverse(few(to_unit(smooth_pixels(4)))), to_unit(smooth_pixels(4)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"std": [0.2, 0.0, 0.2]}, r"data\.std must be positive, got 0\.0"),
        ({"mean": [127.0, 127.0, 127.0]}, r"data\.mean must be in \[0, 1\], got 127\.0"),
        ({"mean": [0.5]}, r"data\.mean must be one number per channel, 3 here, got 1"),
        ({"std": []}, r"data\.std must be one number per channel, 3 here, got 0"),
        ({"zca_ridge": 0.1}, r"data\.zca_ridge: preprocessing standardise does not whiten"),
        ({"preprocessing": "zca", "zca_ridge": 0.0}, r"data\.zca_ridge must be positive, got 0\.0"),
        ({"preprocessing": "kornia-zca", "std": [0.2] * 3}, r"data\.mean and data\.std: .* leave them out"),
        ({"preprocessing": "kornia-zca", "zca_block": 2}, r"kornia-zca whitens whole images, of up to 64 pixels"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused_in_one_line(arguments, said):
    with pytest.raises(UserError, match=said) as error:
        Toy(**arguments).setup("fit")
    assert "\n" not in str(error.value)
