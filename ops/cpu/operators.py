"""The compiled kernels of the operators, which register themselves for the CPU.

They take float32 (and half precision where the operator computes in float32); all else, and a
machine without a compiler, goes through the operator's PyTorch path.
"""

import torch
from torch import Tensor

from ops import METRICS
from ops.cpu import build
from ops.maps.aggregate import (
    aggregate_backward_op,
    aggregate_backward_torch,
    aggregate_op,
    aggregate_torch,
)
from ops.maps.attend import attend_backward_op, attend_backward_torch, attend_op, attend_torch
from ops.maps.reduce import (
    max_rows_backward_op,
    max_rows_backward_torch,
    max_rows_op,
    max_rows_torch,
    sum_rows_backward_op,
    sum_rows_backward_torch,
    sum_rows_op,
    sum_rows_torch,
)
from ops.maps.search import prepare, search_op, search_torch
from ops.rows import contiguous, index_step
from ops.topk import topk_rows_op, topk_rows_torch


@topk_rows_op.register_kernel("cpu")
def _topk_rows(scores: Tensor, K: int, largest: bool) -> tuple[Tensor, Tensor]:
    native = build.kernel("nn_topk", scores)
    if native is None:
        return topk_rows_torch(scores, K, largest)
    n = scores.shape[-1]
    rows = scores.reshape(-1, n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    values = scores.new_empty(*scores.shape[:-1], K)
    indices = scores.new_empty(values.shape, dtype=torch.int64)
    if len(rows):
        native(rows, len(rows), n, rows.stride(0), K, 1.0 if largest else -1.0, values, indices)
    return values, indices


@search_op.register_kernel("cpu")
def _search(queries, keys, K, metric, self_index, exclude_self, candidates, max_bytes):
    b, n, c = keys.shape
    m = self_index.shape[-1] if queries is None else queries.shape[1]
    native = None if m == 0 or keys.dtype == torch.float64 else build.kernel("nn_search")
    args = (self_index, exclude_self, candidates)
    if native is None:
        return search_torch(queries, keys, K, metric, *args, max_bytes)
    queries, keys, self_index, candidates = prepare(queries, keys, K, *args)
    values = keys.new_empty(b, m, K)
    indices = keys.new_empty(b, m, K, dtype=torch.int64)
    native(
        *(queries, keys, b, m, n, c, K, METRICS.index(metric)),
        *(self_index, index_step(self_index, 1), int(exclude_self)),
        *(candidates, index_step(candidates, 1), n if candidates is None else candidates.shape[-1]),
        *(values, indices),
    )
    return values, indices


def _fused(name: str, c: int, o: int, K: int, *tensors: Tensor | None):
    """A kernel where its register tiles beat a library's matrix product on gathered rows."""
    return build.kernel(name, *tensors) if K * c * o <= 9 * 256 * 256 else None


@aggregate_op.register_kernel("cpu")
def _aggregate(x, indices, weight, bias):
    (b, n, c), (m, K), o = x.shape, indices.shape[-2:], weight.shape[0]
    native = _fused("nn_aggregate", c, o, K, x, indices, weight, bias) if m else None
    if native is None:
        return aggregate_torch(x, indices, weight, bias)
    x, indices, weight, bias = contiguous(x, indices, weight, bias)
    y = x.new_empty(b, m, o)
    native(x, indices, index_step(indices, 2), weight, bias, y, b, m, n, c, o, K)
    return y


@aggregate_backward_op.register_kernel("cpu")
def _aggregate_backward(gy, x, indices, weight, need_x, need_weight):
    (b, n, c), (m, K), o = x.shape, indices.shape[-2:], weight.shape[0]
    tensors = (x, indices, weight, gy)
    by_input = _fused("nn_aggregate_grad_input", c, o, K, *tensors) if m else None
    by_weight = _fused("nn_aggregate_grad_weight", c, o, K, *tensors) if m else None
    if by_input is None or by_weight is None:
        return aggregate_backward_torch(gy, x, indices, weight, need_x, need_weight)
    gy, x, indices, weight = contiguous(gy, x, indices, weight)
    step, sizes = index_step(indices, 2), (b, m, n, c, o, K)
    gx = x.new_zeros((b, n, c) if need_x else 0)
    gw = weight.new_empty((o, c, K) if need_weight else 0)
    if need_x:
        by_input(gy, indices, step, weight, gx, *sizes)
    if need_weight:
        by_weight(gy, x, indices, step, gw, *sizes)
    return gx, gw


@attend_op.register_kernel("cpu")
def _attend(q, k, v, indices, weight, bias, euclidean, fixed, self_score, keep):
    (b, n, c), (m, K) = q.shape, indices.shape[-2:]
    native = build.kernel("nn_attend", q, k, v, indices, weight, bias, keep) if m else None
    if native is None:
        return attend_torch(q, k, v, indices, weight, bias, euclidean, fixed, self_score, keep)
    q, k, v, indices, weight, bias, keep = contiguous(q, k, v, indices, weight.T, bias, keep)
    y, attention = v.new_empty(b, m, c), v.new_empty(b, m, K)
    native(
        *(q, k, v, indices, index_step(indices, 2), weight, bias, keep),
        *(int(euclidean), int(fixed), self_score, attention, y, b, m, n, c, K),
    )
    return y, attention


@attend_backward_op.register_kernel("cpu")
def _attend_backward(gy, attention, q, k, v, indices, weight, euclidean, fixed, keep):
    (b, n, c), (m, K) = q.shape, indices.shape[-2:]
    tensors = (gy, attention, q, k, v, indices, weight)
    native = build.kernel("nn_attend_backward", *tensors, keep) if m else None
    if native is None:
        return attend_backward_torch(*tensors, euclidean, fixed, keep)
    gy, attention, q, k, v, indices, by_tap, keep = contiguous(*tensors[:-1], weight.T, keep)
    gq, gk, gv = torch.zeros_like(q), torch.empty_like(k), torch.zeros_like(v)
    gw = weight.new_empty(K, c)
    native(
        *(gy, attention, q, k, v, indices, index_step(indices, 2), by_tap, keep),
        *(int(euclidean), int(fixed), gq, gk, gv, gw, b, m, n, c, K),
    )
    return gq, gk, gv, gw.T.contiguous()


@max_rows_op.register_kernel("cpu")
def _max_rows(x, indices):
    (b, n, c), (m, K) = x.shape, indices.shape[-2:]
    native = build.kernel("nn_max_rows", x, indices) if m and n < 2**31 else None
    if native is None:
        return max_rows_torch(x, indices)
    x, indices = contiguous(x, indices)
    y, origin = x.new_empty(b, m, c), x.new_empty(b, m, c, dtype=torch.int32)
    native(x, indices, y, origin, b, m, n, c, K)
    return y, origin


@max_rows_backward_op.register_kernel("cpu")
def _max_rows_backward(gy, origin, n):
    b, m, c = gy.shape
    native = build.kernel("nn_max_rows_backward", gy) if m else None
    if native is None:
        return max_rows_backward_torch(gy, origin, n)
    gy, origin = contiguous(gy, origin)
    gx = gy.new_zeros(b, n, c)
    native(gy, origin, gx, b, m, n, c)
    return gx


@sum_rows_op.register_kernel("cpu")
def _sum_rows(x, indices):
    (b, n, c), (m, K) = x.shape, indices.shape[-2:]
    native = build.kernel("nn_sum_rows", x, indices) if m else None
    if native is None:
        return sum_rows_torch(x, indices)
    x, indices = contiguous(x, indices)
    y = x.new_empty(b, m, c)
    native(x, indices, y, b, m, n, c, K)
    return y


@sum_rows_backward_op.register_kernel("cpu")
def _sum_rows_backward(gy, indices, n):
    (b, m, c), K = gy.shape, indices.shape[-1]
    native = build.kernel("nn_sum_rows_backward", gy, indices) if m else None
    if native is None:
        return sum_rows_backward_torch(gy, indices, n)
    gy, indices = contiguous(gy, indices)
    gx = gy.new_zeros(b, n, c)
    native(gy, indices, gx, b, m, n, c, K)
    return gx
