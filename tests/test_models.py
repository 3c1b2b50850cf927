"""Networks: shapes, order, normalisation, initial weights, libraries fitted to small images, and every bad input."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import TinyData, tiny_trainer
from torch import nn

from lightning_dd.callbacks import MetaDD
from lightning_dd.data import DATA_SETS
from lightning_dd.distillers import DSA
from lightning_dd.distillers.base import Probe
from lightning_dd.evaluators.evaluate import evaluate_files
from lightning_dd.models import ArchitectureSpec, ConvNet, FRePoConv, Network, build_network, known_architectures
from lightning_dd.models.library import LibraryNetwork
from lightning_dd.models.zoo import expand
from lightning_dd.pretrained import Teacher
from lightning_dd.students.recipe import Recipe
from lightning_dd.synthetic import TeacherLabels
from lightning_dd.utils.arguments import nothing_imported
from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import seeded

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]
OWN = {"conv:width=8": 32, "convnet:width=8": 8, "alexnet:width=16": 24}  # with the channels of the last map
SMALL_VIT = "vit_tiny_patch16_224:depth=2,embed_dim=48,num_heads=3"
SMALL_SWIN = "swin_tiny_patch4_window7_224:embed_dim=24,depths=[1,1,1,1],num_heads=[1,2,4,8]"
LIBRARY = [  # name, number of features, the last map's side at 28, 32 and 64 px
    ("resnet18:channels=[8,16,32,64]", 64, (4, 4, 8)),
    ("resnet10t:channels=[8,16,32,64]", 64, (4, 4, 8)),
    ("mobilenetv3_small_050", 1024, (4, 4, 4)),
    ("convnext_atto", 320, (4, 4, 4)),
    ("regnetx_002", 368, (4, 4, 4)),
    ("densenet121", 1024, (4, 4, 4)),
    ("efficientnet_b0", 1280, (4, 4, 4)),
    ("repvgg_a0", 1280, (4, 4, 4)),
    (SMALL_SWIN, 192, (2, 2, 2)),
    (SMALL_VIT, 48, (8, 8, 8)),
    ("deit_tiny_distilled_patch16_224:depth=1,embed_dim=48,num_heads=3", 48, (8, 8, 8)),
]


class Mine(Network):
    """A network of somebody's own, with a map of 8 x 8 and options."""

    def __init__(self, in_channels, num_classes, image_size, width=8):
        super().__init__()
        self.num_features, self.num_classes = width * 64, num_classes
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(8))
        self.head = nn.Linear(width * 64, num_classes)

    def features(self, images):
        return self.body(images).flatten(1)

    def classify(self, features):
        return self.head(features)


MINE = "test_models.Mine:width=4"


def images(shape: tuple[int, int, int], n: int = 2) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def last_map_side(network: LibraryNetwork, batch: torch.Tensor) -> int:
    trunk = network.trunk
    maps = trunk.forward_intermediates(network.pad(batch), indices=1, output_fmt="NCHW", intermediates_only=True)
    return maps[-1].shape[-1]


def same_state(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", OWN)
def test_own_shapes(architecture, shape):
    network = build_network(architecture, 7, shape, seed=0).eval()
    features = network.features(images(shape))
    side = 4 if shape[1] < 64 else 8
    assert features.shape == (2, network.num_features) == (2, OWN[architecture] * side * side)
    assert network.num_classes == 7
    assert network.classify(features).shape == (2, 7)
    torch.testing.assert_close(network.classify(features), network(images(shape)))


@pytest.mark.parametrize(("architecture", "num_features", "sides"), LIBRARY)
def test_library_networks_fit_small_images(architecture, num_features, sides):
    for shape, side in zip(SHAPES, sides, strict=True):
        network = build_network(architecture, 7, shape, seed=0).eval()
        with torch.no_grad():
            features = network.features(images(shape))
            assert features.shape == (2, network.num_features) == (2, num_features)
            torch.testing.assert_close(network.classify(features), network(images(shape)))
            assert last_map_side(network, images(shape)) == side
    network.train()(images(shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.head.parameters())


def test_vgg_has_one_linear_layer_and_scales():
    network = build_network("vgg11_bn:width=8", 10, (1, 28, 28), seed=0)
    assert network.features(images((1, 28, 28))).shape == (2, 64)
    assert [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)] == [10]
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert build_network("vgg11", 10, (3, 32, 32)).num_features == 512


def test_torchvision_by_prefix_and_as_fallback():
    for name in ("torchvision/mobilenet_v2:width_mult=0.25", "mnasnet0_5"):
        network = build_network(name, 7, (1, 28, 28), seed=0)
        assert isinstance(network, LibraryNetwork)
        features = network.features(images((1, 28, 28)))
        assert features.shape == (2, 1280)
        assert network.classify(features).shape == (2, 7)
    assert build_network("timm/resnet18:channels=[8,16,32,64]", 7, (3, 32, 32)).num_features == 64


def test_resnet_stem_follows_the_literature():
    for side in (32, 64):
        trunk = build_network("resnet18:channels=[8,16,32,64]", 10, (3, side, side)).trunk
        assert (trunk.conv1.kernel_size, trunk.conv1.stride) == ((3, 3), (1, 1))
        assert isinstance(trunk.maxpool, nn.Identity)
    large = build_network("resnet18:channels=[8,16,32,64]", 10, (3, 96, 96)).trunk
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)


