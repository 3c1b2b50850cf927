"""Augmentations and whitening: images through the same numbers, and distributions."""

import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

from lightning_dd.augment.crops import draw_crops
from lightning_dd.augment.siamese import TRANSFORMS
from lightning_dd.data.preprocess import fit_preprocessing
from lightning_dd.distilled.views import draw_views
from parity.methods import drawn
from parity.official import SCIPY, Line, checkout, relative, watched

_CROPS = 4000
_BOXES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mean area": lambda left, top, right, bottom: (right - left) * (bottom - top) / 32**2,
    "share that is empty": lambda left, top, right, bottom: (right <= left) | (bottom <= top),
    "mean left": lambda left, top, right, bottom: left / 32,
}
"""What is compared of boxes in images of 32 pixels."""


def random_pixels(count: int, side: int = 8) -> Tensor:
    """Return smooth random pixels in [0, 1], ``(count, 3, side, side)``."""
    low = torch.rand(count, 3, side // 2, side // 2, generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.interpolate(low, size=side, mode="bilinear")


def dsa_family(folder: Path) -> list[Line]:
    """Every operation of DSA's family as students use it, on the same images with the same numbers."""
    images, lines = random_pixels(6, 32) - 0.5, []
    with checkout(folder, SCIPY, "kornia"):
        utils = import_module("utils")
        for name in TRANSFORMS:
            with watched(fixed=True):
                theirs = utils.DiffAugment(images, name, seed=-1, param=utils.ParamDiffAug())
            difference = relative(drawn(name, images), theirs)
            lines.append(Line("augmentations", f"DSA's {name}: images", f"{folder.name}/utils.py", difference))
    return lines


def random_resized_crop(folder: Path) -> list[Line]:
    """Areas, widths and places of torchvision's random resized crop, which SRe2L and RDED call."""
    from torchvision.transforms import RandomResizedCrop

    lines = []
    for least, side in ((0.08, 64), (0.5, 32)):
        image, ratio = torch.empty(3, side, side), (3 / 4, 4 / 3)
        torch.manual_seed(0)
        found = [RandomResizedCrop.get_params(image, (least, 1.0), ratio) for _ in range(_CROPS)]
        top, left, height, width = torch.tensor(found).T / side
        ours = draw_crops(_CROPS, (side, side), least, torch.Generator().manual_seed(0))
        theirs = torch.stack([left, top, width, height], 1)
        official = "torchvision RandomResizedCrop"
        areas = [(crops[:, 2] * crops[:, 3]) for crops in (ours, theirs)]
        for what, (own, their) in {
            f"crops from {least}, {side} px: mean area": tuple(area.mean() for area in areas),
            f"crops from {least}, {side} px: share above 0.9": tuple((area > 0.9).float().mean() for area in areas),
            f"crops from {least}, {side} px: mean left": (ours[:, 0].mean(), theirs[:, 0].mean()),
        }.items():
            # 4,000 draws a side: three standard errors of a difference are about .02.
            lines.append(Line("augmentations", f"{what} (absolute)", official, abs(float(own - their)), 0.02))
    return lines


def cutmix(folder: Path) -> list[Line]:
    """The boxes of RDED's CutMix, which are those of SRe2L."""
    images, ours = torch.empty(1, 3, 32, 32), draw_views(_CROPS, (3, 32, 32), 1, 2, torch.Generator().manual_seed(0))
    with checkout(folder):
        utils, random = import_module("validation.utils"), np.random.RandomState(0)
        np.random.seed(0)
        theirs = torch.tensor([utils.rand_bbox(images.size(), random.beta(1.0, 1.0)) for _ in range(_CROPS)])
    lines = []
    for what, of in _BOXES.items():
        own, their = (float(of(*boxes.reshape(-1, 4).float().T).float().mean()) for boxes in (ours.pastes, theirs))
        # 4,000 draws a side: three standard errors of a difference are about .02.
        name = f"CutMix boxes: {what} (absolute)"
        lines.append(Line("augmentations", name, "RDED/validation/utils.py", abs(own - their), 0.02))
    return lines


def kornia_zca(folder: Path) -> list[Line]:
    """MTT's whitening by kornia, with its regulariser."""
    pixels = random_pixels(300)
    # The file alone: importing the package would need its compiled parts.
    cast = MagicMock(_torch_svd_cast=torch.linalg.svd)
    with checkout(folder, "kornia.core", kornia__core__utils=cast):
        zca = _from_file(folder / "kornia" / "enhance" / "zca.py").ZCAWhitening(eps=0.1, compute_inv=True)
        theirs = zca.fit(pixels)(pixels)
        back = zca.inverse_transform(theirs)
    ours = fit_preprocessing("kornia-zca", pixels)
    official = "kornia/kornia/enhance/zca.py"
    return [
        Line("preprocessing", "MTT's ZCA (kornia-zca): images", official, relative(ours(pixels), theirs)),
        Line("preprocessing", "MTT's ZCA (kornia-zca): back to pixels", official, relative(ours.inverse(theirs), back)),
    ]


def frepo_zca(folder: Path) -> list[Line]:
    """FRePo's whitening matrix, from its function with numpy in the place of jax."""
    official, pixels = "FRePo/lib/dataset/ops.py", random_pixels(300)
    mean, std = [0.5, 0.45, 0.4], [0.25, 0.24, 0.26]
    jax: Any = MagicMock(jit=lambda function: function, numpy=np)
    with checkout(folder, "absl", "tensorflow", "tensorflow_datasets", jax=jax, jax__numpy=np):
        ops = _from_file(folder / "lib" / "dataset" / "ops.py")
        rows = ((pixels.permute(0, 2, 3, 1) - torch.tensor(mean)) / torch.tensor(std)).flatten(1).double().numpy()
        centred = rows - rows.mean(0)
        whiten, unwhiten = ops.get_whitening_transform(centred.T @ centred / len(rows), len(rows), zca_reg=0.1)
    theirs = torch.from_numpy(centred @ whiten).view(-1, 8, 8, 3).permute(0, 3, 1, 2).float()
    ours = fit_preprocessing("zca", pixels, mean, std)
    back = torch.from_numpy((centred @ whiten) @ unwhiten + rows.mean(0)).view(-1, 8, 8, 3)
    back = (back * torch.tensor(std) + torch.tensor(mean)).permute(0, 3, 1, 2).float()
    return [
        Line("preprocessing", "FRePo's ZCA (zca): images", official, relative(ours(pixels), theirs)),
        Line("preprocessing", "FRePo's ZCA (zca): back to pixels", official, relative(ours.inverse(theirs), back)),
    ]


@functools.cache
def _from_file(path: Path) -> Any:
    """Import one file of a package without the package."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
