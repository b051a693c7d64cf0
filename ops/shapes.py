"""Building and running a network by shapes alone, in no time.

PyTorch's own kernels for the meta device do the same, but loading them takes as long as importing
torch: too long for refusing a command line.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["rehearse", "without_values"]

# What sets values in place and keeps the shape.
INITIALIZERS = {"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"}
INITIALIZERS |= {"abs_", "clamp_"}


class _ShapesOnly(TorchFunctionMode):
    """Answer the usual functions of networks by the shape of their result, on the meta device.

    What is not in the table is left to PyTorch's own kernels.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        rule = _SHAPE_RULES.get(getattr(function, "__name__", ""))
        if rule is None or not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return function(*args, **kwargs)
        shape = rule(*args, **kwargs)
        return torch.empty(shape, device="meta", dtype=args[0].dtype)


def _same(x: Tensor, *_: Any, **__: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def _broadcast(x: Tensor, y: Any, **_: Any) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(x.shape, y.shape if isinstance(y, Tensor) else ()))


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    *_: Any,
    **__: Any,
) -> tuple[int, ...]:
    pairs = [(v,) * (x.dim() - 2) if isinstance(v, int) else v for v in (stride, padding)]
    sides = [
        (side + 2 * pad - kernel) // step + 1
        for side, kernel, step, pad in zip(x.shape[2:], weight.shape[2:], *pairs, strict=True)
    ]
    return (x.shape[0], weight.shape[0], *sides)


def _max_pool(x: Tensor, kernel_size: int, stride: int | None = None, *_: Any, **__: Any):
    kernel, stride = (
        v[0] if isinstance(v, tuple) else v for v in (kernel_size, stride or kernel_size)
    )
    return (*x.shape[:2], *((side - kernel) // stride + 1 for side in x.shape[2:]))


def _adaptive_pool(x: Tensor, output_size: Any) -> tuple[int, ...]:
    pair = (output_size, output_size) if isinstance(output_size, int) else output_size
    return (*x.shape[:2], *pair)


_SHAPE_RULES: dict[str, Callable[..., tuple[int, ...]]] = {
    "relu": _same,
    "batch_norm": _same,
    "add": _broadcast,
    "__add__": _broadcast,
    "conv1d": _conv,
    "conv2d": _conv,
    "linear": lambda x, weight, bias=None: (*x.shape[:-1], weight.shape[0]),
    "max_pool1d": _max_pool,
    "max_pool2d": _max_pool,
    "boolean_dispatch": _max_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "pixel_shuffle": lambda x, r: (x.shape[0], x.shape[1] // r**2, x.shape[2] * r, x.shape[3] * r),
    "pixel_unshuffle": lambda x, r: (
        *(x.shape[0], x.shape[1] * r**2),
        *(x.shape[2] // r, x.shape[3] // r),
    ),
}


class _Unfilled(TorchFunctionMode):
    """Leave tensors of the meta device, which have no values, as they are."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in INITIALIZERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Within it, networks are built on the meta device: shapes alone."""
    with torch.device("meta"), _Unfilled():
        yield


def rehearse(model: nn.Module, shape: Sequence[int]) -> None:
    """Run a network on the meta device, by shapes alone: what cannot work fails here, for free.

    Args:
        model: The network, built under :func:`without_values`.
        shape: Shape of one sample.

    Raises:
        ValueError: What the layers say of shapes that cannot work.
    """
    with torch.no_grad(), _ShapesOnly():
        model.eval()(torch.empty(1, *shape, device="meta"))
