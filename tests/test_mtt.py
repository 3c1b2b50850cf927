"""MTT: the trajectory loss and its gradients, the experts and their files, the distiller."""

from functools import partial

import pytest
import torch
from helpers import LinearNetwork, TinyData, other_shapes, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

from lightning_dd.augment.siamese import apply, siamese
from lightning_dd.callbacks import MetaDD
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers import MTT
from lightning_dd.distillers.base import Probe
from lightning_dd.distillers.checkpoint import distilled_from_checkpoint
from lightning_dd.losses.labels import student_loss
from lightning_dd.losses.metadd import MetaOptions
from lightning_dd.losses.trajectory import (
    InnerStep,
    Stretch,
    constant_memory,
    functional_loss,
    parameter_vector,
    trajectory_loss,
    unrolled,
)
from lightning_dd.models import build_network
from lightning_dd.models.pool import rest
from lightning_dd.pretrained import ClassifierRecipe, Task, experts
from lightning_dd.pretrained.experts import ExpertRecipe, Trajectories, expert_file
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator

TINY = {
    "architecture": "convnet:width=4,depth=2",
    "lr": 1.0,
    "syn_steps": 3,
    "expert_epochs": 2,
    "max_start_epoch": 2,
    "step_size": 0.02,
    "step_size_lr": 1e-5,
    "experts": 2,
    "trajectory_epochs": 3,
    "expert_batch_size": 8,
    "probe": Probe(steps=2),
}


def mtt(**changes):
    return MTT(**(TINY | changes))


def fitted(tmp_path, steps=4, trainer=None, **changes):
    model = mtt(**changes)
    (trainer or tiny_trainer(tmp_path, steps, callbacks=[])).fit(model, TinyData())
    return model


# ---- the loss ----------------------------------------------------------------------------------------------------


class Problem:
    """Six images of three classes, a start and a target near it, and N steps on batches of four."""

    def __init__(self, network, kind, steps=4, strategy="color_cutout_flip", dtype=torch.float64):
        generator = make_generator(0, "problem")
        rest(network.to(dtype))
        self.network, self.kind = network, kind
        self.start = parameter_vector(network)
        self.target = self.start + 0.05 * torch.randn(len(self.start), generator=generator, dtype=dtype)
        self.images = torch.randn(6, 1, 8, 8, generator=generator, dtype=dtype).requires_grad_()
        self.labels = torch.eye(3, dtype=dtype).repeat(2, 1) - (0 if kind == "hard" else 1 / 3)
        self.labels.requires_grad_(kind == "learned")
        self.step_size = torch.tensor(0.1, dtype=dtype).requires_grad_()
        augmentation = siamese(strategy, shared=False)
        self.steps = [
            InnerStep(torch.randperm(6, generator=generator)[:4], partial(apply, draw=augmentation.draw(generator)))
            for _ in range(steps)
        ]

    @property
    def leaves(self):
        return [leaf for leaf in (self.images, self.labels, self.step_size) if leaf.requires_grad]

    def loss(self, form):
        loss = functional_loss(self.network, wide_loss(self.kind))
        return form(Stretch(loss, self.start, self.target, self.steps), self.images, self.labels, self.step_size)

    def gradients(self, form):
        value = self.loss(form)
        return value.detach(), torch.autograd.grad(value, self.leaves)


def half_squared(logits, labels):
    return 0.5 * (logits - labels).square().sum(1).mean()


def wide_loss(kind):
    """The recipe's loss without its rounding to float32."""
    return F.cross_entropy if kind == "hard" else half_squared


def by_hand(problem):
    """A loop over explicit matrices: nothing of the code under test."""
    network = problem.network
    sizes = [(network.body.weight.shape), (network.body.bias.shape), (network.head.weight.shape), (3,)]
    moving, at = [], 0
    for size in sizes:
        count = torch.Size(size).numel()
        moving.append(problem.start[at : at + count].reshape(size).clone().requires_grad_())
        at += count
    for rows, augment in problem.steps:
        features = augment(problem.images[rows]).flatten(1) @ moving[0].T + moving[1]
        logits = features @ moving[2].T + moving[3]
        labels = problem.labels[rows]
        log_shares = logits - logits.logsumexp(1, keepdim=True)
        loss = -(labels * log_shares).sum(1).mean() if problem.kind == "hard" else half_squared(logits, labels)
        gradients = torch.autograd.grad(loss, moving, create_graph=True)
        moving = [value - problem.step_size * slope for value, slope in zip(moving, gradients, strict=True)]
    end = torch.cat([value.flatten() for value in moving])
    far = (problem.start - problem.target).square().sum()
    value = (end - problem.target).square().sum() / far
    return value.detach(), torch.autograd.grad(value, problem.leaves)


