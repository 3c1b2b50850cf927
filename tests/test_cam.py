"""Class-activation maps by hand, against the established library, on every family, and in the second order."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LinearNetwork
from torch import nn

from lightning_dd.losses.cam import attention_map, class_activation_map, normalise_maps
from lightning_dd.losses.cam_layers import as_map, find_layer, token_grid
from lightning_dd.models import Network, build_network
from lightning_dd.models.library import LibraryNetwork
from lightning_dd.utils.errors import UserError

VIT = "vit_tiny_patch16_224:depth=2,embed_dim=24,num_heads=2"
AVERAGED = f"{VIT},class_token=false,global_pool=avg"
SWIN = "swin_tiny_patch4_window7_224:embed_dim=16,depths=[1,1],num_heads=[2,2]"
VGG = "vgg11_bn:width=8"
RESNET = "resnet18:channels=[8,8,16,16]"


def frozen(name, seed=0, shape=(3, 32, 32)):
    return build_network(name, 10, shape, seed=seed).eval().requires_grad_(False)


def random_images(count=4, seed=0, shape=(3, 32, 32), dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class ToyConv(Network):
    """Two channels of a 1x1 convolution, and a head that reads every cell: everything can be computed by hand."""

    def __init__(self, smooth=False):
        super().__init__()
        self.num_classes, self.num_features = 2, 8
        self.body = nn.Conv2d(1, 2, 3 if smooth else 1, padding=int(smooth))
        self.bend = nn.Softplus() if smooth else nn.Identity()
        self.head = nn.Linear(8, 2)
        self.requires_grad_(False).eval()

    def features(self, images):
        return F.avg_pool2d(self.bend(self.body(images)), images.shape[-1] // 2).flatten(1)

    def classify(self, features):
        # With a head that bends, the weights of Grad-CAM depend on the image.
        return self.head(features if isinstance(self.bend, nn.Identity) else features.square())


def test_grad_cam_by_hand():
    network = ToyConv()
    body, head = torch.tensor([2.0, -1.0]), torch.arange(16.0).reshape(2, 2, 2, 2) - 6
    network.body.weight.copy_(body.view(2, 1, 1, 1))
    network.body.bias.zero_()
    network.head.weight.copy_(head.flatten(1))
    images = torch.tensor([[[[1.0, -2.0], [3.0, 0.5]]]]).repeat(2, 1, 1, 1)
    cam = class_activation_map(network, images, torch.tensor([0, 1]))
    for row, label in enumerate((0, 1)):
        alpha = head[label].mean((1, 2))  # class 0: -4.5, -0.5; class 1: 3.5, 7.5
        expected = (alpha[0] * 2 * images[row, 0] + alpha[1] * -images[row, 0]).clamp(min=0)
        torch.testing.assert_close(cam.maps[row], expected)
    assert cam.maps[0].tolist() == [[0.0, 17.0], [0.0, 0.0]]
    torch.testing.assert_close(cam.logits, network(images))


def test_rows_weigh_the_logits_and_indices_are_one_hot_rows():
    network, images = frozen("conv:width=4"), random_images()
    classes = torch.tensor([1, 2, 3, 4])
    by_index = class_activation_map(network, images, classes).maps
    torch.testing.assert_close(by_index, class_activation_map(network, images, F.one_hot(classes, 10).float()).maps)


def test_without_a_class_the_map_is_of_the_predicted_one():
    network, images = frozen("conv:width=4"), random_images()
    predicted = network(images).argmax(1)
    assert torch.equal(
        class_activation_map(network, images, None).maps, class_activation_map(network, images, predicted).maps
    )


def test_divided_by_its_largest_value_a_map_keeps_its_zero():
    raw = torch.tensor([[[1.0, 2.0], [4.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]])
    maps, alive = normalise_maps(raw, (2, 2), "max")
    torch.testing.assert_close(maps[0], raw[0] / 4)
    assert alive.tolist() == [True, False]
    assert not maps[1].any()


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize(
    ("name", "kind", "grid"),
    [
        ("conv:width=8", "gradcam", 4),
        ("convnet:width=8", "auto", 4),
        ("alexnet:width=16", "gradcam", 4),
        (RESNET, "gradcam", 4),
        ("torchvision/resnet18", "gradcam", 4),
        (VGG, "gradcam", 2),
        (VIT, "gradcam", 8),
        (VIT, "attention", 8),
        (f"{VIT},reg_tokens=4", "gradcam", 8),
        (AVERAGED, "gradcam", 8),
        (AVERAGED, "attention", 8),
        (SWIN, "gradcam", 8),
        ("test_convnext", "gradcam", 4),
        ("mobilenetv3_small_050", "gradcam", 4),
        ("pit_ti_224", "gradcam", 4),
    ],
)
def test_every_family_has_a_map_with_gradient_to_the_pixels(name, kind, grid, detached):
    lively = 0
    for seed in range(2):
        network, images = frozen(name, seed), random_images().requires_grad_()
        network.head.weight.mul_(1e4)  # untrained, some libraries start the head near zero
        cam = class_activation_map(network, images, torch.arange(4), kind, detach_weights=detached)
        assert cam.maps.shape == (4, grid, grid)
        assert (cam.maps >= 0).all()
        torch.testing.assert_close(cam.logits, network(images), rtol=1e-4, atol=1e-3)
        maps, alive = normalise_maps(cam.maps, (14, 14))
        gradient = torch.autograd.grad(maps.square().sum(), images)[0]
        assert torch.isfinite(gradient).all()
        moved = gradient.flatten(1).norm(dim=1) > 0
        assert not (moved & ~alive).any()  # dead maps have no gradient
        lively += int((moved & alive).sum())
    assert lively >= 3
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["conv:width=8", RESNET, VIT, SWIN])
def test_without_image_gradients_only_the_last_layers_are_differentiated(name):
    network, images = frozen(name), random_images()
    plain = class_activation_map(network, images, torch.arange(4))
    assert not plain.maps.requires_grad
    assert not plain.logits.requires_grad
    graphed = class_activation_map(network, images.requires_grad_(), torch.arange(4))
    torch.testing.assert_close(plain.maps, graphed.maps.detach(), rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(class_activation_map(network, images.detach(), torch.arange(4)).maps, plain.maps)


def test_torchvision_transformers_have_token_maps_and_no_readable_attention():
    from torchvision.models import VisionTransformer

    trunk = VisionTransformer(32, 4, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48)
    trunk.heads = nn.Identity()
    network = LibraryNetwork(trunk, nn.Linear(24, 10), 3, (32, 32)).eval().requires_grad_(False)
    images = random_images().requires_grad_()
    assert find_layer(network, images) == "trunk.encoder.layers.encoder_layer_1.ln_1"
    cam = class_activation_map(network, images, torch.arange(4), detach_weights=False)
    assert cam.maps.shape == (4, 8, 8)
    assert torch.autograd.grad(cam.maps.sum(), images)[0].abs().max() > 0
    with pytest.raises(UserError, match=r"VisionTransformer has no attention .* that can be read"):
        class_activation_map(network, images, torch.arange(4), kind="attention")


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [("convnet:width=8", "norms.1", 16), ("alexnet:width=16", "trunk.11", 8), (RESNET, "trunk.layer3", 8),
     (VIT.replace("depth=2", "depth=4"), "trunk.blocks.1.norm1", 8),
     ("mixer_s32_224:patch_size=4,num_blocks=4,embed_dim=24", "trunk.blocks.1", 8)],
)  # fmt: skip
def test_a_shallower_map_is_of_a_finer_grid_or_of_half_the_depth(name, layer, side):
    network, images = frozen(name), random_images()
    network.head.weight.normal_(generator=torch.Generator().manual_seed(0))  # a mixer's starts from zeros
    assert find_layer(network, images, shallow=True) == layer != find_layer(network, images)
    cam = class_activation_map(network, images, torch.arange(4), layer=layer)
    assert cam.maps.shape == (4, side, side)
    assert cam.maps.any()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("conv:width=8", "convs.2"), ("alexnet:width=16", "trunk"), (RESNET, None), (RESNET, "trunk.layer3"), (VGG, None),
     ("test_convnext", None), ("densenet121:growth_rate=8,block_config=[2,2,2,2]", None)],
)  # fmt: skip
def test_agrees_with_the_established_library(name, layer):
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network, images = frozen(name), random_images(6, seed=1)
    network.head.weight.mul_(1e4)  # its guard against 0/0 is 1e-7, to be far below the maps
    target = network.get_submodule(layer or find_layer(network, images))
    classes = torch.arange(6)
    with GradCAM(network, [target]) as library:
        theirs = library(images.clone().requires_grad_(), [ClassifierOutputTarget(int(c)) for c in classes])
    raw = class_activation_map(network, images, classes, layer=layer).maps
    scaled, alive = normalise_maps(raw, tuple(raw.shape[1:]))  # theirs scales, resizes, and scales again
    ours, _ = normalise_maps(scaled, (32, 32))
    assert alive.sum() >= 2
    np.testing.assert_allclose(ours[alive].numpy(), theirs[alive.numpy()], atol=1e-4)


def test_exact_weights_are_the_true_derivative_and_detached_ones_are_not():
    torch.manual_seed(0)
    network = ToyConv(smooth=True).double()
    network.head.weight.abs_()  # positive weights keep the ReLU's kink away
    images, weights = random_images(2, shape=(1, 4, 4), dtype=torch.float64), random_images(2, 1, (6, 6)).double()

    def loss(pixels, detached=False):
        cam = class_activation_map(network, pixels, torch.tensor([0, 1]), layer="bend", detach_weights=detached)
        return (normalise_maps(cam.maps, (6, 6))[0] * weights).sum()

    images.requires_grad_()
    assert torch.autograd.gradcheck(loss, images)
    exact = torch.autograd.grad(loss(images), images)[0]
    cheap = torch.autograd.grad(loss(images, detached=True), images)[0]
    assert (exact - cheap).abs().max() > 1e-3 * exact.abs().max()


def test_attention_map_by_hand():
    attention = torch.full((1, 2, 5, 5), 0.2)
    gradient = torch.zeros(1, 2, 5, 5)
    gradient[0, 0, 0] = torch.tensor([9.0, 1, -2, 3, 0])  # only the class token is read
    gradient[0, 1, 0, 4] = 5
    expected = torch.tensor([[[0.1, 0.0], [0.3, 0.5]]])
    torch.testing.assert_close(attention_map(attention, gradient, (8, 8)), expected)


def test_normalised_maps_reach_from_zero_to_one_on_any_grid():
    raw = random_images(3, shape=(16, 16)).relu()
    for size in ((4, 4), (14, 14), (16, 16), (20, 9)):
        maps, alive = normalise_maps(raw * 1e3, size)
        assert maps.shape == (3, *size)
        assert alive.all()
        torch.testing.assert_close(maps.amin((1, 2)), torch.zeros(3))
        torch.testing.assert_close(maps.amax((1, 2)), torch.ones(3))


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-9, 1e30, float("inf"), float("nan")])
def test_flat_maps_are_dead_zero_and_without_gradient(value):
    raw = torch.full((2, 3, 3), value)
    raw[1] = torch.arange(9.0).reshape(3, 3)
    raw.requires_grad_()
    maps, alive = normalise_maps(raw, (5, 5))
    assert alive.tolist() == [False, True]
    assert (maps[0] == 0).all()
    maps.square().sum().backward()
    assert (raw.grad[0] == 0).all()
    assert torch.isfinite(raw.grad).all()
    assert raw.grad[1].abs().max() > 0


def test_maps_are_float32_under_autocast():
    network, images = frozen("conv:width=8"), random_images().requires_grad_()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            cam = class_activation_map(network, images, torch.arange(4))
            maps, _ = normalise_maps(cam.maps, (14, 14))
        assert cam.maps.dtype == maps.dtype == torch.float32
        # float16 is switched off: its inner gradients would underflow
        assert cam.logits.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_layouts_are_told_apart_and_extra_tokens_dropped():
    assert as_map(torch.zeros(1, 5, 4, 4), (32, 32)).shape == (1, 5, 4, 4)
    assert as_map(torch.zeros(1, 4, 4, 96), (32, 32)).shape == (1, 96, 4, 4)
    assert as_map(torch.zeros(1, 4, 8, 96), (32, 64)).shape == (1, 96, 4, 8)
    assert as_map(torch.zeros(1, 7, 4, 8), (32, 64)).shape == (1, 7, 4, 8)
    tokens = torch.arange(5.0).view(1, 5, 1)
    assert as_map(tokens, (8, 8))[0, 0].tolist() == [[1, 2], [3, 4]]
    assert as_map(torch.zeros(1, 5, 1, 1), (32, 32)) is None
    assert token_grid(197, (224, 224)) == (14, 14)


def test_hooks_are_gone_afterwards_also_after_an_error():
    network = frozen(RESNET)
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())  # noqa: E731
    class_activation_map(network, random_images(), torch.arange(4))
    assert count() == 0
    for wrong in ({"images": random_images(shape=(1, 32, 32))}, {"layer": "trunk.global_pool"}):
        with pytest.raises(UserError):
            class_activation_map(network, **({"images": random_images(), "scores_for": torch.arange(4)} | wrong))
        assert count() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "trunk.layer5"}, r"unknown layer 'trunk.layer5' of architecture ResNet; did you mean trunk.layer\d"),
        ({"layer": "head"}, r"layer 'head' of architecture ResNet has shape \(4, 10\): no spatial map"),
        ({"kind": "attention"}, r"ResNet has no attention over the whole image"),
        ({"kind": "gradcamm"}, r"unknown cam 'gradcamm'; did you mean 'gradcam'"),
        ({"scores_for": torch.zeros(3, 10)}, r"scores_for must be class indices \(4,\) or rows \(4, 10\)"),
        ({"scores_for": torch.zeros(4)}, r"scores_for must be class indices"),
        ({"network": LinearNetwork(3072).eval()}, r"LinearNetwork has no spatial map of more than one cell"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    arguments = {"network": frozen(RESNET), "images": random_images(), "scores_for": torch.arange(4)}
    with pytest.raises(UserError, match=message) as caught:
        class_activation_map(**(arguments | changes))
    assert "\n" not in str(caught.value)
