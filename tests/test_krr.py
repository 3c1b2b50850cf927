"""Kernel ridge regression against closed forms, finite differences and algebra."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dd.losses.krr import (
    SolveError,
    averaged_kernel,
    centred_one_hot,
    half_squared_error,
    krr_predict,
    label_margin,
    label_margin_loss,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_prediction_equals_the_closed_form_in_float64():
    support, labels, query = random(6, 9), random(6, 3, seed=1), random(11, 9, seed=2)
    ridge = 1e-3
    fs, ft, ys = support.numpy(), query.numpy(), labels.numpy()
    kernel = fs @ fs.T
    regularised = kernel + ridge * np.trace(kernel) / 6 * np.eye(6)
    expected = (ft @ fs.T) @ np.linalg.solve(regularised, ys)
    prediction = krr_predict(support, labels, query, ridge)
    np.testing.assert_allclose(prediction.values.numpy(), expected, rtol=2e-5, atol=2e-6)
    assert prediction.ridge == ridge


def test_near_duplicates_are_told_apart_in_float64():
    """Rows a ten-thousandth apart: a kernel in float32 loses what tells them apart."""
    support = random(4, 20, seed=4).repeat(2, 1)
    support[4:] += 1e-4 * random(4, 20, seed=5)
    labels, query = random(8, 3, seed=1), random(5, 20, seed=2)
    kernel = (support @ support.T).numpy()
    weights = np.linalg.solve(kernel + 1e-10 * np.trace(kernel) / 8 * np.eye(8), labels.numpy())
    expected = query.numpy() @ (support.T.numpy() @ weights)
    found = krr_predict(support, labels, query, 1e-10)
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert found.ridge == 1e-10


def test_prediction_is_invariant_to_a_rotation_of_the_features():
    support, labels, query = random(6, 9), random(6, 3, seed=1), random(11, 9, seed=2)
    rotation, _ = torch.linalg.qr(random(9, 9, seed=3))
    plain = krr_predict(support, labels, query).values
    rotated = krr_predict(support @ rotation, labels, query @ rotation).values
    torch.testing.assert_close(plain, rotated, rtol=1e-4, atol=1e-5)


def test_averaged_kernel_is_the_mean_of_kernels_divided_by_their_mean_diagonal():
    small, large = (random(4, 5), random(7, 5, seed=1)), (1000 * random(4, 9, seed=2), 1000 * random(7, 9, seed=3))
    support, query = averaged_kernel([small, large])
    unit = [own @ own.T / (own @ own.T).diagonal().mean() for own, _ in (small, large)]
    across = [other @ own.T / (own @ own.T).diagonal().mean() for own, other in (small, large)]
    torch.testing.assert_close(support @ support.T, sum(unit).float() / 2)
    torch.testing.assert_close(query @ support.T, sum(across).float() / 2)
    labels = random(4, 3, seed=4)
    twice = krr_predict(*swap(labels, *averaged_kernel([small, small])), ridge=1e-3)
    torch.testing.assert_close(twice.values, krr_predict(*swap(labels, *small), ridge=1e-3).values)
    assert averaged_kernel([small]) is small


def swap(labels, support, query):
    return support, labels, query


def test_condition_is_a_lower_bound_of_the_right_size():
    support = random(6, 9)
    kernel = support @ support.T
    regularised = kernel + 1e-6 * kernel.diagonal().mean() * torch.eye(6)
    exact = torch.linalg.cond(regularised)
    bound = krr_predict(support, random(6, 3), random(2, 9)).condition
    assert 1 <= bound <= exact * (1 + 1e-9)
    assert bound > exact / 100
    apart = krr_predict(torch.diag(torch.tensor([1.0, 10.0])), random(2, 3), random(2, 2), ridge=0.0)
    assert float(apart.condition) == pytest.approx(100)  # where the kernel is diagonal, it is the number itself


def test_duplicate_rows_and_half_precision_features_stay_finite():
    support = random(4, 9).repeat(8, 1).to(torch.bfloat16)
    prediction = krr_predict(support, random(32, 3).float(), random(5, 9).float())
    assert torch.isfinite(prediction.values).all()


def test_the_ridge_escalates_before_giving_up():
    # Without any ridge a rank-deficient kernel cannot be factorised; a vanishing one has to grow.
    support = random(2, 9).repeat(16, 1)
    prediction = krr_predict(support, random(32, 3), random(5, 9), ridge=1e-18)
    assert prediction.ridge > 1e-18
    assert torch.isfinite(prediction.values).all()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_hopeless_features_raise_an_error_that_names_the_kernel(value):
    with pytest.raises(SolveError, match=r"4 x 4 synthetic kernel is not positive definite"):
        krr_predict(torch.full((4, 9), value), torch.zeros(4, 3), torch.ones(5, 9))


def test_gradient_reaches_support_and_labels_and_matches_finite_differences():
    support, labels, query = random(4, 6), random(4, 3, seed=1), random(7, 6, seed=2)
    targets = random(7, 3, seed=3)

    def loss(features, values):
        return half_squared_error(krr_predict(features, values, query, 1e-2).values.double(), targets)

    support.requires_grad_(), labels.requires_grad_()
    loss(support, labels).backward()
    for tensor in (support, labels):
        numeric = torch.zeros_like(tensor)
        for index in range(tensor.numel()):
            for sign in (1, -1):
                moved = tensor.detach().clone()
                moved.view(-1)[index] += sign * 1e-3
                args = (moved, labels.detach()) if tensor is support else (support.detach(), moved)
                numeric.view(-1)[index] += sign * loss(*args) / 2e-3
        assert (numeric - tensor.grad).norm() / numeric.norm() < 1e-3


class MadeSquares(TorchDispatchMode):
    """Counts the tensors ``n x n`` that are made while it is on."""

    def __init__(self, rows):
        super().__init__()
        self.shape, self.made = (rows, rows), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.made += sum(isinstance(each, torch.Tensor) and each.shape == self.shape for each in found)
        return result


def test_the_kernel_and_its_factor_are_all_that_grows_with_the_square_of_the_rows():
    support, labels = random(20, 6).requires_grad_(), random(20, 3, seed=1).requires_grad_()
    with MadeSquares(20) as forward:
        values = krr_predict(support, labels, random(7, 6, seed=2), 1e-2).values
    with MadeSquares(20) as backward:
        values.sum().backward()
    assert (forward.made, backward.made) == (2, 0)


def test_half_squared_error_sums_over_classes_and_means_over_rows():
    prediction, target = random(5, 3), random(5, 3, seed=1)
    expected = 0.5 * ((prediction - target).numpy() ** 2).sum(1).mean()
    assert half_squared_error(prediction, target).item() == pytest.approx(expected, rel=1e-5)


def test_label_margin_term_pushes_only_labels_below_the_margin():
    labels = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.4, 0.0]], requires_grad=True)
    loss = label_margin_loss(labels)
    assert loss.item() == pytest.approx(-(1 / 3 + 0.1) / 2)
    loss.backward()
    assert labels.grad[0].abs().sum() == 0
    torch.testing.assert_close(labels.grad[1], torch.tensor([-0.5, 0.5, 0.0]))
    torch.testing.assert_close(label_margin(labels.detach()), torch.tensor([0.8, 0.1]))


def test_targets_are_centred_and_not_scaled():
    targets = centred_one_hot(torch.tensor([2, 0]), 4)
    torch.testing.assert_close(targets.sum(1), torch.zeros(2))
    torch.testing.assert_close(targets[0], torch.tensor([-0.25, -0.25, 0.75, -0.25]))