@pytest.mark.parametrize("form", [unrolled, constant_memory])
@pytest.mark.parametrize("kind", ["hard", "centred", "learned"])
def test_loss_and_gradients_are_those_of_a_loop_written_by_hand(form, kind):
    problem = Problem(LinearNetwork(), kind)
    value, gradients = problem.gradients(form)
    expected_value, expected = by_hand(problem)
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=0)
    assert len(gradients) == (3 if kind == "learned" else 2)
    for gradient, hand in zip(gradients, expected, strict=True):
        assert hand.norm() > 0
        torch.testing.assert_close(gradient, hand, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("architecture", ["convnet:width=4,depth=2", "conv:width=4,depth=2,norm=none"])
def test_the_gradient_of_constant_memory_is_exact(architecture):
    problem = Problem(build_network(architecture, 3, (1, 8, 8), seed=0), "learned", steps=6)
    (value, gradients), (expected_value, expected) = problem.gradients(constant_memory), problem.gradients(unrolled)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0)
    for gradient, whole in zip(gradients, expected, strict=True):
        assert (gradient - whole).norm() <= 1e-8 * whole.norm()
        assert whole.norm() > 0


def test_the_gradient_is_exact_where_a_truncated_one_is_not():
    problem = Problem(LinearNetwork(), "hard")
    loss = functional_loss(problem.network, wide_loss("hard"))
    (whole, _), vector, moved = problem.gradients(constant_memory)[1], problem.start, 0
    for rows, augment in problem.steps:  # steps that do not know of each other
        here = vector.detach().requires_grad_()
        slope = torch.autograd.grad(
            loss(here, augment(problem.images[rows]), problem.labels[rows]), here, create_graph=True
        )[0]
        moved = moved + slope
        vector = here - problem.step_size.detach() * slope.detach()
    end = problem.start - problem.step_size.detach() * moved
    truncated = torch.autograd.grad(trajectory_loss(end, problem.start, problem.target), problem.images)[0]
    assert (whole - truncated).norm() > 1e-3 * whole.norm()


class Alive:
    """A saved tensor that counts itself."""

    def __init__(self, tensor: Tensor, counter):
        self.tensor = tensor.detach()  # an output that is saved would hold the node that holds it, and never be freed
        counter["now"] += 1
        counter["peak"] = max(counter["peak"], counter["now"])
        self.counter = counter

    def __del__(self):
        self.counter["now"] -= 1


def peak(form, steps):
    counter = {"now": 0, "peak": 0}
    problem = Problem(build_network(TINY["architecture"], 3, (1, 8, 8), seed=0), "hard", steps, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Alive(tensor, counter), lambda saved: saved.tensor):
        problem.loss(form).backward()
    return counter["peak"]


def test_the_graph_does_not_grow_with_the_number_of_steps():
    assert peak(constant_memory, 8) < 1.1 * peak(unrolled, 1)
    assert peak(unrolled, 8) > 3 * peak(unrolled, 2)


@pytest.mark.parametrize("form", [unrolled, constant_memory])
def test_without_gradients_there_is_the_same_value_and_no_graph(form):
    problem = Problem(LinearNetwork(), "hard")
    with torch.no_grad():
        value = problem.loss(form)
    assert not value.requires_grad
    torch.testing.assert_close(value, by_hand(problem)[0])


@pytest.mark.parametrize("form", [unrolled, constant_memory])
def test_distances_are_never_in_half_precision(form):
    problem = Problem(build_network(TINY["architecture"], 3, (1, 8, 8), seed=0), "hard", dtype=torch.float32)
    whole_value, whole = problem.gradients(form)
    with torch.autocast("cpu", torch.bfloat16):
        value = problem.loss(form)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), whole_value, rtol=0.02, atol=0)
    for gradient, reference in zip(torch.autograd.grad(value, problem.leaves), whole, strict=True):
        assert F.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) > 0.95


def test_an_expert_that_has_not_moved_gives_a_finite_loss():
    start = torch.zeros(3)
    assert torch.isfinite(trajectory_loss(torch.ones(3), start, start))
    assert float(trajectory_loss(start, start, start)) == 0


