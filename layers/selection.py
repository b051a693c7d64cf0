"""Choices of K neighbors from distances: relaxed, hard, or stochastic.

T. Plötz, S. Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12575. With logits α¹ = -d / t (eq. 7), the weights of the j-th relaxed
neighbor are w^j = softmax(α^j), and α^{j+1} = α^j + log(1 - w^j) takes its mass out of the running
(eqs. 8-11). As t → 0, w^j becomes one-hot at the j-th nearest candidate. The two rivals of the
paper are a hard choice (KNN) and a stochastic relaxation (Concrete).

Symbols: O candidates of a query, K neighbor volumes, d squared distance, t temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ops.relax import SATURATION, relaxed_selection

__all__ = ["ConcreteNeighbors", "HardNeighbors", "NeuralNearestNeighbors"]


class NeuralNearestNeighbors(nn.Module):
    """Weights of K relaxed nearest neighbors from squared distances.

    A scalar batch norm scales the distances (eps 1e-5 matters: their variance is about as small).
    Its mean and bias shift all logits of a query alike and so change nothing; they are kept for
    the published checkpoints.

    Args:
        K: Neighbor volumes.
        temperature: "external": the log temperature comes with each call; "learned": one scalar
            `log_temp`.
        temp_bias: Its logarithm is added to the log temperature; 0 or None adds nothing.
        distance_bn: Scale distances by a batch norm.
        saturation: See `relaxed_selection`.

    Attributes:
        pool_statistics: Turns number, mean and variance of this process's distances into those of
            all processes; None where there is one.

    Shape:
        distances (…, O), log temperature (…) -> weights (…, K, O).
    """

    pool_statistics: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    def __init__(
        self,
        K: int = 7,
        temperature: str = "external",
        temp_bias: float | None = 0.1,
        distance_bn: bool = True,
        saturation: float = SATURATION,
    ) -> None:
        super().__init__()
        if K < 1:
            raise ValueError(f"K must be at least 1, got {K}.")
        if temperature not in ("external", "learned"):
            raise ValueError(f"temperature must be 'external' or 'learned', got {temperature!r}.")
        if temp_bias is not None and temp_bias < 0:
            raise ValueError(f"temp_bias must be positive (or 0 for none), got {temp_bias}.")
        self.K = K
        self.log_bias = math.log(temp_bias) if temp_bias else 0.0
        self.saturation = saturation
        if temperature == "learned":
            self.log_temp = nn.Parameter(torch.zeros(1))
        else:
            self.register_parameter("log_temp", None)
        self.bn = nn.BatchNorm1d(1) if distance_bn else None

    @property
    def needs_all(self) -> bool:
        """Whether the weights of one query depend on all others (statistics of a batch)."""
        return self.bn is not None and (self.training or self.bn.running_var is None)

    def logits(
        self,
        distances: Tensor,
        log_temp: Tensor | None = None,
        barred: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Scaled negative distances (…, O), `barred` added."""
        distances = distances if distances.dtype == torch.float64 else distances.float()
        if self.log_temp is not None:
            log_temp = self.log_temp
        if log_temp is None:
            inverse = distances.new_tensor([-math.exp(-self.log_bias)])
        else:
            log_temp = log_temp.to(distances.dtype) + self.log_bias
            inverse = -torch.exp(-log_temp)[..., None]
        if self.bn is not None:
            if counted is None and barred is not None and self.needs_all:
                counted = barred.exp()
            inverse = inverse * self._gain(distances, counted)
        return distances * inverse if barred is None else torch.addcmul(barred, distances, inverse)

    def _gain(self, distances: Tensor, counted: Tensor | None) -> Tensor:
        """Slope of the batch norm (1,) over counted distances; updates running statistics."""
        bn = self.bn
        if self.needs_all:
            if counted is None:
                number = torch.tensor(distances.numel(), device=distances.device)
                var, mean = torch.var_mean(distances, correction=0)
            else:
                number = counted.sum() * (distances.numel() // counted.numel())
                mean = (distances * counted).sum() / number
                var = ((distances - mean).square() * counted).sum() / number
            if self.pool_statistics is not None and self.training:
                number, mean, var = self.pool_statistics(number, mean, var)
            if bn.training and bn.running_var is not None:
                with torch.no_grad():
                    bn.num_batches_tracked += 1
                    share = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
                    unbiased = var.detach() * (number / (number - 1))
                    bn.running_mean.lerp_(-mean.detach().to(bn.running_mean), share)
                    bn.running_var.lerp_(unbiased.to(bn.running_var), share)
        else:
            var = bn.running_var
        # The bias acts on no weight; it stays in the graph so that its gradient is 0, not missing.
        return bn.weight * torch.rsqrt(var + bn.eps) + 0.0 * bn.bias

    def forward(
        self,
        distances: Tensor,
        log_temp: Tensor | None = None,
        barred: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Relax the choice of the K nearest.

        Args:
            distances: Squared distances (…, O), >= 0.
            log_temp: Log temperature (…), where it is external; None means 0.
            barred: -inf for candidates that may not be chosen, else 0 (…, O), broadcast from the
                left.
            counted: 1 for candidates that enter the statistics, else 0; None: all not barred.

        Returns:
            Weights (…, K, O) in float32 (float64 for float64 input).
        """
        with torch.autocast(distances.device.type, enabled=False):
            logits = self.logits(distances, log_temp, barred, counted)
            return relaxed_selection(logits, self.K, self.saturation)

    def extra_repr(self) -> str:
        """Show the options."""
        kind = "external" if self.log_temp is None else "learned"
        return f"K={self.K}, temperature={kind!r}, temp_bias={math.exp(self.log_bias):g}"


class HardNeighbors(nn.Module):
    """One-hot weights of the K nearest candidates; no gradient to distances.

    Args:
        K: Neighbors.
    """

    needs_all = False

    def __init__(self, K: int = 7) -> None:
        super().__init__()
        if K < 1:
            raise ValueError(f"K must be at least 1, got {K}.")
        self.K = K

    def forward(
        self,
        distances: Tensor,
        log_temp: Tensor | None = None,
        barred: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Squared distances (…, O) -> weights (…, K, O); `log_temp`, `counted` have no effect."""
        distances = distances.detach()
        if barred is not None:
            distances = distances - barred
        nearest = distances.topk(self.K, dim=-1, largest=False).indices
        out = distances.new_zeros(*distances.shape[:-1], self.K, distances.shape[-1])
        return out.scatter_(-1, nearest[..., None], 1.0)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"K={self.K}"


class ConcreteNeighbors(nn.Module):
    """Stochastic relaxation: each volume is a Concrete (Gumbel-softmax) sample, none repeated.

    w^j = softmax((α^j + g) / τ) with Gumbel noise g and the learned annealing parameter τ; α^{j+1}
    = α^j + log(1 - w^j). In eval mode the noise is left out, so that evaluation is repeatable.

    Args:
        K: Neighbor volumes.
        distance_bn: Scale distances by a batch norm, as `NeuralNearestNeighbors` does.
        annealing: Starting value of τ.
    """

    def __init__(self, K: int = 7, distance_bn: bool = True, annealing: float = 0.1) -> None:
        super().__init__()
        if annealing <= 0:
            raise ValueError(f"annealing must be positive, got {annealing}.")
        self.scale = NeuralNearestNeighbors(K, temp_bias=None, distance_bn=distance_bn)
        self.K = K
        self.log_annealing = nn.Parameter(torch.tensor([math.log(annealing)]))

    @property
    def needs_all(self) -> bool:
        """Whether the weights of one query depend on all others."""
        return self.scale.needs_all

    def forward(
        self,
        distances: Tensor,
        log_temp: Tensor | None = None,
        barred: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Squared distances (…, O) -> weights (…, K, O)."""
        with torch.autocast(distances.device.type, enabled=False):
            alpha = self.scale.logits(distances, log_temp, barred, counted)
            alpha = alpha.clamp(min=-1e30)  # -inf times a gradient of 0 would be no number
            inverse = torch.exp(-self.log_annealing)
            out = []
            for _ in range(self.K):
                noise = -torch.empty_like(alpha).exponential_().log() if self.training else 0.0
                w = torch.softmax((alpha + noise) * inverse, -1)
                out.append(w)
                alpha = alpha + torch.log1p(-w.clamp(max=1 - 1e-6))
            return torch.stack(out, -2)
