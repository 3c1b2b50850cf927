"""Where a network keeps its last spatial features, and how to lay them out on a grid, whatever its family."""

import math
from difflib import get_close_matches
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_dd.models.interface import Network
from lightning_dd.utils.errors import UserError

_MOST_EXTRA_TOKENS = 16
_FOUND: "WeakKeyDictionary[Network, dict[tuple[Any, ...], str]]" = WeakKeyDictionary()


def find_layer(network: Network, images: Tensor, attention: bool = False, shallow: bool = False) -> str:
    """Return the name of the module whose output a class-activation map of this network is made of.

    One image is run through the network and the modules are watched, so no family has to be known by name:

    * convolutional networks, and transformers that end in a map (Swin): the last output ``(N, C, h, w)`` or
      ``(N, h, w, C)`` with more than one cell;
    * transformers that end in tokens: what enters the last attention, in most the output of the last block's first
      norm. Later tokens would not do: a head that reads the class token leaves them without any gradient;
    * networks of tokens without attention (mixers): the last tokens.

    The shallower map is the last one of a finer grid, before what halves it for the last time. Where all have one grid
    (transformers, mixers), it is the one in the middle of the depth.

    The answer is remembered per network and image shape.

    Args:
        network: in inference mode.
        images: ``(N, C, H, W)`` as the network takes them; only the shape, type and device matter.
        attention: ask for the module that returns the last attention matrix instead.
        shallow: ask for a shallower one of the same kind.

    Raises:
        UserError: the network has no such module.
    """
    key = (attention, shallow, tuple(images.shape[1:]))
    known = _FOUND.setdefault(network, {})
    if key not in known:
        trace = _Trace(network, torch.zeros_like(images[:1]))
        known[key] = trace.layer("attention" if attention else trace.map_kind(), shallow)
    return known[key]


def check_layer(network: Network, layer: str) -> nn.Module:
    """Return the module of that name.

    Raises:
        UserError: there is none.
    """
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if not layer or layer not in modules:
        close = get_close_matches(str(layer), [name for name in modules if name], n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"unknown layer '{layer}' of architecture {title(network)}{hint}")
    return modules[layer]


def as_map(activation: Tensor, frame: tuple[int, int]) -> Tensor | None:
    """Return an activation as ``(N, C, h, w)``, or None if it is no map with more than one cell.

    Args:
        activation: ``(N, C, h, w)``, ``(N, h, w, C)`` or tokens ``(N, T, C)``; tokens before the grid (class token,
            registers) are dropped.
        frame: ``(height, width)`` in pixels of the image as the network takes it, padding included. It tells the
            two forms of a map apart, and the shape of a grid of tokens.
    """
    if activation.ndim == 3:
        grid = token_grid(activation.shape[1], frame)
        if grid is None:
            return None
        return activation[:, -math.prod(grid) :].transpose(1, 2).reshape(len(activation), -1, *grid)
    if activation.ndim != 4:
        return None
    _, a, b, c = activation.shape
    if _fits((b, c), frame):
        return activation
    return activation.permute(0, 3, 1, 2) if _fits((a, b), frame) else None


