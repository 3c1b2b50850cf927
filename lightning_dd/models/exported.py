"""A generator of the user's own: a TorchScript program in a file."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dd.utils.errors import UserError
from lightning_dd.utils.seeding import make_generator

_RANGE_SLACK = 1e-3


class ExportedGenerator(nn.Module):
    """A TorchScript file that maps latents ``(n, d)`` float32 and classes ``(n,)`` int64 to images in [0, 1].

    TorchScript is read without Python's pickle, and so without running Python; ``torch.export``'s ``.pt2`` is not
    accepted because torch unpickles parts of it. A program is a program all the same: use files you trust. Its
    weights are frozen and it runs in inference mode. To write one, wrap what you have and trace it::

        class Mine(torch.nn.Module):
            def forward(self, z, classes):  # your generator, whatever it needs, and its range moved to [0, 1]
                return (my_generator(z, torch.nn.functional.one_hot(classes, 10)) + 1) / 2

        torch.jit.trace(Mine().eval(), (torch.randn(2, 128), torch.zeros(2, dtype=torch.long))).save("mine.pt")

    The program is not in a checkpoint, only its hash: it is read from its file again.

    Args:
        path: the file.
        num_classes: classes are below this.
        image_shape: ``(C, H, W)`` the images must have.
        latent_size: d.

    Attributes:
        digest: ``(16,)`` uint8 buffer, the file's hash.

    Raises:
        UserError: the file is missing or no TorchScript, or what it makes of two random latents has another shape, is
            not finite, outside [0, 1] or random.
    """

    digest: Tensor

    def __init__(self, path: Path | str, num_classes: int, image_shape: tuple[int, int, int], latent_size: int) -> None:
        super().__init__()
        self.path, self.image_shape, self.latent_size = Path(path), image_shape, latent_size
        program = _read(self.path).eval()
        for parameter in program.parameters():
            parameter.requires_grad_(False)
        self._program = (program,)  # in a tuple: a registered module would enter the checkpoint
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
        self._try(torch.tensor([0, num_classes - 1]))

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        """Map latents ``(n, latent_size)`` and classes ``(n,)`` to images ``(n, C, H, W)`` in [0, 1]."""
        images: Tensor = self._program[0].to(z.device)(z, classes)
        return images

    def _try(self, classes: Tensor) -> None:
        z = torch.randn(len(classes), self.latent_size, generator=make_generator(0, "try"))
        try:
            with torch.no_grad():
                images, again = self(z, classes), self(z, classes)
        except Exception as error:  # whatever a program of somebody else's raises
            why = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"generator '{self.path}' cannot run on latents of shape {tuple(z.shape)} and classes of shape (2,): "
                f"{why[-1]} (latents: latent_size sets the first)"
            ) from None
        expected = (len(classes), *self.image_shape)
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if got != expected:
            raise UserError(f"generator '{self.path}' must give images of shape {expected} for this data, got {got}")
        if not bool(torch.isfinite(images).all()):
            raise UserError(f"generator '{self.path}' gives NaN or infinite values")
        if not torch.equal(images, again):
            raise UserError(f"generator '{self.path}' gives other images for the same latents: switch its noise off")
        low, high = float(images.min()), float(images.max())
        if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
            raise UserError(f"generator '{self.path}' must give pixels in [0, 1], got [{low:.3g}, {high:.3g}]")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuse the state of another file."""
        saved = state_dict.get(f"{prefix}digest")
        if saved is not None and not torch.equal(saved.cpu(), self.digest.cpu()):
            raise UserError(f"generator '{self.path}' is not the file the checkpoint was made with")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"generator '{path}': no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch prefers .pt2, which it unpickles
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises many kinds, by how the file is broken
        raise UserError(
            f"generator '{path}': not a TorchScript file, or truncated ({type(error).__name__}); write it with "
            "torch.jit.trace(...).save(path)"
        ) from None