def test_a_pool_without_stride_does_nothing():
    trunk = build_network("densenet121", 10, (3, 32, 32)).trunk
    assert (trunk.features.conv0.stride, trunk.features.pool0.kernel_size) == ((1, 1), (1, 1))


def test_options_win_over_the_fitted_ones():
    assert build_network(SMALL_VIT + ",patch_size=8", 10, (3, 32, 32)).trunk.patch_embed.num_patches == 16
    own_stem = build_network("convnext_atto:patch_size=2", 10, (3, 32, 32)).trunk.stem[0]
    assert own_stem.stride == (2, 2)


def test_stem_changes_are_taken_back_when_the_network_cannot_run_with_them():
    # The token layers have one weight per token, so a finer patch layer is impossible.
    trunk = build_network("resmlp_12_224", 10, (3, 32, 32), seed=0).trunk
    assert trunk.stem.proj.stride == trunk.stem.proj.kernel_size == (16, 16) == tuple(trunk.stem.proj.weight.shape[2:])


def test_images_that_are_not_square_or_not_a_multiple_of_eight():
    for architecture in ("conv:width=8", "alexnet:width=16", "resnet18:channels=[8,16,32,64]", SMALL_VIT):
        network = build_network(architecture, 10, (3, 28, 45), seed=0)
        assert network(images((3, 28, 45))).shape == (2, 10)


def test_padding_is_centred_and_zero():
    network = build_network("vgg11:width=8", 10, (1, 28, 28))
    padded = network.pad(torch.ones(1, 1, 28, 28))
    assert padded.shape == (1, 1, 32, 32)
    assert padded.sum() == 28 * 28
    assert padded[0, 0, 2:30, 2:30].sum() == 28 * 28


def test_widths():
    assert FRePoConv(3, 10, (32, 32)).widths == [128, 256, 512]
    assert FRePoConv(3, 10, (32, 32)).num_features == 8192
    assert ConvNet(3, 10, (32, 32)).widths == [128, 128, 128]
    assert [conv.out_channels for conv in FRePoConv(3, 10, (64, 64), width=4, depth=4).convs] == [4, 8, 16, 32]
    alexnet = build_network("alexnet", 10, (3, 32, 32))
    assert [conv.out_channels for conv in alexnet.trunk if isinstance(conv, nn.Conv2d)] == [128, 192, 256, 192, 192]


def reference_blocks(network, batch, norm_first):
    """Write the published order out by hand."""
    x = batch
    for index, (norm, conv) in enumerate(zip(network.norms, network.convs, strict=True)):
        padding = 3 if index == 0 and batch.shape[-1] == 28 else 1
        if norm_first and index > 0:
            x = norm(x)
        x = nn.functional.conv2d(x, conv.weight, conv.bias, padding=padding)
        if not norm_first:
            x = norm(x)
        x = nn.functional.avg_pool2d(x.clamp(min=0), 2)
    return x.flatten(1)


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer", "none"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 24)])
def test_order_of_norm_convolution_relu_and_pool(norm, shape):
    for cls in (FRePoConv, ConvNet):
        network = cls(shape[0], 10, shape[1:], width=8, norm=norm).eval()
        for layer in network.norms:  # scales that make a misplaced norm visible
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
        expected = reference_blocks(network, images(shape), norm_first=cls is FRePoConv)
        torch.testing.assert_close(network.features(images(shape)), expected)
        with torch.no_grad():  # where ReLU runs in place
            batch = images(shape)
            torch.testing.assert_close(network.features(batch), expected)
            assert torch.equal(batch, images(shape))


