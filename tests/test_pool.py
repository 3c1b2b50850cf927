"""The model pool: ages, staggering, resets, isolation and exact restoration."""

import pytest
import torch
from helpers import LinearNetwork, TinyData, tiny_trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe
from lightning_dd.models.factory import NetworkMixture
from lightning_dd.models.pool import ModelPool, perturbed
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import seeded


def build(seed, architecture):
    with seeded(seed):
        return LinearNetwork(num_classes={"one": 3, "other": 2}[architecture])


def make_pool(size=10, lifetime=100, seed=0, architectures="one"):
    return ModelPool(
        build,
        lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        NetworkMixture.parse(architectures),
        size,
        lifetime,
        torch.Generator().manual_seed(seed),
    )


def inner_loss(network):
    return network(torch.ones(2, 1, 8, 8)).square().mean()


def weights(network):
    return torch.cat([parameter.flatten() for parameter in network.parameters()])


def test_ages_are_staggered_and_the_networks_differ_and_are_untrained():
    pool = make_pool(size=10, lifetime=100)
    assert [member.age for member in pool.members] == list(range(0, 100, 10))
    assert all(not member.optimizer.state for member in pool.members)
    firsts = {float(weights(member.network)[0]) for member in pool.members}
    assert len(firsts) == 10


def test_a_network_lives_its_lifetime_and_is_then_replaced_without_a_step():
    pool = make_pool(size=1, lifetime=4)
    start = weights(pool.network).clone()
    for expected in (1, 2, 3, 4):
        assert pool.advance(inner_loss)
        assert pool.current.age == expected
    assert not torch.equal(weights(pool.network), start)
    module = pool.network
    assert not pool.advance(inner_loss)
    assert pool.current.age == 0
    assert pool.network is module  # fresh weights in the same module: a compiled one stays compiled
    assert not pool.current.optimizer.state
    fresh = weights(pool.network).clone()
    assert not torch.equal(fresh, start)
    pool.advance(inner_loss)
    assert pool.current.age == 1


def test_only_the_current_network_moves_and_all_rest_in_inference_mode():
    pool = make_pool(size=4)
    before = [weights(member.network).clone() for member in pool.members]
    current = pool.members.index(pool.current)
    pool.advance(inner_loss)
    moved = [not torch.equal(weights(m.network), b) for m, b in zip(pool.members, before, strict=True)]
    assert moved == [index == current for index in range(4)]
    for member in pool.members:
        assert not member.network.training
        assert not any(parameter.requires_grad for parameter in member.network.parameters())
        assert all(parameter.grad is None for parameter in member.network.parameters())


def test_the_inner_step_is_adams():
    pool = make_pool(size=1)
    twin = LinearNetwork()
    twin.load_state_dict(pool.network.state_dict())
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for _ in range(3):
        pool.advance(inner_loss)
        optimizer.zero_grad()
        inner_loss(twin.train()).backward()
        optimizer.step()
    torch.testing.assert_close(weights(pool.network), weights(twin))


def test_select_visits_every_network_about_equally():
    pool = make_pool(size=4)
    counts = torch.zeros(4)
    for _ in range(400):
        pool.select()
        counts[pool.members.index(pool.current)] += 1
    assert counts.min() > 70


def test_fresh_networks_draw_their_architecture_by_its_probability():
    pool = make_pool(size=200, lifetime=1, architectures={"one": 3, "other": 1})
    others = [member.architecture for member in pool.members].count("other")
    assert 30 < others < 75
    for member in pool.members:
        assert member.network.num_classes == {"one": 3, "other": 2}[member.architecture]
    seen = set()
    for _ in range(40):
        pool.advance(inner_loss)
        pool.advance(inner_loss)  # too old by now: replaced
        assert pool.network.num_classes == {"one": 3, "other": 2}[pool.current.architecture]
        seen.add(pool.current.architecture)
    assert seen == {"one", "other"}


