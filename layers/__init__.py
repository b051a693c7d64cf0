"""Layers over nearest neighbors, and the ordinary convolutions beside them.

`LAYER_KINDS` holds a table for each kind of layer; a model names the one its layers come from by
its `layer_kind` ("maps" where it says nothing). A table maps the names users give to callables,
which the fields of their `Options` configure as further keywords (by `functools.partial`):

- "maps", `LAYERS`: `layer(in_channels=, out_channels=, stride=1)`, on maps (B, C, H, W);
- "tokens", `TOKEN_LAYERS`: `layer(width=, num_heads=)`, (B, N, C) -> (B, N, C);
- "signals", `SIGNAL_LAYERS`: `layer(in_channels=, out_channels=, stride=1)`, (B, C, L);
- "graph", `GRAPH_LAYERS`: `layer(in_channels=, out_channels=)`, nodes (B, N, C) and the neighbors
  of each (B, N, K) -> (B, N, O);
- "foreign": the first two, for networks of other libraries.

A new layer is a file and a row.
"""

from collections import ChainMap
from collections.abc import Callable, MutableMapping

from torch import nn

from layers.attention import Conv1d_NN_Attn, Conv2d_NN_Attn
from layers.branching import (
    Conv1d_Attn_Branching,
    Conv1d_Branching,
    Conv2d_Attn_Branching,
    Conv2d_Branching,
)
from layers.conv import Conv1d_New, Conv2d_New, same_conv, same_conv1d
from layers.convnn import Conv1d_NN, Conv2d_NN
from layers.coordinates import add_coordinates, coordinate_channels
from layers.graph import GIN, EdgeConv, GraphSAGE, MaxRelative
from layers.pixel_shuffle import PixelShuffle1D, PixelUnshuffle1D
from layers.record import record_neighbors
from layers.tokens import (
    Attention,
    BranchAttention,
    BranchConv,
    ConvNNAttention,
    KvtAttention,
    LocalAttention,
    NeighborhoodAttention,
)

__all__ = [
    "GIN",
    "GRAPH_LAYERS",
    "LAYERS",
    "LAYER_KINDS",
    "SIGNAL_LAYERS",
    "TOKEN_LAYERS",
    "Attention",
    "BranchAttention",
    "BranchConv",
    "Conv1d_Attn_Branching",
    "Conv1d_Branching",
    "Conv1d_NN",
    "Conv1d_NN_Attn",
    "Conv1d_New",
    "Conv2d_Attn_Branching",
    "Conv2d_Branching",
    "Conv2d_NN",
    "Conv2d_NN_Attn",
    "Conv2d_New",
    "ConvNNAttention",
    "EdgeConv",
    "GraphSAGE",
    "KvtAttention",
    "LocalAttention",
    "MaxRelative",
    "NeighborhoodAttention",
    "PixelShuffle1D",
    "PixelUnshuffle1D",
    "add_coordinates",
    "coordinate_channels",
    "record_neighbors",
    "same_conv",
    "same_conv1d",
]

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Conv2d": same_conv,
    "Conv2d_New": Conv2d_New,
    "ConvNN": Conv2d_NN,
    "ConvNN_Attn": Conv2d_NN_Attn,
    "Branching": Conv2d_Branching,
    "Branching_Attn": Conv2d_Attn_Branching,
}

TOKEN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Attention": Attention,
    "ConvNNAttention": ConvNNAttention,
    "KvtAttention": KvtAttention,
    "LocalAttention": LocalAttention,
    "NeighborhoodAttention": NeighborhoodAttention,
    "BranchConv": BranchConv,
    "BranchAttention": BranchAttention,
}

SIGNAL_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Conv1d": same_conv1d,
    "Conv1d_New": Conv1d_New,
    "ConvNN": Conv1d_NN,
    "ConvNN_Attn": Conv1d_NN_Attn,
    "Branching": Conv1d_Branching,
    "Branching_Attn": Conv1d_Attn_Branching,
}

GRAPH_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "MaxRelative": MaxRelative,
    "EdgeConv": EdgeConv,
    "GraphSAGE": GraphSAGE,
    "GIN": GIN,
}

LAYER_KINDS: dict[str, MutableMapping[str, Callable[..., nn.Module]]] = {
    "maps": LAYERS,
    "tokens": TOKEN_LAYERS,
    "signals": SIGNAL_LAYERS,
    "graph": GRAPH_LAYERS,
    "foreign": ChainMap(TOKEN_LAYERS, LAYERS),
}