@pytest.mark.parametrize("name", ["conv", "convnet"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu", "sigmoid"])
@pytest.mark.parametrize(("pooling", "layer"), [("avg", nn.AvgPool2d(2)), ("max", nn.MaxPool2d(2))])
def test_variants_of_a_network_differ_in_activation_and_pooling(name, activation, pooling, layer):
    shape = (3, 16, 16)
    options = f"width=8,depth=1,norm=none,activation={activation},pooling={pooling}"
    network = build_network(f"{name}:{options}", 10, shape, seed=0)
    modules = {"leaky_relu": nn.LeakyReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "sigmoid": nn.Sigmoid()}
    expected = layer(modules.get(activation, nn.ReLU())(network.convs[0](images(shape)))).flatten(1)
    torch.testing.assert_close(network.features(images(shape)), expected)
    with torch.no_grad():
        torch.testing.assert_close(network.features(images(shape)), expected)


def test_relu_leaves_the_map_before_it_to_hooks():
    # A hook for class activation maps, or a method that differentiates twice, must see what the convolution made.
    network = FRePoConv(3, 10, (32, 32), width=8)
    kept = []
    network.convs[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    network(images((3, 32, 32)))
    assert kept[0].min() < 0


def test_batch_norm_momentum_and_placement():
    norms = FRePoConv(3, 10, (32, 32), width=8).norms
    assert [type(layer) for layer in norms] == [nn.Identity, nn.BatchNorm2d, nn.BatchNorm2d]
    assert [layer.momentum for layer in norms[1:]] == [0.9, 0.9]
    assert [layer.momentum for layer in ConvNet(3, 10, (32, 32), width=8, norm="batch").norms] == [0.1] * 3


def test_instance_norm_is_torchs_affine_one():
    layer = ConvNet(3, 10, (32, 32), width=8).norms[0]
    reference = nn.InstanceNorm2d(8, affine=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(images((8, 5, 5))), reference(images((8, 5, 5))))


@pytest.mark.parametrize("architecture", [*OWN, "resnet18:channels=[8,16,32,64]", "vgg11:width=8"])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_channels_last_changes_nothing(architecture, shape):
    network = build_network(architecture, 10, shape, seed=0).eval()
    expected = network.features(images(shape))
    network.to(memory_format=torch.channels_last)
    batch = images(shape).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network.features(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["conv:width=8", "convnet:width=8"])
@pytest.mark.parametrize("compiling", [False, True])  # compiled, one-channel images go through as two
def test_bfloat16_autocast_is_close(architecture, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    network = build_network(architecture, 10, (1, 28, 28), seed=0).to(memory_format=torch.channels_last).eval()
    expected = network.features(images((1, 28, 28)))
    with torch.autocast("cpu", torch.bfloat16):
        found = network.features(images((1, 28, 28)))
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("architecture", ["conv:width=8", "vgg11:width=8", SMALL_VIT, "mnasnet0_5"])
def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(architecture):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_network(architecture, 10, (3, 32, 32), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert same_state(first, build_network(architecture, 10, (3, 32, 32), seed=1))
    assert not same_state(first, build_network(architecture, 10, (3, 32, 32), seed=2))
    assert not same_state(first, build_network(architecture, 10, (3, 32, 32)))
    assert all(module.training for module in first.modules())


def test_lecun_normal_weights_and_zero_biases():
    with seeded(0):
        network = FRePoConv(3, 10, (32, 32), width=64)
    for layer in [*network.convs, network.head]:
        weight = layer.weight.detach()
        std = math.sqrt(1 / weight[0].numel())
        tolerance = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
        assert weight.std().item() == pytest.approx(std, rel=tolerance)
        assert weight.abs().max() <= 2 * std / 0.8796
        assert layer.bias.abs().max() == 0
    assert ConvNet(3, 10, (32, 32)).convs[0].bias.abs().max() > 0


@pytest.mark.parametrize(
    "architecture",
    ["convnet:width=8", "conv:width=8", "alexnet:width=16", SMALL_VIT, "conv:width=8,activation=gelu,pooling=max"],
)
def test_second_derivative_through_the_weights(architecture):
    network = build_network(architecture, 3, (3, 32, 32), seed=0).double()
    batch = images((3, 32, 32), n=3).double().requires_grad_()

    def gradient_norm(batch):
        loss = nn.functional.cross_entropy(network(batch), torch.arange(3))
        gradients = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients)

    (second,) = torch.autograd.grad(gradient_norm(batch), batch)
    direction = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    step = 1e-6
    ahead, behind = gradient_norm(batch + step * direction), gradient_norm(batch - step * direction)
    expected = (ahead - behind).item() / (2 * step)
    assert (second * direction).sum().item() == pytest.approx(expected, rel=1e-4)


def test_spec_reads_and_writes():
    assert known_architectures() == ["alexnet", "conv", "convnet"]
    spec = ArchitectureSpec.parse("timm/resnet18:channels=[8, 16],act=null,aa=true,rate=1e-3,kind='null'")
    assert spec.name == "timm/resnet18"
    assert spec.options == {"channels": [8, 16], "act": None, "aa": True, "rate": 0.001, "kind": "null"}
    assert ArchitectureSpec.parse(str(spec)) == spec
    assert str(ArchitectureSpec.parse(" conv ")) == "conv"
    assert str(ArchitectureSpec.parse("conv:norm=none,width=32")) == "conv:norm=none,width=32"
    assert ArchitectureSpec.parse("conv:width=8").with_options(width=4, norm="none").options["width"] == 4


@pytest.mark.parametrize(
    ("architecture", "shape", "words"),
    [
        ("covn", (3, 32, 32), "did you mean 'conv'? known: alexnet, conv, convnet, and every"),
        ("resnt18", (3, 32, 32), "did you mean 'resnet18'"),
        ("timm/conv", (3, 32, 32), "unknown architecture 'timm/conv'"),
        ("tim/resnet18", (3, 32, 32), "unknown library 'tim'; did you mean 'timm'"),
        ("", (3, 32, 32), "cannot read architecture ''"),
        ("conv net", (3, 32, 32), "cannot read architecture 'conv net'"),
        ("conv:width", (3, 32, 32), "cannot read the options of architecture 'conv:width'"),
        ("conv:width=[1", (3, 32, 32), "cannot read the options"),
        ("conv:width=1}", (3, 32, 32), "cannot read the options"),
        ("conv:width=8,width=9", (3, 32, 32), "cannot read the options"),
        ("conv:3=4", (3, 32, 32), "cannot read the options"),
        ("conv:a=!!python/none", (3, 32, 32), "cannot read the options"),
        (
            "conv:widht=8",
            (3, 32, 32),
            "unknown option of conv 'widht'; did you mean 'width'? known: activation, depth, norm, pooling, width",
        ),
        ("conv:width=wide", (3, 32, 32), "width must be a whole number of at least 1, got 'wide'"),
        ("conv:depth=0", (3, 32, 32), "depth must be"),
        ("convnet:activation=rleu", (3, 32, 32), "unknown activation 'rleu'; did you mean 'relu'?"),
        ("conv:pooling=mean", (3, 32, 32), "unknown pooling 'mean'; known: avg, max"),
        ("convnet:norm=bach", (3, 32, 32), "unknown norm 'bach'; did you mean 'batch'?"),
        ("conv:depth=6,width=2", (3, 32, 32), "image_size 32x32 is too small for depth 6"),
        ("convnet:depth=4", (1, 8, 32), "image_size 8x32 is too small for depth 4"),
        ("alexnet", (1, 7, 7), "image_size 7x7 is too small for alexnet"),
        ("resnet18:chanels=[8]", (3, 32, 32), "unknown option 'chanels' of architecture 'resnet18'"),
        ("vgg11:widht=8", (3, 32, 32), "unknown option 'widht' of architecture 'vgg11'"),
        ("vgg11:width=0", (3, 32, 32), "option 'width' of architecture 'vgg11' must be"),
        ("hrnet_w18_small:foo=1", (3, 32, 32), "unknown option 'foo'"),
        ("resmlp_12_224:patch_size=4", (3, 32, 32), "option 'patch_size' of architecture 'resmlp_12_224' is fixed"),
        ("torchvision/resnet18:foo=1", (3, 32, 32), "unknown option 'foo' of architecture 'torchvision/resnet18'"),
        ("resnet18:num_classes=5", (3, 32, 32), "option 'num_classes' of architecture 'resnet18' comes from the data"),
        ("resnet18:checkpoint_path=x", (3, 32, 32), "weights start at random"),
        (SMALL_VIT + ",embed_dim=47", (3, 32, 32), "cannot read the options"),
        ("vit_tiny_patch16_224:embed_dim=47", (1, 28, 28), "cannot build architecture 'vit_tiny_patch16_224:embed_"),
        ("torchvision/squeezenet1_1", (3, 32, 32), "does not end in a linear layer"),
        ("torchvision/alexnet", (3, 32, 32), "for images of shape (3, 32, 32): "),
        ("test_models.Mine:widht=4", (3, 32, 32), "unknown option of test_models.Mine 'widht'; did you mean 'width'"),
        ("test_models.Yours", (3, 32, 32), "architecture 'test_models.Yours' cannot be imported: module 'test_models'"),
        ("no_package.Net", (3, 32, 32), "architecture 'no_package.Net' cannot be imported: No module named"),
        ("test_models.images", (3, 32, 32), "'test_models.images' is no subclass of lightning_dd.models.interface.Net"),
        (".Net", (3, 32, 32), "cannot read architecture '.Net'"),
        ("conv", (3, 32), "image_shape must be (channels, height, width), got (3, 32)"),
        ("conv", (3, 0, 32), "image_shape must be a whole number"),
    ],
)
def test_bad_input_is_one_clear_line(architecture, shape, words):
    with pytest.raises(UserError) as caught:
        build_network(architecture, 10, shape)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_of_ones_own_is_given_by_its_path():
    network = build_network(MINE, 7, (3, 20, 32), seed=0)
    assert isinstance(network, Mine)
    assert network(images((3, 20, 32))).shape == (2, 7)
    assert same_state(network, build_network(MINE, 7, (3, 20, 32), seed=0))
    assert expand([MINE], (3, 32, 32)) == [MINE]
    assert build_network("resnet10t.c3_in1k:channels=[8,8,8,8]", 7, (3, 32, 32)).num_features == 8  # no path but timm's
    with nothing_imported():
        build_network(MINE, 7, (3, 32, 32))
        with pytest.raises(UserError, match="nothing is imported for a file"):
            build_network("antigravity.Net", 7, (3, 32, 32))


def test_a_network_of_ones_own_serves_as_pool_teacher_judge_and_student(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dd.pretrained.classifier._fit", lambda *args: 1.0)
    monkeypatch.setattr("lightning_dd.pretrained.classifier._accuracy", lambda *args: 1.0)
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)
    labels = TeacherLabels(Teacher([MINE, "conv:width=4,depth=2"], steps=1), epochs=0)
    model = DSA(
        ipc=1, architecture=[MINE, "convnet:width=4,depth=2"], labels=labels, pool_size=2, lifetime=1, inner_steps=2,
        real_per_class=4, augment="flip+test_augment.darken", probe=Probe(steps=1),
    )  # fmt: skip
    metadd = MetaDD([MINE, "convnet:width=4,depth=2"], every=1, augment="test_augment.darken")
    trainer = tiny_trainer(tmp_path, 4, callbacks=[metadd])
    trainer.fit(model, TinyData(val_fraction=0.25))
    assert {member.architecture for member in model.pool.members} <= {MINE, "convnet:width=4,depth=2"}
    file = model.distilled_set().save(tmp_path / "set.safetensors")
    recipe = Recipe(steps=1, augment="test_augment.darken")
    rows = evaluate_files([str(file)], [MINE], tmp_path / "report", 1, recipe)
    assert {row.architecture for row in rows} == {MINE}


@pytest.mark.parametrize("architecture", [*OWN, "resnet18:channels=[8,16,32,64]", "vgg11:width=8"])
def test_images_with_the_wrong_channels(architecture):
    network = build_network(architecture, 10, (3, 32, 32))
    with pytest.raises(UserError, match=r"takes images \(N, 3, H, W\), got a tensor of shape \(2, 1, 32, 32\)"):
        network(images((1, 32, 32)))
    with pytest.raises(UserError, match="takes images"):
        network(torch.zeros(3, 32, 32))


def test_num_classes_is_checked():
    with pytest.raises(UserError, match="num_classes must be"):
        build_network("conv", 0, (3, 32, 32))


def test_importing_the_factory_does_not_import_the_libraries():
    code = "import sys, lightning_dd.models; print(sorted({'timm', 'torchvision'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"