@pytest.mark.parametrize("start", [0, 4])
def test_unlike_architectures_are_drawn_from_mixing_start_on(start, tmp_path):
    seen = []

    class Watched(FRePo):
        def outer_loss(self, network, images, labels, real):
            seen.append(self.pool.current.architecture)
            return super().outer_loss(network, images, labels, real)

    main = "conv:width=4,depth=2"
    mixture = {main: 0.5, "conv:width=4,depth=1": 0.25, "conv:width=4,depth=2,norm=none": 0.25}
    settings = {"pool_size": 2, "lifetime": 0, "real_batch_size": 8, "probe": Probe(steps=1)}
    model = Watched(architecture=mixture, mixing_start=start, **settings)
    tiny_trainer(tmp_path, 16).fit(model, TinyData())
    assert (set(seen[:4]) == {main}) == (start == 4)
    assert len(set(seen[4:])) == 3
    with pytest.raises(UserError, match="mixing_start needs several architectures to mix, got 'conv'"):
        FRePo(mixing_start=1)
    with pytest.raises(UserError, match="mixing_start must be at least 0, got -1"):
        FRePo(mixing_start=-1)


def test_balanced_terms_are_in_units_of_what_is_usual_for_the_architecture():
    pool = make_pool(size=2, lifetime=9, architectures=["one", "other"])
    sizes = {"one": 100.0, "other": 0.01}
    for _ in range(30):
        size = sizes[pool.current.architecture]
        terms = pool.balanced({"fit": torch.tensor(0.75 * size, requires_grad=True), "margin": torch.tensor(-size / 4)})
        assert terms["fit"].item() == pytest.approx(0.75)
        assert terms["margin"].item() == pytest.approx(-0.25)
        assert terms["fit"].requires_grad
        pool.select()
    size = 3 * sizes[pool.current.architecture]
    assert pool.balanced({"fit": torch.tensor(size)})["fit"].item() == pytest.approx(3 / (0.9 + 0.1 * 3))
    assert pool.balanced({"fit": torch.tensor(float("inf"))})["fit"].isinf()
    assert pool.balanced({"fit": torch.tensor(size)})["fit"].isfinite()  # what overflowed is not remembered
    alone = {"fit": torch.tensor(7.0)}
    assert make_pool(size=2).balanced(alone) is alone


@pytest.mark.parametrize("architectures", ["one", ["one", "other"]])
def test_state_round_trip_continues_bit_for_bit(architectures):
    def run(pool, steps):
        for _ in range(steps):
            found.append(pool.balanced({"loss": inner_loss(pool.network)})["loss"].item())
            pool.advance(inner_loss)
            pool.select()
        return found[-17:]

    found = []
    straight, first, second = (
        make_pool(size=3, lifetime=5, seed=seed, architectures=architectures) for seed in (0, 0, 99)
    )
    whole = run(straight, 30)
    run(first, 13)
    second.load_state_dict(first.state_dict())
    assert run(second, 17) == whole
    assert [m.age for m in second.members] == [m.age for m in straight.members]
    for left, right in zip(second.members, straight.members, strict=True):
        assert left.architecture == right.architecture
        assert torch.equal(weights(left.network), weights(right.network))