def token_grid(tokens: int, frame: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid ``(h, w)`` that so many tokens cover, the largest that fits, or None.

    Example:
        >>> token_grid(65, (32, 32)), token_grid(33, (32, 64)), token_grid(1, (32, 32))
        ((8, 8), (4, 8), None)
    """
    height, width = frame
    if height == width:
        grid = (math.isqrt(tokens), math.isqrt(tokens))
    else:
        patches = (patch for patch in range(1, min(frame) + 1) if height % patch == 0 == width % patch)
        grids = ((height // patch, width // patch) for patch in patches)
        grid = next((grid for grid in grids if math.prod(grid) <= tokens), (0, 0))
    usable = math.prod(grid) > 1 and tokens - math.prod(grid) <= _MOST_EXTRA_TOKENS
    return grid if usable else None


def frame_of(network: Network, images: Tensor) -> tuple[int, int]:
    """Return ``(height, width)`` of the images after the network's own padding."""
    pad = getattr(network, "pad", None)
    shape = pad(images[:1]).shape if callable(pad) else images.shape
    return int(shape[-2]), int(shape[-1])


def title(network: nn.Module) -> str:
    """Return what to call a network in an error message."""
    return type(getattr(network, "trunk", network) if type(network).__name__ == "LibraryNetwork" else network).__name__


def _fits(grid: tuple[int, int], frame: tuple[int, int]) -> bool:
    """Tell whether a grid has more than one cell, no more than pixels, and the shape of the image."""
    (rows, columns), (height, width) = grid, frame
    if rows * columns <= 1 or rows > height or columns > width:
        return False
    # Odd sides are rounded on the way, each halving by at most one cell.
    return abs(rows - columns * height / width) <= (0 if height == width else 1)


class _Trace:
    """The modules that returned a map, tokens or an attention matrix last, when one image runs through a network."""

    def __init__(self, network: Network, image: Tensor) -> None:
        self.network, self.frame = network, frame_of(network, image)
        self.seen: dict[str, dict[str, tuple[int, int]]] = {}  # by kind and module, in order: its number, its cells
        self.made_by: dict[int, tuple[str, Tensor]] = {}  # by id; the tensor is kept so that ids stay unique
        self.noted, self.tokens_entering = 0, 0  # the latter of the attention now running
        modules = {name: module for name, module in network.named_modules() if name}
        # The innermost modules that have heads are attention layers, and not the blocks around them.
        headed = [name for name, module in modules.items() if isinstance(getattr(module, "num_heads", None), int)]
        attentions = {name for name in headed if not any(other.startswith(f"{name}.") for other in headed)}
        self.inside = tuple(f"{name}." for name in attentions)
        handles = [
            module.register_forward_pre_hook(self._note_input)
            if name in attentions
            else module.register_forward_hook(partial(self._note_output, name))
            for name, module in modules.items()
        ]
        try:
            with torch.no_grad():
                network(image)
        finally:
            for handle in handles:
                handle.remove()

    def map_kind(self) -> str:
        """Return in what form the last map came; refuse a network without one."""
        latest = {kind: max(seen.values())[0] for kind, seen in self.seen.items() if kind != "attention"}
        if not latest:
            raise UserError(
                f"architecture {title(self.network)} has no spatial map of more than one cell, "
                "so it has no class-activation map"
            )
        if latest.get("attended", 0) > latest.get("map", 0):
            return "attended"
        return max(latest.keys() - {"attended"}, key=latest.__getitem__)

    def layer(self, kind: str, shallow: bool) -> str:
        """Return the module that made the last output of a kind, or a shallower one; refuse a network without it."""
        if kind not in self.seen:
            raise UserError(
                f"architecture {title(self.network)} has no attention over the whole image that can be read: "
                "cam must be gradcam"
            )
        names, cells = list(self.seen[kind]), [cells for _, cells in self.seen[kind].values()]
        if not shallow:
            return names[-1]
        if finer := [name for name, count in zip(names, cells, strict=True) if count > cells[-1]]:
            return finer[-1]
        blocks = [name for name in names if name.rpartition(".")[2].isdigit()] or names  # not what is inside of them
        return blocks[(len(blocks) - 1) // 2]

    def _note(self, kind: str, name: str, cells: int) -> None:
        seen = self.seen.setdefault(kind, {})
        seen.pop(name, None)  # a module that is used again made what it returned last
        self.noted += 1
        seen[name] = (self.noted, cells)

    def _note_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note whose output enters attention."""
        entering = args[0] if args else None
        self.tokens_entering = 0
        if isinstance(entering, Tensor) and entering.ndim == 3 and (cells := self._cells(entering)):
            self.tokens_entering = entering.shape[1]
            if maker := self.made_by.get(id(entering)):
                self._note("attended", maker[0], cells)

    def _note_output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note an output that is a map, or an attention matrix."""
        if not isinstance(output, Tensor):
            return
        if not name.startswith(self.inside):
            self.made_by[id(output)] = (name, output)
            if cells := self._cells(output):
                self._note("map" if output.ndim == 4 else "tokens", name, cells)
        # Windows make the batch larger, and attention between channels has no side of the tokens' length.
        elif name.endswith(".attn_drop") and output.ndim == 4 and output.shape[::3] == (1, self.tokens_entering):
            self._note("attention", name, self.tokens_entering)

    def _cells(self, output: Tensor) -> int:
        """Return how many cells the map has that an output is; 0 if it is none."""
        found = as_map(output, self.frame) if output.shape[0] == 1 else None
        return 0 if found is None else math.prod(found.shape[2:])
