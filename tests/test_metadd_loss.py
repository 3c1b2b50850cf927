"""The MetaDD loss by brute force, by hand, and its gathered gradient against the one of a single graph."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import LinearNetwork

from lightning_dd.losses.krr import initial_labels
from lightning_dd.losses.metadd import (
    MetaOptions,
    agreement_kl,
    architecture_cross_entropy,
    ensemble_logits,
    label_distribution,
    prediction_logits,
)
from lightning_dd.losses.metadd_gradient import Architecture, gathered_loss, naive_loss
from lightning_dd.models import build_network
from lightning_dd.utils.errors import UserError

ROWS, CLASSES = 4, 10
ONLY_VARIANCE = {"cross_entropy": 0.0, "kl": 0.0}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def architecture(name, seed=0, scale=10.0, **settings):
    network = build_network(name, CLASSES, (3, 32, 32), seed=seed).double().eval().requires_grad_(False)
    network.head.weight.abs_().mul_(scale)  # untrained: keeps the maps alive, or with scale 0 all of them dead
    return Architecture(network, **settings)


@pytest.fixture(scope="module")
def architectures():
    return [
        architecture("conv:width=4"),
        architecture("convnet:width=4", adapt=lambda pixels: (2 * pixels - 0.1).tanh()),
        architecture("vit_tiny_patch16_224:depth=2,embed_dim=16,num_heads=2", cam="attention"),
        architecture("resnet18:channels=[4,4,8,8]"),
    ]


@pytest.fixture
def batch():
    labels = initial_labels(torch.arange(ROWS), CLASSES, "learned").double() + 0.05 * random(ROWS, CLASSES, seed=1)
    return random(ROWS, 3, 32, 32).requires_grad_(), labels.requires_grad_()


def gradients(result, *tensors):
    found = torch.autograd.grad(result.loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def assert_close_to(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * b.norm(), float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"detach_weights": False},
        {"detach_weights": False, "positivity": 0.7, "threshold": 0.3, "grid": 7, "variance": 3.0},
        {"detach_consensus": False, "kl_direction": "forward", "temperature": 2.0},
        {"consensus": "distiller", "temperature": 4.0},
        {"consensus": "distiller", "detach_consensus": False, "kl_direction": "forward"},
        {"consensus": "distiller", "detach_consensus": False, "detach_architectures": True, "kl": -0.5},
        {"detach_consensus": False, "detach_architectures": True},
        {"positivity": 1.0, "positivity_form": "heterogeneous", "threshold": 0.4, "detach_weights": False},
        {"positivity": 1.0, "positivity_form": "position", "variance": 0.0},
        {"cam_class": "prediction", "normalisation": "max", "positivity": 1.0, "detach_weights": False},
        {"variance": 0.0},
        ONLY_VARIANCE,
        {"layers": "shallow", "detach_weights": False},
        {"layers": "both", "detach_weights": False, "positivity": 1.0},
    ],
)
def test_the_gathered_gradient_is_that_of_one_graph(architectures, batch, changes, dead):
    images, labels = batch
    consensus = (3 * random(ROWS, CLASSES, seed=2)).requires_grad_()
    if dead:
        architectures = [*architectures, architecture("conv:width=4", seed=5, scale=0.0)]
    options = MetaOptions(**changes)
    arguments = (architectures, images, labels, "learned", options, consensus)
    naive, gathered = naive_loss(*arguments), gathered_loss(*arguments)
    assert naive.terms["dead_maps"] == pytest.approx(0.2 if dead else 0.0)
    expected = gradients(naive, images, labels, consensus)
    assert expected[0].norm() > 0
    assert (expected[1].norm() > 0) == (options.cross_entropy > 0)
    assert (expected[2].norm() > 0) == (options.consensus == "distiller" and not options.detach_consensus)
    if options.detach_architectures:
        alone = gradients(naive_loss(*arguments[:4], replace(options, kl=0.0), consensus), images)
        assert_close_to(expected[:1], alone, 1e-12)
    assert_close_to(gradients(gathered, images, labels, consensus), expected, 1e-9)
    torch.testing.assert_close(gathered.loss, naive.loss, rtol=1e-9, atol=0)
    for name, value in naive.terms.items():
        torch.testing.assert_close(gathered.terms[name], value, rtol=1e-9, atol=1e-12)
        assert not gathered.terms[name].requires_grad
    torch.testing.assert_close(gathered.maps, naive.maps)


def test_maps_of_both_layers_are_compared_each_with_its_like(architectures, batch):
    last, shallow, both = (
        gathered_loss(architectures, *batch, "learned", MetaOptions(**ONLY_VARIANCE, layers=layers))
        for layers in ("last", "shallow", "both")
    )
    assert (last.maps - shallow.maps).abs().max() > 0.1
    torch.testing.assert_close(both.maps, torch.cat([last.maps, shallow.maps], 1))
    torch.testing.assert_close(both.loss, (last.loss + shallow.loss) / 2)


@pytest.mark.parametrize("count", [1, 3])
def test_without_maps_the_other_terms_and_their_gradient_are_the_same(architectures, batch, count, monkeypatch):
    options = MetaOptions(variance=0.0, kl=0.0)
    full = gathered_loss(architectures[:count], *batch, "learned", options)
    wanted = gradients(full, *batch)
    monkeypatch.setattr("lightning_dd.losses.metadd_gradient.class_activation_map", None)
    bare = gathered_loss(architectures[:count], *batch, "learned", options, with_maps=False)
    assert bare.maps.numel() == 0
    assert set(bare.terms) == {"cross_entropy", "kl"}
    assert all(torch.equal(bare.terms[name], full.terms[name]) for name in bare.terms)
    assert all(torch.equal(*pair) for pair in zip(gradients(bare, *batch), wanted, strict=True))


def test_maps_that_a_term_needs_are_made_unasked(architectures, batch):
    class Own(MetaOptions):
        own = 1.0

        def more_terms(self, maps, alive, logits, labels):
            return {"own": maps.mean()}

    for options in (MetaOptions(), Own(variance=0.0, kl=0.0)):
        assert gathered_loss(architectures, *batch, "learned", options, with_maps=False).maps.numel() > 0


@pytest.mark.parametrize("kind", ["hard", "centred"])
def test_fixed_labels_of_every_kind(architectures, batch, kind):
    labels = initial_labels(torch.arange(ROWS), CLASSES, kind).double()
    arguments = (architectures[:2], batch[0], labels, kind, MetaOptions())
    naive, gathered = naive_loss(*arguments), gathered_loss(*arguments)
    assert_close_to(gradients(gathered, batch[0]), gradients(naive, batch[0]), 1e-9)
    expected = [F.cross_entropy(a.network(x), torch.arange(ROWS)) for a, x in views(architectures[:2], batch[0])]
    torch.testing.assert_close(gathered.terms["cross_entropy"], torch.stack(expected).mean())


def views(architectures, images):
    return [(a, images if a.adapt is None else a.adapt(images)) for a in architectures]


def test_the_order_of_architectures_does_not_matter(architectures, batch):
    images, labels = batch
    first = gathered_loss(architectures, images, labels, "learned", MetaOptions(positivity=1.0))
    expected = gradients(first, images, labels)
    for order in list(itertools.permutations(range(4)))[5::9]:
        shuffled = [architectures[index] for index in order]
        again = gathered_loss(shuffled, images, labels, "learned", MetaOptions(positivity=1.0))
        torch.testing.assert_close(again.loss, first.loss)
        assert_close_to(gradients(again, images, labels), expected, 1e-9)


@pytest.mark.parametrize("loss", [gathered_loss, naive_loss])
def test_identical_architectures_have_no_variance_and_no_gradient_from_it(architectures, batch, loss):
    images, labels = batch
    result = loss([architectures[0]] * 3, images, labels, "learned", MetaOptions(**ONLY_VARIANCE, detach_weights=False))
    assert result.loss < 1e-25
    assert gradients(result, images)[0].norm() < 1e-12


@pytest.mark.parametrize("loss", [gathered_loss, naive_loss])
def test_the_loss_is_the_sum_of_its_terms_times_their_weights(architectures, batch, loss):
    weights = {"variance": 3.0, "cross_entropy": 0.2, "kl": -0.5, "positivity": 0.7}
    result = loss(architectures, *batch, "learned", MetaOptions(**weights))
    assert all(result.terms[name] > 0 for name in weights)
    torch.testing.assert_close(result.loss.detach(), sum(weights[name] * result.terms[name] for name in weights))


@pytest.mark.parametrize("loss", [gathered_loss, naive_loss])
def test_gradient_reaches_the_synthetic_set_and_nothing_else(architectures, batch, loss):
    images, labels = batch
    loss(architectures, images, labels, "learned", MetaOptions(detach_weights=False)).loss.backward()
    assert images.grad.abs().max() > 0
    assert labels.grad.abs().max() > 0
    for one in architectures:
        assert all(parameter.grad is None for parameter in one.network.parameters())


def test_the_loss_is_an_ordinary_term_of_a_training_step(architectures, batch):
    # Images that are the output of something, another term beside it, a factor such as a gradient scaler's.
    latent, labels = batch
    arguments = (labels, "learned", MetaOptions())
    slow = naive_loss(architectures[:2], latent.sin(), *arguments).loss + latent.square().sum()
    fast = gathered_loss(architectures[:2], latent.sin(), *arguments).loss + latent.square().sum()
    expected = torch.autograd.grad(1024 * slow, (latent, labels))
    assert_close_to(torch.autograd.grad(1024 * fast, (latent, labels)), expected, 1e-9)


def test_without_gradients_only_the_values_are_computed(architectures, batch):
    images, labels = batch
    expected = naive_loss(architectures[:2], images, labels, "learned", MetaOptions())
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            result = gathered_loss(architectures[:2], images * 1, labels, "learned", MetaOptions())
        assert not result.loss.requires_grad
        torch.testing.assert_close(result.loss.clone(), expected.loss.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_gradient_finite_and_near(batch, dtype):
    single = [architecture(name, scale=3.0) for name in ("conv:width=8", "convnet:width=8")]
    for one in single:
        one.network.float()
    images, labels = (tensor.detach().float().requires_grad_() for tensor in batch)
    arguments = (single, images, labels, "learned", MetaOptions())
    exact = gradients(gathered_loss(*arguments), images)[0]
    with torch.autocast("cpu", dtype):
        rough = gathered_loss(*arguments)
    found = gradients(rough, images)[0]
    assert rough.maps.dtype == rough.loss.dtype == found.dtype == torch.float32
    assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > (0.9 if dtype == torch.bfloat16 else 0.9999)


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_start_labels_of_every_kind_mean_their_class(classes):
    rows = torch.arange(4) % classes
    for kind in ("hard", "centred", "learned"):
        labels = initial_labels(rows, classes, kind)
        expected = torch.eye(classes)[rows]
        torch.testing.assert_close(label_distribution(labels, kind), expected, rtol=0, atol=1e-6)
        logits = random(4, classes).float()
        torch.testing.assert_close(architecture_cross_entropy(logits, labels, kind), F.cross_entropy(logits, rows))


def test_learned_labels_stay_distributions_and_get_gradient():
    labels = random(6, 5).requires_grad_()
    rows = label_distribution(labels, "learned")
    torch.testing.assert_close(rows.sum(1), torch.ones(6, dtype=torch.float64))
    assert (rows >= 0).all()
    assert torch.autograd.gradcheck(lambda y: architecture_cross_entropy(random(6, 5, seed=1), y, "learned"), labels)
    hopeless = torch.full((1, 5), -9.0, requires_grad=True)
    architecture_cross_entropy(torch.zeros(1, 5), hopeless, "learned").backward()
    assert torch.isfinite(hopeless.grad).all()


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_a_regression_networks_answer_becomes_a_sure_prediction(classes):
    rows = torch.arange(2)
    answers = initial_labels(rows, classes, "learned").double()  # what FRePo's network returns when it is right
    right, nothing = (prediction_logits(part, "learned").softmax(1) for part in (answers, 0 * answers))
    assert right[rows, rows].min() > 0.99
    assert classes != 10 or answers.softmax(1)[0, 0] == pytest.approx(0.232, abs=1e-3)  # what its softmax would say
    torch.testing.assert_close(nothing, torch.full_like(nothing, 1 / classes))
    logits = random(2, classes)
    assert torch.isfinite(agreement_kl(100 * logits, prediction_logits(-answers, "centred"), 1.0, "reverse"))
    assert torch.equal(prediction_logits(logits, "hard"), logits)
    assert torch.equal(prediction_logits(logits, "soft"), logits)
    assert torch.equal(label_distribution(logits, "soft"), logits.softmax(1))
    near = (answers + 0.01 * logits).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: prediction_logits(y.abs() + 0.1, "learned"), near)


@pytest.mark.parametrize("kind", ["learned", "hard"])
def test_each_architecture_is_compared_with_the_main_networks_prediction(architectures, batch, kind):
    images, labels = batch
    answers = 3 * random(ROWS, CLASSES, seed=2)
    options = MetaOptions(consensus="distiller", variance=0.0, cross_entropy=0.0)
    found = gathered_loss(architectures[:2], images, labels.detach(), kind, options, answers)
    main = prediction_logits(answers, kind).log_softmax(1)
    own = [a.network(x).log_softmax(1) for a, x in views(architectures[:2], images)]
    torch.testing.assert_close(found.loss, sum((p.exp() * (p - main)).sum(1).mean() for p in own) / 2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_torchs_with_the_squared_temperature(temperature):
    student, teacher = random(4, 5), random(4, 5, seed=1)
    p, q = (F.log_softmax(z / temperature, 1) for z in (student, teacher))
    for direction, input_, target in (("forward", p, q), ("reverse", q, p)):
        expected = temperature**2 * F.kl_div(input_, target, reduction="batchmean", log_target=True)
        torch.testing.assert_close(agreement_kl(student, teacher, temperature, direction), expected)


def test_ensemble_is_the_mean_prediction_and_its_own_gradient_vanishes_in_reverse():
    logits = random(3, 4, 5).requires_grad_()
    mean = F.softmax(logits / 2, 2).mean(0)
    torch.testing.assert_close(F.softmax(ensemble_logits(logits, 2.0) / 2, 1), mean)
    found = []
    for teacher in (ensemble_logits(logits, 2.0), ensemble_logits(logits, 2.0).detach()):
        loss = torch.stack([agreement_kl(one, teacher, 2.0, "reverse") for one in logits]).mean()
        found.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variance": -1}, "metadd weight variance must be at least 0, got -1"),
        ({"kl": math.inf}, "metadd weight kl must be a finite number, got inf"),
        ({"detach_architectures": True}, "detach_consensus and detach_architectures leave kl nothing to move"),
        ({"positivity_form": "metta"}, "unknown metadd positivity_form 'metta'; did you mean 'meta'"),
        ({"cam_class": "labels"}, "unknown metadd cam_class 'labels'; did you mean 'label'"),
        ({"normalisation": "sum"}, "unknown metadd normalisation 'sum'"),
        ({"cross_entropy": math.nan}, "metadd weight cross_entropy must be at least 0"),
        ({"positivity": -2}, "metadd weight positivity"),
        ({"temperature": 0}, "metadd temperature must be positive"),
        ({"threshold": 0}, r"metadd threshold must be in \(0, 1\]"),
        ({"kl_direction": "back"}, "unknown metadd kl_direction 'back'"),
        ({"consensus": "ensembel"}, "unknown metadd consensus 'ensembel'; did you mean 'ensemble'"),
        ({"cam": "x"}, "unknown metadd cam 'x'"),
        ({"grid": 1}, "metadd grid must be at least 2"),
        ({"grid": 7.5}, "metadd grid must be a whole number"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        MetaOptions(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", [gathered_loss, naive_loss])
def test_bad_architectures_are_one_line(architectures, batch, loss):
    training = Architecture(build_network("conv:width=4", CLASSES, (3, 32, 32)), name="conv")
    flat = Architecture(LinearNetwork(3072, num_classes=CLASSES).double().eval(), name="mine")
    lost = Architecture(architectures[3].network, layer="trunk.layer9", name="resnet18")
    for wrong, options, message in (
        ([training], {}, "metadd architecture conv must be frozen, but is in training mode"),
        ([flat], {}, "mine: architecture LinearNetwork has no spatial map"),
        ([lost], {}, "resnet18: unknown layer 'trunk.layer9'"),
        (architectures[1:], {"consensus": "distiller"}, "needs the logits of the distiller's own network"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            loss([architectures[0], *wrong], *batch, "learned", MetaOptions(**options))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="needs at least one architecture"):
        loss([], *batch, "learned", MetaOptions())
    with pytest.raises(UserError, match="unknown label kind 'fuzzy'"):
        loss(architectures, *batch, "fuzzy", MetaOptions())
