"""What operators do under autocast: their arguments are cast, their own products are not."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["match_autocast", "without_autocast"]


def without_autocast(function: Callable) -> Callable:
    """Let an operator's own products run in the types it was given."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device_type=device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def match_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as torch does for a convolution under autocast (float64 stays)."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
