"""The zoo: every member runs on small images and can be looked into; groups expand; bad names are one line."""

import pytest
import torch
from helpers import TinyData, make_distilled
from torch import nn

from lightning_dd.data import DATA_SETS
from lightning_dd.evaluators.evaluate import evaluate_files
from lightning_dd.losses.cam import class_activation_map
from lightning_dd.losses.cam_layers import find_layer
from lightning_dd.models import ArchitectureSpec, build_network
from lightning_dd.models.zoo import GROUPS, expand
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.errors import UserError

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]
SMALL = "channels=[8,16,32,64],layers=[1,1,1,1]"


def batch(shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def layers_of(network, kind):
    return [layer for layer in network.modules() if isinstance(layer, kind)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("member", GROUPS["zoo-small"])
def test_a_member_of_the_zoo_trains_and_has_a_map(member, shape):
    (architecture,) = expand([member], shape)
    network = build_network(architecture, 7, shape, seed=0)
    features = network.features(batch(shape))
    logits = network.classify(features)
    assert features.shape == (2, network.num_features)
    assert logits.shape == (2, 7)
    assert bool(features.isfinite().all() and logits.isfinite().all())
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(gradients) > 0.9 * len(list(network.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0

    network.eval().requires_grad_(False)
    assert find_layer(network, batch(shape))
    cam = class_activation_map(network, batch(shape).requires_grad_(), torch.tensor([0, 1]))
    assert min(cam.maps.shape[1:]) >= 2
    assert bool(cam.maps.isfinite().all())


def test_the_zoo_has_twenty_families_and_its_groups_hold_known_names():
    assert len({ArchitectureSpec.parse(member).name for member in GROUPS["zoo-small"]}) >= 20
    assert len({ArchitectureSpec.parse(member).name for member in GROUPS["unseen-small"]}) == 8
    published = "alexnet vgg11 resnet18 googlenet resnet34 vit_base_patch16_224 resnet50 vgg19 swin_small convnet"
    unseen = " ".join(GROUPS["unseen"])
    assert all(name in unseen for name in published.split())
    for group, members in GROUPS.items():
        assert len(expand([group], (3, 32, 32))) == len(members)


def test_members_are_not_left_with_what_small_sets_cannot_use():
    for name, members in GROUPS.items():
        for member in members:
            options = ArchitectureSpec.parse(member).options
            residual = "resnet" in member or "regnet" in member
            assert not residual or options["zero_init_last"] is False, member
            assert "swin" not in member or options["drop_path_rate"] == 0, member
            if name in ("zoo-small", "unseen-small"):
                (architecture,) = expand([member], (3, 32, 32))
                assert not layers_of(build_network(architecture, 3, (3, 32, 32), seed=0), nn.BatchNorm2d), member


def test_full_size_students_normalise_every_channel_of_an_image_by_itself():
    for member in GROUPS["unseen"]:
        if "resnet18" in member or "vgg11" in member:
            network = build_network(member, 10, (3, 32, 32), seed=0)
            norms = layers_of(network, nn.GroupNorm)
            assert norms, member
            assert all(layer.num_groups == layer.num_channels for layer in norms), member
            assert not layers_of(network, nn.BatchNorm2d), member


@pytest.mark.slow
@pytest.mark.parametrize("member", [*GROUPS["unseen"], *GROUPS["frepo-cross"]])
def test_full_size_members_run(member):
    for shape in SHAPES:
        (architecture,) = expand([member], shape)
        assert bool(build_network(architecture, 10, shape, seed=0)(batch(shape)).isfinite().all())


def test_groups_expand_in_order_and_without_repetition():
    names = ["vgg11:width=16", "conv:norm=none,width=4", "unseen-small", "conv:width=4, norm=none"]
    found = expand(names)
    assert found[:2] == names[:2]
    assert sorted(found[2:]) == sorted(set(GROUPS["unseen-small"]) - {"vgg11:width=16"})
    assert expand([]) == []


@pytest.mark.parametrize(("side", "depth"), [(28, 3), (32, 3), (48, 3), (64, 4), (128, 5), (256, 6)])
def test_depth_follows_the_image(side, depth):
    assert expand(["convnet:depth=auto,norm=batch"], (3, side, side)) == [f"convnet:depth={depth},norm=batch"]


def test_depth_is_left_to_the_network_without_an_image():
    assert expand(["convnet:depth=auto"]) == ["convnet"]
    assert "convnet" in expand(["unseen"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("unseen-smal", ["unknown architecture 'unseen-smal'", "did you mean the group 'unseen-small'"]),
        ("resnet19", ["unknown architecture 'resnet19'", "resnet"]),
        ("conv width=3", ["cannot read architecture"]),
    ],
)
def test_an_unknown_name_is_one_line_with_the_groups(name, parts):
    with pytest.raises(UserError) as caught:
        expand(["alexnet", name])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts)
    if "unknown" in message:
        assert message.endswith("groups: frepo-cross, unseen, unseen-small, zoo-small")


def test_evaluate_takes_a_group(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)
    monkeypatch.setitem(GROUPS, "pair", ("convnet:width=4,depth=auto", "alexnet:width=4"))
    file = make_distilled().save(tmp_path / "set.safetensors")
    rows = evaluate_files([str(file)], ["pair", "alexnet:width=4"], "report", 1, Recipe(steps=1, batch_size=3))
    assert {row.architecture for row in rows} == {"convnet:width=4,depth=3", "alexnet:width=4"}


# ---- what the zoo needs of the library ---------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "groups"), [("instance", 8), ("group", 8), ("layer", 1), ("none", None)])
def test_norm_takes_the_place_of_batch_normalisation(norm, groups):
    plain = build_network(f"resnet18:{SMALL}", 7, (3, 32, 32), seed=0)
    network = build_network(f"resnet18:{SMALL},norm={norm}", 7, (3, 32, 32), seed=0)
    assert layers_of(plain, nn.BatchNorm2d)
    assert not layers_of(network, nn.BatchNorm2d)
    assert len(layers_of(network, nn.GroupNorm)) == (0 if norm == "none" else len(layers_of(plain, nn.BatchNorm2d)))
    if groups is not None:
        first, old = network.trunk.layer1[0].bn2, plain.trunk.layer1[0].bn2
        assert (first.num_groups, first.eps) == (groups, old.eps)
        assert torch.equal(first.weight, old.weight)  # zeros: the residual branch starts as the library starts it


def test_one_image_does_not_see_another_without_batch_normalisation():
    for architecture in ("torchvision/googlenet:width=8,norm=layer", "mobilenetv2_035:norm=group"):
        network = build_network(architecture, 7, (3, 32, 32), seed=0)
        network.apply(lambda layer: layer.eval() if isinstance(layer, nn.Dropout) else None)
        pair = batch((3, 32, 32))
        torch.testing.assert_close(network(pair)[:1], network(pair[:1]), rtol=1e-4, atol=1e-5)


def test_an_activation_inside_the_norm_is_kept():
    plain = build_network("mobilenetv2_035", 7, (3, 32, 32), seed=0)
    network = build_network("mobilenetv2_035:norm=layer", 7, (3, 32, 32), seed=0)
    assert len(layers_of(network, nn.ReLU6)) == len(layers_of(plain, nn.ReLU6)) > 0


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("resnet18:norm=btach", "unknown norm of architecture 'resnet18' 'btach'; did you mean 'batch'"),
        ("vgg11:norm=layer", "'vgg11' has no batch normalisation"),
        ("torchvision/googlenet:width=6", "must be a multiple of 4, got 6"),
        ("torchvision/googlenet:width=0", "must be a whole number of at least 1"),
        ("mixer_s16_224:blocks=2", "unknown option 'blocks'"),
    ],
)
def test_bad_options_are_one_line(architecture, message):
    with pytest.raises(UserError, match=message) as caught:
        build_network(architecture, 7, (3, 32, 32))
    assert "\n" not in str(caught.value)


def test_googlenet_scales_and_is_the_librarys_own_at_64():
    thin = build_network("torchvision/googlenet:width=8", 7, (1, 28, 28), seed=0)
    assert thin.num_features == 128
    full = build_network("torchvision/googlenet:width=64", 7, (3, 32, 32), seed=3)
    plain = build_network("torchvision/googlenet", 7, (3, 32, 32), seed=3)
    assert full.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in full.state_dict().items())


@pytest.mark.parametrize(("side", "patch"), [(28, 4), (32, 4), (64, 8)])
def test_a_mixer_gets_a_patch_size_and_sizes_of_ones_own(side, patch):
    trunk = build_network("mixer_s16_224:num_blocks=3,embed_dim=16", 7, (3, side, side), seed=0).trunk
    assert trunk.stem.proj.kernel_size == (patch, patch)
    assert (len(trunk.blocks), trunk.stem.num_patches, trunk.embed_dim) == (3, 64, 16)
    published = build_network("mixer_s32_224", 7, (3, 224, 224), seed=0).trunk
    assert (published.stem.proj.kernel_size, len(published.blocks), published.embed_dim) == ((32, 32), 8, 512)
