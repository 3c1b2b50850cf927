"""AlexNet in the small-image form that the dataset-distillation literature tests transfer with."""

from typing import cast

from torch import Tensor, nn

from lightning_dd.models.checks import check_count, check_images
from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError

_WIDTHS = (128, 192, 256, 192, 192)
_BASE = _WIDTHS[0]


class AlexNet(Network):
    """Five convolutions, three max pools, one linear layer; no normalisation (the form of DC, arXiv 2006.05929).

    Args:
        in_channels: image channels C.
        num_classes: number of logits.
        image_size: ``(height, width)`` in pixels; a side of 28 is zero-padded to 32 by the first convolution.
        width: channels of the first convolution; the others scale with it (128 gives 128, 192, 256, 192, 192).

    Raises:
        UserError: a setting is out of range, or the image is smaller than 8 pixels.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int], width: int = _BASE) -> None:
        super().__init__()
        self.in_channels = check_count("in_channels", in_channels)
        self.num_classes = check_count("num_classes", num_classes)
        self.width = check_count("width", width)
        self.widths = [max(1, channels * width // _BASE) for channels in _WIDTHS]
        sides = [(32 if side == 28 else check_count("image_size", side)) // 8 for side in image_size]
        if min(sides) == 0:
            raise UserError(f"image_size {image_size[0]}x{image_size[1]} is too small for alexnet: it needs 8 pixels")
        height, breadth = (4 if side == 28 else 2 for side in image_size)
        a, b, c, d, e = self.widths
        self.trunk = nn.Sequential(
            *(nn.Conv2d(in_channels, a, 5, padding=(height, breadth)), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.num_features = e * sides[0] * sides[1]
        self.head = nn.Linear(self.num_features, num_classes)

    def feature_maps(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to the last activation ``(N, widths[-1], h, w)``."""
        check_images(images, self.in_channels)
        return cast(Tensor, self.trunk(images))

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, C, H, W)`` to ``(N, num_features)``: the last activation, flattened.

        Raises:
            UserError: the images have another number of channels than the network.
        """
        return self.feature_maps(images).flatten(1)

    def classify(self, features: Tensor) -> Tensor:
        """Map features ``(N, num_features)`` to logits ``(N, num_classes)``."""
        return cast(Tensor, self.head(features))