def test_attention_can_be_differentiated_twice():
    vit = "vit_tiny_patch16_224:patch_size=4,depth=1,embed_dim=8,num_heads=2"
    problem = Problem(build_network(vit, 3, (1, 8, 8), seed=0), "hard", steps=2, dtype=torch.float32)
    (_, gradients), (_, expected) = problem.gradients(constant_memory), problem.gradients(unrolled)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


# ---- experts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "experts"


def one_expert(index=0, architecture=TINY["architecture"], train_missing=True, **recipe):
    data = TinyData()
    data.setup("fit")
    recipe = ExpertRecipe(**({"augment": "none", "epochs": 3, "batch_size": 8} | recipe))
    return expert_file(architecture, Task.of(data, train_missing=train_missing), recipe, 0, index), data


@pytest.mark.parametrize("labels", ["hard", "centred"])
def test_snapshots_are_those_of_a_plain_sgd_loop(cache, labels):
    path, data = one_expert(labels=labels, batch_size=1000, lr=0.05)  # whole batches: the order does not matter
    kept = Trajectories([path])
    network = build_network(TINY["architecture"], 3, (1, 8, 8), seed=0)
    torch.nn.utils.vector_to_parameters(kept.snapshot(0, 0).clone(), network.parameters())
    one_hot = torch.eye(3)[data.train.labels]
    for epoch in range(1, 4):
        logits = network(data.train.everything().images)
        hard = F.cross_entropy(logits, data.train.labels)
        loss = hard if labels == "hard" else 0.5 * (logits - one_hot + 1 / 3).square().sum(1).mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
        torch.testing.assert_close(kept.snapshot(0, epoch), parameter_vector(network), rtol=1e-5, atol=1e-6)
        assert not torch.equal(kept.snapshot(0, epoch), kept.snapshot(0, epoch - 1))
    with pytest.raises(Exception, match="epoch4"):
        kept.snapshot(0, 4)


