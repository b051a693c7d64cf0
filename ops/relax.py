"""The relaxed choice of the K largest logits, which neural nearest neighbors are made of.

T. Plötz, S. Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12575. The weights of the j-th relaxed neighbor are w^j = softmax(α^j),
and α^{j+1} = α^j + log(1 - w^j) takes its mass out of the running (eqs. 8-11).

Symbols: R rows, O candidates of a row, K neighbor volumes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu import build

__all__ = ["SATURATION", "relaxed_selection"]

# 1 - w below this counts as 0, as it does when the formula is evaluated in float64.
SATURATION = 2.0**-53
CHUNK_ROWS = 2**16  # numbers of a chunk in the rounds: small enough to stay in cache


def _rounds_by_products(logits: Tensor, weights: Tensor) -> bool:
    """Run the rounds on exp(α) instead of α; says whether the numbers had the range for it.

    With u = exp(α) and s its sum, w = u / s and u becomes u·(1 - w): no exponential or logarithm
    but the first, in float64 so that 1 - w keeps its digits. Where the gap to the K-th nearest is
    beyond float32, the last sum nears 0 and the caller takes the way of logarithms.
    """
    first = torch.softmax(logits, -1)
    weights[:, 0] = first
    u = first.double()
    w = torch.empty_like(u)
    total = u.sum(-1, keepdim=True)
    for j in range(1, weights.shape[1]):
        torch.div(u, total, out=w)
        u.addcmul_(u, w, value=-1)
        total = u.sum(-1, keepdim=True)
        weights[:, j] = torch.div(u, total, out=w)
    return bool(total.min() > 1e-30)


def _rounds_by_logs(logits: Tensor, weights: Tensor, saturation: float) -> None:
    """Run the rounds on α, at any temperature.

    At most one weight of a row can be near 1. For it 1 - w is the sum of the others, which keeps
    full relative precision where the subtraction would have none.
    """
    alpha = logits
    for j in range(weights.shape[1]):
        w = torch.softmax(alpha, -1)
        weights[:, j] = w
        top = w.argmax(-1, keepdim=True)
        change = (-w).scatter(-1, top, 0.0)
        rest = -change.sum(-1, keepdim=True)  # 1 - the largest weight
        gone = torch.where(rest > saturation, rest, 0.0).log()  # -inf: removed for good
        alpha = alpha + change.log1p().scatter(-1, top, gone)


def _relax_forward(logits: Tensor, K: int, saturation: float) -> Tensor:
    """Weights (R, K, O) of logits (R, O)."""
    weights = logits.new_empty(logits.shape[0], K, logits.shape[1])
    native = build.kernel("relaxed_forward", logits) if saturation == SATURATION else None
    if native is not None:
        first = torch.softmax(logits, -1).contiguous()
        left = torch.empty(len(first), dtype=torch.bool)
        native(first, weights, left, len(first), K, first.shape[1])
        if left.any():
            rows = left.nonzero()[:, 0]
            again = weights.new_empty(len(rows), *weights.shape[1:])
            _rounds_by_logs(logits[rows], again, saturation)
            weights[rows] = again
        return weights
    fast = logits.device.type == "cpu" and logits.dtype == torch.float32
    # It looks at numbers to decide, which a compiled graph cannot.
    fast = fast and saturation == SATURATION and not torch.compiler.is_compiling()
    step = max(1, CHUNK_ROWS // logits.shape[1]) if fast else max(1, logits.shape[0])
    for i in range(0, logits.shape[0], step):
        rows, out = logits[i : i + step], weights[i : i + step]
        if not (fast and _rounds_by_products(rows, out)):
            _rounds_by_logs(rows, out, saturation)
    return weights


def _relax_backward(weights: Tensor, grad: Tensor) -> Tensor:
    """Gradient (R, O) of the logits from weights and their gradient (R, K, O).

    Of α_i + log(1 - w_i) the slope is 1 - w_i for i itself, and w_i w_k / (1 - w_i) for another k.
    Where w_i nears 1, 1 - w_i is taken as the sum of the other weights: w_k over it is at most 1.
    """
    total = torch.zeros_like(weights[:, 0])  # gradient of α of the round after
    for w, gw in zip(reversed(weights.unbind(1)), reversed(grad.unbind(1)), strict=True):
        minus = F.threshold(-w, -0.75, 0.0)  # -w, but 0 for the weight that is near 1
        near = w + minus  # that weight alone
        direct = (gw * w).addcmul_(minus, total / (1 + minus))
        pull = total * near
        slope = direct.sum(-1, keepdim=True)
        share = pull.sum(-1, keepdim=True) / minus.sum(-1, keepdim=True).clamp_(max=-1e-30)
        total = (total + direct).addcmul_(w, slope, value=-1).addcmul_(minus, share).sub_(pull)
    return total


class _RelaxedSelection(torch.autograd.Function):
    """The K rounds; only the weights are saved."""

    @staticmethod
    def forward(ctx, logits: Tensor, K: int, saturation: float) -> Tensor:
        weights = _relax_forward(logits, K, saturation)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        r, k, n = weights.shape
        out = weights.new_empty(r, n)
        native = build.kernel("relaxed_backward", weights, grad)
        if native is not None:
            native(weights, grad.contiguous(), out, r, k, n)
            return out, None, None
        step = max(1, CHUNK_ROWS // max(1, weights.shape[2]))
        for i in range(0, len(out), step):
            out[i : i + step] = _relax_backward(weights[i : i + step], grad[i : i + step])
        return out, None, None


def relaxed_selection(logits: Tensor, K: int, saturation: float = SATURATION) -> Tensor:
    """Relax the choice of the K largest logits.

    Args:
        logits: α¹ (…, O), larger is nearer; -inf excludes a candidate. At least K must be finite.
        K: Neighbor volumes.
        saturation: Once 1 - w falls to this, the candidate is removed outright. The default is
            where the formula does so in float64, whatever the dtype of `logits`; 2**-24 is where
            plain float32 evaluation does.

    Returns:
        Weights (…, K, O) in float32 (float64 for float64 logits); every row sums to 1.
    """
    if K < 1:
        raise ValueError(f"K must be at least 1, got {K}.")
    if logits.shape[-1] < K:
        raise ValueError(f"K = {K} neighbors asked of {logits.shape[-1]} candidates.")
    if logits.dtype != torch.float64:
        logits = logits.float()
    rows = logits.reshape(-1, logits.shape[-1])
    if torch.is_grad_enabled() and rows.requires_grad:
        weights = _RelaxedSelection.apply(rows, K, saturation)
    else:
        weights = _relax_forward(rows, K, saturation)
    return weights.view(*logits.shape[:-1], K, logits.shape[-1])
