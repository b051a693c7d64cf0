"""The weighted eight-point algorithm, with gradients that stay finite.

R. I. Hartley, "In Defense of the Eight-Point Algorithm", TPAMI 1997; weighted by a network in K. M.
Yi et al., "Learning to Find Good Correspondences", CVPR 2018, https://arxiv.org/abs/1711.05971.

Symbols: B pairs of pictures, N matches (x, y, x', y') in normalised camera coordinates.
"""

import torch
from torch import Tensor

__all__ = ["smallest_eigenvector", "weighted_eight_point"]

GAP = 1e-9  # eigenvalues closer than this, relative to the largest, count as one


class _SmallestEigenvector(torch.autograd.Function):
    """Eigenvector of the smallest eigenvalue of symmetric matrices (B, n, n), in float64.

    dv = Σ_j v_j (v_jᵀ dA v) / (λ - λ_j). The quotient 1/d is replaced by d/(d² + g²), so that it
    vanishes instead of growing without bound where eigenvalues meet.
    """

    @staticmethod
    def forward(ctx, matrices: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrices)
        ctx.save_for_backward(values, vectors)
        return vectors[..., 0].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        smallest = vectors[..., 0]
        difference = values[..., :1] - values  # (B, n), <= 0
        gap = GAP * values[..., -1:].clamp(min=1e-30)
        inverse = difference / (difference.square() + gap.square())
        inverse[..., 0] = 0
        along = (vectors.transpose(-1, -2) @ grad[..., None])[..., 0] * inverse
        out = (vectors @ along[..., None]) * smallest[..., None, :]
        return 0.5 * (out + out.transpose(-1, -2))


def smallest_eigenvector(matrices: Tensor) -> Tensor:
    """Return the eigenvector of the smallest eigenvalue of symmetric matrices (…, n, n).

    Its sign is not determined. The gradient is finite everywhere.

    Args:
        matrices: float64; only the symmetric part matters.
    """
    return _SmallestEigenvector.apply(0.5 * (matrices + matrices.transpose(-1, -2)))


def weighted_eight_point(matches: Tensor, weights: Tensor) -> Tensor:
    """Return essential matrices from weighted matches: argmin Σ w (x'ᵀ E x)² at ‖E‖ = 1.

    Args:
        matches: (B, N, 4), N >= 8.
        weights: (B, N), >= 0. Where they are all 0 the matches count the same.

    Returns:
        E (B, 3, 3) in float64, of Frobenius norm 1 and undetermined sign, with x'ᵀ E x = 0 for
        x = (x, y, 1) and x' = (x', y', 1). Its singular values are those that came out.

    Raises:
        ValueError: If there are fewer than eight matches.
    """
    if matches.shape[-2] < 8:
        raise ValueError(
            f"the eight-point algorithm needs at least 8 matches, got {matches.shape[-2]}."
        )
    first, second = matches.double().split(2, -1)
    one = torch.ones_like(first[..., :1])
    first, second = torch.cat((first, one), -1), torch.cat((second, one), -1)
    rows = (second[..., :, None] * first[..., None, :]).flatten(-2)  # (B, N, 9): x'_i x_j
    weights = weights.double()
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights, 1.0) / torch.where(
        total > 0, total, float(weights.shape[-1])
    )
    moments = rows.transpose(-1, -2) @ (rows * shares[..., None])
    return smallest_eigenvector(moments).unflatten(-1, (3, 3))
