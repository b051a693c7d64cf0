"""The operators' kernels for CUDA, in Triton; nothing of it is loaded before one is called.

They take float32 and half precision of one type, and up to 64 neighbors; all else, and a machine
without Triton, goes through the operator's PyTorch path, and so do gradients where
`torch.use_deterministic_algorithms` is on: they are sums in no fixed order.
"""

import torch
from torch import Tensor

from ops.maps.aggregate import (
    aggregate_backward_op,
    aggregate_backward_torch,
    aggregate_op,
    aggregate_torch,
)
from ops.maps.attend import attend_backward_op, attend_backward_torch, attend_op, attend_torch
from ops.maps.search import search_op, search_torch
from ops.triton.launch import kernels


def _one_type(*tensors: Tensor | None) -> bool:
    return len({t.dtype for t in tensors if t is not None}) == 1


def _all_there(*tensors: Tensor) -> bool:
    return all(t.numel() for t in tensors)


@search_op.register_kernel("cuda")
def search(queries, keys, K, metric, self_index, exclude_self, candidates, max_bytes):
    """See `ops.maps.search.nearest_neighbors`."""
    args = (queries, keys, K, metric, self_index, exclude_self, candidates)
    whole = _all_there(self_index if queries is None else queries, keys)
    native = kernels("search", queries, keys) if whole and _one_type(queries, keys) else None
    if native is None or native.MOST < K:
        return search_torch(*args, max_bytes)
    return native.search(*args)


@aggregate_op.register_kernel("cuda")
def aggregate(x, indices, weight, bias):
    """See `ops.maps.aggregate.aggregate_neighbors`."""
    whole = _all_there(x, indices, weight) and _one_type(x, weight, bias)
    native = kernels("aggregate", x, weight) if whole else None
    return (native.aggregate if native else aggregate_torch)(x, indices, weight, bias)


@aggregate_backward_op.register_kernel("cuda")
def aggregate_backward(gy, x, indices, weight, need_x, need_weight):
    """See `ops.maps.aggregate.aggregate_backward_torch`."""
    whole = _all_there(x, indices, weight) and _one_type(gy, x, weight)
    any_order = not torch.are_deterministic_algorithms_enabled()
    native = kernels("aggregate", gy, x, weight) if whole and any_order else None
    run = native.aggregate_backward if native else aggregate_backward_torch
    return run(gy, x, indices, weight, need_x, need_weight)


def _attends(K: int, *tensors: Tensor | None):
    """Kernels of attention for these tensors, if there are any."""
    float32 = all(t is None or t.dtype == torch.float32 for t in tensors)
    native = kernels("attend", *tensors) if float32 and _all_there(*tensors[:3]) else None
    return None if native is None or native.MOST < K else native


@attend_op.register_kernel("cuda")
def attend(q, k, v, indices, weight, bias, euclidean, fixed, self_score, keep):
    """See `ops.maps.attend.attend_neighbors`."""
    native = _attends(indices.shape[-1], q, k, v, weight, bias, keep)
    run = native.attend if native else attend_torch
    return run(q, k, v, indices, weight, bias, euclidean, fixed, self_score, keep)


@attend_backward_op.register_kernel("cuda")
def attend_backward(gy, attention, q, k, v, indices, weight, euclidean, fixed, keep):
    """See `ops.maps.attend.attend_backward_torch`."""
    tensors = (gy, attention, q, k, v)
    any_order = not torch.are_deterministic_algorithms_enabled()
    native = _attends(indices.shape[-1], *tensors, weight, keep) if any_order else None
    run = native.attend_backward if native else attend_backward_torch
    return run(*tensors, indices, weight, euclidean, fixed, keep)
