"""Layers that combine every node with its chosen neighbors: what graph networks aggregate by.

`layer(in_channels=, out_channels=)(x, indices, keys=None, present=None)`: nodes x (B, N, C), of
which each looks at the rows `indices` (B, N, K) of keys (B, M, C), the nodes themselves where none
are given; -> (B, N, O), normalised, before any activation. Where clouds have unequal sizes,
`present` (B, N) says which nodes are there: the others count in no statistics, and become zeros.

References: Han et al., Vision GNN, NeurIPS 2022, https://arxiv.org/abs/2206.00272 (the four
aggregators, in groups); Wang et al., Dynamic Graph CNN, ACM TOG 2019,
https://arxiv.org/abs/1801.07829 (EdgeConv); Hamilton et al., GraphSAGE, NeurIPS 2017; Xu et al.,
How Powerful are Graph Neural Networks, ICLR 2019 (GIN).
Symbols: B batch, N nodes, M keys, C channels, O output channels, K neighbors, g groups.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.maps.reduce import edge_max, max_neighbors, sum_neighbors
from options import Options, option

__all__ = ["GIN", "EdgeConv", "GraphSAGE", "MaxRelative", "normalize_rows"]


@dataclass(frozen=True)
class GraphOptions(Options):
    """What every aggregator takes."""

    title = "Graph layers (vig, pvig, dgcnn)"
    groups: int = option(
        4, "groups of channels that the weights of a graph layer do not mix", least=1, most=10**6
    )


def normalize_rows(norm: nn.BatchNorm1d, x: Tensor, present: Tensor | None = None) -> Tensor:
    """Apply batch norm over all rows (B, N, C) that are there; the others become zeros."""
    if present is None:
        return norm(x.flatten(0, 1)).view_as(x)
    y = norm(x[present])
    return y.new_zeros(x.shape).masked_scatter(present[..., None].expand_as(x), y)


class GroupedLinear(nn.Module):
    """A linear map in groups, without bias: group i of the inputs makes group i of the outputs.

    Args:
        in_channels: C, over all groups.
        out_channels: O, over all groups.
        groups: g, divides both.

    Shape:
        (B, N, C) -> (B, N, O)
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1):
        super().__init__()
        for what, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(
                    f"groups {groups} does not divide the {channels} {what} of a graph layer: "
                    "every group takes as many. Try groups 1, or another width."
                )
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows."""
        return self.apply_weight(x, self.weight)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map rows by other weights (O, C / g)."""
        if self.groups == 1:
            return F.linear(x, weight)
        b, n, _ = x.shape
        parts = x.reshape(b * n, self.groups, -1).transpose(0, 1)  # (g, B·N, C / g)
        y = torch.bmm(parts, weight.view(self.groups, -1, weight.shape[1]).mT)
        return y.transpose(0, 1).reshape(b, n, -1)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Put two tensors (B, N, C) side by side so that every group has its part of both."""
        parts = [t.unflatten(2, (self.groups, -1)) for t in (a, b)]
        return torch.cat(parts, 3).flatten(2)

    def extra_repr(self) -> str:
        """Show sizes."""
        outs, ins = self.weight.shape
        return f"{ins * self.groups}, {outs}, groups={self.groups}"


class _GraphLayer(nn.Module):
    """Sizes and options of a graph layer."""

    Options = GraphOptions

    def __init__(self, in_channels: int, out_channels: int, groups: int, inputs: int):
        super().__init__()
        self.options = GraphOptions(groups=groups)
        self.linear = GroupedLinear(inputs * in_channels, out_channels, groups)
        self.norm = nn.BatchNorm1d(out_channels)


class MaxRelative(_GraphLayer):
    """norm(W [x_i, max_j (x_j - x_i)]): what a node's neighbors have most more than itself.

    Args:
        in_channels: C.
        out_channels: O.
        groups: g, each with its part of both.

    Shape:
        See the module.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 4):
        super().__init__(in_channels, out_channels, groups, 2)

    def forward(
        self,
        x: Tensor,
        indices: Tensor,
        keys: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Combine nodes with their neighbors."""
        largest = max_neighbors(x if keys is None else keys, indices) - x
        return normalize_rows(self.norm, self.linear(self.linear.join(x, largest)), present)


class EdgeConv(_GraphLayer):
    """max_j norm(W [x_i, x_j - x_i]), batch norm over all edges: a map of every edge.

    An edge's product is the sum of one of each of its ends, so products are N, not N·K. Published
    code applies an activation before the maximum: for one that never falls (ReLU, LeakyReLU) the
    same as after it, where ours stands; GELU falls a little below -0.75.

    Args:
        in_channels: C.
        out_channels: O.
        groups: g, each with its part of both.

    Shape:
        See the module.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 4):
        super().__init__(in_channels, out_channels, groups, 2)

    def forward(
        self,
        x: Tensor,
        indices: Tensor,
        keys: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Combine nodes with their neighbors."""
        own, relative = self.linear.weight.chunk(2, 1)  # (O, C / g) each
        a = self.linear.apply_weight(x, own - relative)
        b = self.linear.apply_weight(x if keys is None else keys, relative)
        return edge_max(a, b, indices, self.norm, present)


class GraphSAGE(_GraphLayer):
    """norm(W [x_i, max_j GELU(norm(V x_j))]).

    Every key is mapped once, and counts once in the inner batch norm; published code maps it once
    for every node that looks at it.

    Args:
        in_channels: C.
        out_channels: O.
        groups: g, each with its part of both.

    Shape:
        See the module.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 4):
        super().__init__(in_channels, out_channels, groups, 2)
        self.inner_linear = GroupedLinear(in_channels, in_channels, groups)
        self.inner_norm = nn.BatchNorm1d(in_channels)

    def forward(
        self,
        x: Tensor,
        indices: Tensor,
        keys: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Combine nodes with their neighbors."""
        there = present if keys is None else None
        inner = self.inner_linear(x if keys is None else keys)
        largest = max_neighbors(F.gelu(normalize_rows(self.inner_norm, inner, there)), indices)
        return normalize_rows(self.norm, self.linear(self.linear.join(x, largest)), present)


class GIN(_GraphLayer):
    """norm(W ((1 + ε) x_i + Σ_j x_j)), ε learned.

    Args:
        in_channels: C.
        out_channels: O.
        groups: g.

    Shape:
        See the module.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 4):
        super().__init__(in_channels, out_channels, groups, 1)
        self.eps = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,
        indices: Tensor,
        keys: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Combine nodes with their neighbors."""
        total = sum_neighbors(x if keys is None else keys, indices)
        return normalize_rows(self.norm, self.linear((1 + self.eps) * x + total), present)
