"""Whether tensors, anywhere in nested containers, hold finite numbers only."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries, lists and tuples."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += [*item.keys(), *item.values()] if isinstance(item, dict) else item


def all_finite(content: Any) -> bool:
    """Tell whether no tensor in nested containers holds NaN or infinite numbers; a device is waited for once.

    Example:
        >>> all_finite([torch.ones(2), {"a": torch.tensor(3)}]), all_finite((torch.tensor([0.0, float("nan")]),))
        (True, False)
    """
    by_device = defaultdict(list)
    for tensor in tensors_in(content):
        if tensor.is_floating_point():
            by_device[tensor.device].append(tensor.detach().isfinite().all())
    return all(bool(torch.stack(found).all()) for found in by_device.values())