def test_an_epoch_is_a_pass_over_whole_batches_and_augmentation_counts(cache, monkeypatch):
    steps = []
    monkeypatch.setattr(experts, "student_loss", lambda *args: steps.append(1) or student_loss(*args))
    path, data = one_expert()
    assert len(steps) == 3 * (len(data.train.labels) // 8)
    augmented, _ = one_expert(augment="flip_color")
    assert augmented != path
    with safe_open(path, "pt") as file, safe_open(augmented, "pt") as other:
        assert sorted(file.keys()) == ["epoch0", "epoch1", "epoch2", "epoch3"]
        assert torch.equal(file.get_tensor("epoch0"), other.get_tensor("epoch0"))
        assert not torch.equal(file.get_tensor("epoch1"), other.get_tensor("epoch1"))


@pytest.fixture
def trained(monkeypatch):
    """Titles of the experts that were trained, in order."""
    titles, fit = [], experts.fit
    monkeypatch.setattr(experts, "fit", lambda *args: titles.append(args[-1]) or fit(*args))
    return titles


def test_only_missing_and_damaged_experts_are_trained_again(cache, trained):
    files = [one_expert(index)[0] for index in range(3)]
    content = [file.read_bytes() for file in files]
    assert len(set(content)) == 3
    files[1].unlink()
    files[2].write_bytes(content[2][:-10])
    assert [one_expert(index)[0] for index in range(3)] == files
    assert trained == ["expert 0", "expert 1", "expert 2", "expert 1", "expert 2"]
    assert [file.read_bytes() for file in files] == content
    one_expert(lr=0.5)
    assert len(trained) == 6
    other_shapes(files[0])
    one_expert(0)
    assert files[0].read_bytes() == content[0]


def test_open_trajectories_outlive_their_files(cache):
    path, _ = one_expert()
    kept = Trajectories([path])
    before = kept.snapshot(0, 1).clone()
    path.unlink()
    assert torch.equal(kept.snapshot(0, 1), before)


def test_missing_experts_can_be_refused(cache, tmp_path, trained):
    with pytest.raises(UserError, match=r"expert 0 of .* is not trained .* train_missing is false"):
        fitted(tmp_path, train_missing=False)
    first = fitted(tmp_path)
    assert trained == ["expert 0", "expert 1"]
    again = fitted(tmp_path, train_missing=False)
    assert trained == ["expert 0", "expert 1"]
    assert torch.equal(first.synthetic.images, again.synthetic.images)


def test_batch_normalisation_is_refused_before_any_training(cache, tmp_path, trained):
    with pytest.raises(UserError, match=r"cannot use architecture 'conv:width=4,depth=2'.*norm=instance"):
        fitted(tmp_path, architecture="conv:width=4,depth=2")
    with pytest.raises(UserError, match="cannot use architecture"):
        one_expert(architecture="conv:width=4,depth=2")
    assert not trained


def test_a_diverged_expert_is_refused_and_not_kept(cache):
    with pytest.raises(UserError, match=r"expert 0 of .* diverged.* lower expert_lr"):
        one_expert(lr=9e8)
    assert not list(cache.glob("*.safetensors"))


# ---- the distiller -----------------------------------------------------------------------------------------------


def test_distilling_lowers_the_trajectory_loss(tmp_path):
    def losses(model):
        kept, values = model._trajectories[model.architecture], []
        loss = functional_loss(model.network, partial(student_loss, label_kind="hard"))
        for seed in range(6):
            start, target = kept.snapshot(seed % 2, seed % 2), kept.snapshot(seed % 2, 2 + seed % 2)
            steps = model._inner_steps(3, make_generator(seed, "held out"))
            images, labels = (part.detach() for part in model.synthetic())
            values.append(
                constant_memory(Stretch(loss, start, target, steps), images, labels, model.step_size.detach())
            )
        return float(torch.stack(values).mean())

    start, end = fitted(tmp_path, 0), fitted(tmp_path, 40)
    assert losses(end) < 0.85 * losses(start)
    assert not torch.equal(end.step_size, start.step_size)


@pytest.mark.parametrize(
    ("labels", "names"), [("hard", {"parameterisation.images"}), ("learned", {"parameterisation.images", "labels"})]
)
def test_every_part_learns_at_its_own_rate(tmp_path, labels, names):
    class Keep(Callback):
        def on_train_start(self, trainer, pl_module):
            self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}

    keep = Keep()
    rates = {"lr": 2.0, "label_lr": 0.5, "step_size_lr": 1e-4}
    model = fitted(tmp_path, trainer=tiny_trainer(tmp_path, 1, callbacks=[keep]), labels=labels, **rates)
    assert set(keep.start) == {"step_size"} | {f"synthetic.{name}" for name in names}
    for name, parameter in model.named_parameters():
        rate = {"step_size": 1e-4, "synthetic.labels": 0.5}.get(name, 2.0)
        assert keep.gradients[name].norm() > 0
        torch.testing.assert_close(parameter.detach(), keep.start[name] - rate * keep.gradients[name])
    assert {group["momentum"] for group in model.trainer.optimizers[0].param_groups} == {0.5}
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_start_epochs_come_from_a_window_that_grows(tmp_path):
    class Keep(Callback):
        def __init__(self):
            self.epochs = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            kept = pl_module._trajectories[pl_module.architecture]
            now = parameter_vector(pl_module.network)
            self.epochs += [
                epoch for epoch in range(5) for expert in range(2) if torch.equal(now, kept.snapshot(expert, epoch))
            ]

    keep, window = Keep(), {"min_start_epoch": 1, "early_max_start_epoch": 2, "max_start_epoch": 5, "window_growth": 12}
    trainer = tiny_trainer(tmp_path, 40, callbacks=[keep])
    model = fitted(tmp_path, trainer=trainer, trajectory_epochs=6, **window)
    assert [model.max_start_epoch_at(step) for step in (0, 3, 4, 7, 8, 11, 12, 1000)] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert len(keep.epochs) == 40
    assert set(keep.epochs[:4]) == {1}
    assert set(keep.epochs[:8]) <= {1, 2}
    assert set(keep.epochs) == {1, 2, 3, 4}