def test_a_resumed_run_with_a_mixed_pool_equals_the_run_never_interrupted(tmp_path):
    def fit(folder, model, **kwargs):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = tiny_trainer(folder, 9, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(model, TinyData(val_fraction=0.25), **kwargs)
        return model

    def frepo():
        mixture = {"conv:width=4,depth=2": 2.0, "convnet:width=8,depth=1": 1.0}
        return FRePo(architecture=mixture, pool_size=2, lifetime=1, real_batch_size=8, probe=Probe(steps=1))

    straight = fit(tmp_path / "a", frepo())
    resumed = fit(tmp_path / "b", frepo(), ckpt_path=str(tmp_path / "a" / "step=3.ckpt"), weights_only=True)
    assert len(straight.pool.state_dict()["sizes"]) == 2
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, size in straight.pool.state_dict()["sizes"].items():
        assert torch.equal(size, resumed.pool.state_dict()["sizes"][name])


def test_a_pool_of_an_older_checkpoint_has_one_architecture():
    state = make_pool(size=2).state_dict()
    del state["sizes"]
    for member in state["members"]:
        del member["architecture"]
    pool = make_pool(size=2, seed=5)
    pool.load_state_dict(state)
    assert [member.architecture for member in pool.members] == ["one", "one"]


def test_bad_settings_and_foreign_states_give_one_line():
    with pytest.raises(UserError, match="pool_size must be at least 1"):
        make_pool(size=0)
    with pytest.raises(UserError, match="lifetime must be at least 0"):
        make_pool(lifetime=-1)
    with pytest.raises(UserError, match="pool has 3 networks, pool_size is 2"):
        make_pool(size=2).load_state_dict(make_pool(size=3).state_dict())
    with pytest.raises(UserError, match="pool has architecture 'other', the run has none"):
        make_pool(size=2).load_state_dict(make_pool(size=2, architectures="other").state_dict())


def test_noise_on_weights_is_relative_seeded_and_gone_bit_for_bit():
    pool = make_pool(size=1)
    network, images = pool.network, torch.ones(2, 1, 8, 8, requires_grad=True)
    parameters, before = list(network.parameters()), weights(network).clone()
    with perturbed(network, 0.1, torch.Generator().manual_seed(0)):
        noisy = [parameter.clone() for parameter in network.parameters()]
        assert not any(parameter.requires_grad for parameter in network.parameters())
        loss = inner_loss_of(network, images)
    assert all(left is right for left, right in zip(parameters, network.parameters(), strict=True))
    assert torch.equal(weights(network), before)
    for changed, parameter in zip(noisy, parameters, strict=True):
        share = (changed - parameter).square().mean().sqrt() / parameter.square().mean().sqrt()
        assert share.item() == pytest.approx(0.1, rel=0.5 if parameter.numel() < 100 else 0.1)
    (gradient,) = torch.autograd.grad(loss, images)  # after the block, and yet that of the noisy weights
    twin = LinearNetwork()
    for weight, value in zip(twin.parameters(), noisy, strict=True):
        weight.data.copy_(value)
    torch.testing.assert_close(gradient, torch.autograd.grad(inner_loss_of(twin, images), images)[0])
    with pytest.raises(KeyError), perturbed(network, 0.1, torch.Generator().manual_seed(1)):
        raise KeyError
    assert torch.equal(weights(network), before)
    pool.advance(inner_loss)  # the optimizer still holds the network's own weights
    assert not torch.equal(weights(network), before)


def inner_loss_of(network, images):
    return network(images).square().mean()


def test_noise_is_there_while_networks_look_and_not_while_they_learn(tmp_path):
    seen = {"outer": [], "inner": []}

    class Watched(FRePo):
        def look(self, network, support, query):
            seen["outer"].append(weights(network).clone())
            return super().look(network, support, query)

        def inner_loss(self, network):
            seen["inner"].append(weights(network).clone())
            return super().inner_loss(network)

    def first_looks(perturb):
        for kind in seen.values():
            kind.clear()
        settings = {"pool_size": 2, "kernels": 2, "real_batch_size": 8, "probe": Probe(steps=1)}
        model = Watched(architecture="conv:width=4,depth=2", perturb=perturb, **settings)
        tiny_trainer(tmp_path, 1).fit(model, TinyData())
        return [*seen["outer"], *seen["inner"]]

    plain, noisy = first_looks(0.0), first_looks(0.2)
    assert torch.equal(plain[0], plain[2])
    assert torch.equal(plain[2], noisy[2])
    for left, right in zip(plain[:2], noisy[:2], strict=True):  # the current network and the other one
        assert 0.1 < (left - right).norm() / left.norm() < 0.3