def test_logits_start_from_experts_answers_to_images_they_get_right(tmp_path):
    model = fitted(tmp_path, 0, labels="logits", ipc=2, trajectory_epochs=12, expert_lr=0.1)
    train, network, kept = model.trainer.datamodule.train.everything(), model.network, model._trajectories
    answers = []
    for expert in range(2):
        vector_to_parameters(kept[model.architecture].snapshot(expert, 12).clone(), network.parameters())
        answers.append(network(model.synthetic.images).detach())
    classes = model.synthetic.classes
    right = [answer.argmax(1) == classes for answer in answers]
    for row in range(6):
        assert any(torch.equal(model.synthetic.images[row], image) for image in train.images[train.labels == row // 2])
        mean = torch.stack([answers[expert][row] for expert in range(2) if right[expert][row]]).mean(0)
        torch.testing.assert_close(model.synthetic.labels[row].detach(), mean)
    assert not all(torch.equal(model.synthetic.labels[row], answers[0][row]) for row in range(6))


def test_only_experts_that_are_right_have_a_vote_on_a_logit_and_all_where_none_is(tmp_path):
    model = fitted(tmp_path, 0, labels="logits")
    assert model.synthetic.classes.tolist() == [0, 1, 2]
    said = torch.tensor([[[5.0, 1, 0], [0, 3, 1], [4, 0, 2]], [[0, 5.0, 0], [1, 7, 0], [0, 2, 1]]])
    model._answers = lambda expert, images: said[expert].repeat(-(-len(images) // 3), 1)[: len(images)]
    model._known = lambda train: train
    model.initialise(model.task.train)
    mean = said.mean(0)  # both are right of the second image, and neither of the third
    assert torch.equal(model.synthetic.labels.detach(), torch.stack([said[0, 0], mean[1], mean[2]]))


def test_images_that_no_expert_gets_right_are_not_started_from(tmp_path):
    model = fitted(tmp_path, 0, labels="logits", trajectory_epochs=12, expert_lr=0.1)
    train = model.trainer.datamodule.train
    wanted = torch.arange(len(train.labels)) % 4 == 1

    def answers(expert, images):
        known = (images.flatten(1)[:, None] == train.everything().images.flatten(1)[None]).all(2).float().argmax(1)
        return torch.nn.functional.one_hot((train.labels + (~wanted).long())[known] % 3, 3).float()

    model._answers = answers
    assert torch.equal(model._known(train).everything().images, train.take(wanted).images)
    wanted &= train.labels != 1
    assert torch.equal(model._known(train).everything().images, train.take(wanted | (train.labels == 1)).images)


def test_logits_are_learned_with_momentum_and_a_file_calls_them_soft(tmp_path):
    start, model = (fitted(tmp_path, steps, labels="logits") for steps in (0, 3))
    assert not torch.equal(start.synthetic.labels, model.synthetic.labels)
    momenta = [group["momentum"] for group in model.trainer.optimizers[0].param_groups]
    assert momenta == [0.5, 0.9, 0.5]  # images, logits, step size
    assert model.expert_recipe.labels == "hard"
    loaded = DistilledSet.load(model.distilled_set().save(tmp_path / "set.safetensors"))
    assert (loaded.label_kind, loaded.temperature) == ("soft", 1.0)
    assert torch.equal(loaded.labels, model.synthetic.labels.detach())


def test_the_loss_of_logits_has_the_gradient_of_a_cross_entropy_twice():
    generator = make_generator(0, "logits")
    outputs, labels = (torch.randn(5, 4, generator=generator).requires_grad_() for _ in range(2))

    def second(loss):
        (first,) = torch.autograd.grad(loss, outputs, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), labels)[0]

    by_definition = -(labels.softmax(1) * outputs.log_softmax(1)).sum(1).mean()
    for ours, expected in zip(second(student_loss(outputs, labels, "soft")), second(by_definition), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_step_size_stays_positive(tmp_path):
    class Push(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pl_module.step_size.grad.fill_(1e9)

    model = fitted(tmp_path, trainer=tiny_trainer(tmp_path, 2, callbacks=[Push()]))
    assert float(model.step_size) == pytest.approx(0.01 * TINY["step_size"])


def test_both_forms_distil_the_same_set(tmp_path):
    exact, whole = fitted(tmp_path), fitted(tmp_path, constant_memory=False)
    torch.testing.assert_close(exact.synthetic.images, whole.synthetic.images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exact.step_size, whole.step_size, rtol=1e-5, atol=0)


def test_small_batches_pass_over_the_whole_set(tmp_path):
    model = fitted(tmp_path, 1, ipc=2, batch_syn=2, syn_steps=6)
    rows = torch.stack([step.rows for step in model._inner_steps(6, make_generator(0))])
    assert rows.shape == (6, 2)
    assert rows[:3].flatten().sort().values.tolist() == rows[3:].flatten().sort().values.tolist() == list(range(6))


def test_the_network_stands_at_the_experts_start(tmp_path):
    model = fitted(tmp_path, 1, max_start_epoch=1)
    starts = [model._trajectories[model.architecture].snapshot(expert, 0) for expert in range(2)]
    assert any(torch.equal(parameter_vector(model.network), start) for start in starts)
    pair, loss = ["convnet:width=4,depth=2", "conv:width=4,depth=2"], MetaOptions(consensus="distiller")
    metadd = MetaDD(pair, loss, every=1, training=ClassifierRecipe(steps=30))
    fitted(tmp_path, trainer=tiny_trainer(tmp_path, 2, callbacks=[metadd]))
    with pytest.raises(RuntimeError, match="only while fitting"):
        _ = mtt().network


def test_of_several_architectures_one_is_drawn_for_every_step(tmp_path):
    names, seen = ["convnet:width=4,depth=2", "convnet:width=6,depth=2"], []

    class KeepNetwork(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append((pl_module._current, pl_module.network.num_features))

    model = fitted(tmp_path, trainer=tiny_trainer(tmp_path, 8, callbacks=[KeepNetwork()]), architecture=names)
    assert set(seen) == {(name, model.build_network(0, name).num_features) for name in names}


def checkpointing(folder, steps, every):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    return tiny_trainer(folder, steps, callbacks=[keep], enable_checkpointing=True, val_check_interval=4)


@pytest.mark.parametrize("labels", ["learned", "logits"])
def test_a_resumed_run_equals_the_run_never_interrupted(tmp_path, labels):
    straight, resumed = (mtt(labels=labels, early_max_start_epoch=1, window_growth=6) for _ in range(2))
    checkpointing(tmp_path, 9, every=5).fit(straight, TinyData())
    checkpoint = str(tmp_path / "step=5.ckpt")
    checkpointing(tmp_path / "b", 9, every=100).fit(resumed, TinyData(), ckpt_path=checkpoint, weights_only=True)
    for (name, left), (_, right) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(left, right), name
    distilled = distilled_from_checkpoint(checkpoint)
    assert distilled.method == "MTT"
    assert distilled.training["step_size"] != TINY["step_size"]


def test_the_learned_step_size_travels_with_the_set(tmp_path):
    model = fitted(tmp_path)
    loaded = DistilledSet.load(model.distilled_set(outer_step=4).save(tmp_path / "set.safetensors"))
    assert loaded.training["step_size"] == float(model.step_size)
    assert loaded.config["syn_steps"] == 3


class KeepRank(Callback):
    """Let every rank write what it holds when training ends, and where its outer steps started."""

    def __init__(self, folder):
        self.folder, self.starts = folder, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.starts.append(parameter_vector(pl_module.network))

    def on_train_end(self, trainer, pl_module):
        state = {"module": pl_module.state_dict(), "starts": torch.stack(self.starts)}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_share_set_step_size_and_experts(tmp_path, cache):
    two = {"devices": 2, "strategy": "ddp_fork"}
    trainer = tiny_trainer(tmp_path, 5, callbacks=[KeepRank(tmp_path)], **two)
    trainer.fit(mtt(labels="learned"), TinyData())
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert (
        first["module"].keys()
        == second["module"].keys()
        >= {"step_size", "synthetic.parameterisation.images", "synthetic.labels"}
    )
    assert all(torch.equal(value, second["module"][name]) for name, value in first["module"].items())
    assert not torch.equal(first["starts"], second["starts"])  # every rank draws its own expert and epoch
    assert len(list(cache.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"syn_steps": 0}, "syn_steps must be at least 1, got 0"),
        ({"batch_syn": 0}, "batch_syn must be at least 1, got 0"),
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"step_size_lr": -1.0}, "step_size_lr must be at least 0, got -1.0"),
        (
            {"trajectory_epochs": 2},
            r"trajectory_epochs must be at least max_start_epoch - 1 \+ expert_epochs = 3, got 2",
        ),
        ({"min_start_epoch": 2}, "start epochs need 0 <= min_start_epoch < early_max_start_epoch"),
        ({"early_max_start_epoch": 3}, "<= max_start_epoch, got 0, 3 and 2"),
        ({"window_growth": 0}, "window_growth must be at least 1, got 0"),
        ({"expert_lr": 0.0}, "expert_lr must be positive"),
        ({"augment": "flip_nonsense"}, "unknown augmentation 'nonsense'"),
        ({"labels": "fuzzy"}, "labels of MTT must be one of hard, centred, learned, logits, soft"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message) as error:
        mtt(**settings)
    assert "\n" not in str(error.value)
