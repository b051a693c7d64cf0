"""Layers that mix tokens (B, N, C) -> (B, N, C): dense attention, and attention to K neighbors.

`layer(width=, num_heads=)`, C being the width. Heads are samples of their own (`ops.maps.pairs`).

References: Kang & Farias, Attention via Convolutional Nearest Neighbors,
https://arxiv.org/abs/2511.14137; Wang et al., KVT: k-NN Attention for Boosting Vision Transformers,
ECCV 2022, https://arxiv.org/abs/2106.00515; Hassani et al., Neighborhood Attention Transformer,
CVPR 2023, https://arxiv.org/abs/2204.07143. Symbols: B batch, N tokens, C channels, h heads,
D channels of a head, K neighbors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.conv import ConvOptions
from layers.record import Neighbors, grid_places, note, recording
from layers.sampling import SamplingOptions, count_candidates, random_index, spatial_index
from ops.maps.attend import attend_neighbors
from ops.maps.pairs import join_heads, pair_scores, split_heads, weigh_neighbors
from ops.maps.search import nearest_neighbors
from options import Options, option

__all__ = [
    "Attention",
    "BranchAttention",
    "BranchConv",
    "ConvNNAttention",
    "KvtAttention",
    "LocalAttention",
    "NeighborhoodAttention",
]

MAGNITUDE_TYPES = ("matmul", "dot", "cosine", "euclidean")
CONVOLUTION_TYPES = ("standard", "depthwise", "depthwise-separable")


@dataclass(frozen=True)
class TokenOptions(Options):
    """What every attention takes."""

    title = "Token layers (vit)"
    attention_dropout: float = option(
        0.1, "dropout on attention weights (on the output of ConvNNAttention)", least=0, most=1
    )


@dataclass(frozen=True)
class KvtOptions(TokenOptions):
    """How many tokens are looked at."""

    K: int = option(9, "tokens that each token looks at", least=1, most=10**6)


@dataclass(frozen=True)
class NeighborhoodOptions(KvtOptions):
    """A window around each token."""

    def __post_init__(self) -> None:
        """Refuse windows without a middle."""
        super().__post_init__()
        if self.K % 2 == 0:
            raise ValueError(
                f"K must be odd for NeighborhoodAttention (got {self.K}): a token lies in the "
                f"middle of its window. Try K {self.K + 1}."
            )


@dataclass(frozen=True)
class LocalOptions(TokenOptions):
    """Windows over the sequence."""

    window_size: int = option(128, "tokens of a window of LocalAttention", least=1, most=10**6)


@dataclass(frozen=True)
class ConvNNAttentionOptions(SamplingOptions, KvtOptions):
    """How tokens are ranked and combined."""

    title = TokenOptions.title
    magnitude_type: str = option(
        "matmul",
        "similarity of two tokens; matmul or dot: their product over the root of a head's width",
        choices=MAGNITUDE_TYPES,
    )
    convolution_type: str = option(
        "depthwise",
        "what combines the K neighbors of a token (ConvNNAttention)",
        choices=CONVOLUTION_TYPES,
    )
    softmax_topk_val: bool = option(
        True, "softmax over the K scores of ConvNNAttention; otherwise they weigh as they are"
    )
    coordinate_encoding: bool = option(
        False, "a channel that runs from -1 to 1 along the sequence joins each head"
    )


@dataclass(frozen=True)
class BranchAttentionOptions(ConvNNAttentionOptions):
    """ConvNN attention beside a dense one."""

    branch_ratio: float = option(
        0.5, "part of the channels that go to ConvNNAttention, in [0, 1]", least=0, most=1
    )


@dataclass(frozen=True)
class BranchConvOptions(BranchAttentionOptions):
    """ConvNN attention beside a convolution along the sequence."""

    kernel_size: int = option(
        9, "width of the convolution along the sequence; odd", least=1, most=255
    )


def check_heads(width: int, num_heads: int) -> None:
    """Refuse heads of unequal width."""
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(
            f"num_heads {num_heads} does not divide a width of {width}: every head takes as many "
            "channels. Try another num_heads, d_hidden or branch_ratio."
        )


def check_neighbors(K: int, tokens: int, how: str = "") -> None:
    """Refuse to look at more tokens than there are."""
    if tokens < K:
        raise ValueError(
            f"K={K} is larger than the number of tokens to choose from, {tokens}{how}. "
            f"Try K {tokens} or less, or a smaller patch_size."
        )


class _TokenLayer(nn.Module):
    """Width, heads and options of a layer over tokens."""

    Options: type[Options] = TokenOptions

    def __init__(self, width: int, num_heads: int, options: Options) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.width, self.num_heads, self.options = width, num_heads, options
        for each in options.declared():
            setattr(self, each.name, getattr(options, each.name))

    def extra_repr(self) -> str:
        """Show the options that matter."""
        return f"{self.width}, num_heads={self.num_heads}, {self.options.describe()}"

    def heads(self, x: Tensor, count: int = 1) -> list[Tensor]:
        """Cut (B, N, count·C) into `count` tensors (B, h, N, D)."""
        return [t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in x.chunk(count, 2)]

    def note_neighbors(self, indices: Tensor, weights: Tensor, taken: str) -> None:
        """Tell `layers.record` what was chosen, (B·h, N, K) or (N, K), and with which weights."""
        places = grid_places((weights.shape[1],), (0,), 1, weights.device)
        if indices.dim() == 2:
            indices = indices[None, None]
        else:
            indices = indices.unflatten(0, (-1, self.num_heads))
        note(
            Neighbors(
                self,
                (len(places),),
                places,
                places,
                indices,
                weights.unflatten(0, (-1, self.num_heads)),
                group="head",
                taken=taken,
            )
        )


@torch.no_grad()
def dense_attention(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention (B·h, M, N) of all tokens, which no forward pass lays out.

    Args:
        q: (B, h, M, D), what asks.
        k: (B, h, N, D).
    """
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    m, (_, n, d) = q.shape[1], k.shape
    everything = torch.arange(n, device=q.device).expand(m, -1)
    taps = k.new_ones(d, n)
    _, attention = attend_neighbors(
        k,
        q * d**-0.5,
        k,
        everything,
        taps,
        metric="dot",
        self_score=None,
        with_attention=True,
    )
    return attention


class Attention(_TokenLayer):
    """Multi-head scaled dot-product attention of all tokens; projections without bias.

    Args:
        width: C.
        num_heads: h, divides C.
        attention_dropout: Share of the attention weights dropped in training.

    Shape:
        (B, N, C) -> (B, N, C)
    """

    def __init__(self, width: int, num_heads: int = 1, attention_dropout: float = 0.1):
        super().__init__(width, num_heads, TokenOptions(attention_dropout=attention_dropout))
        self.W_q, self.W_k, self.W_v, self.W_o = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        q, k, v = (self.heads(project(x))[0] for project in (self.W_q, self.W_k, self.W_v))
        p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        if recording():
            everything = torch.arange(x.shape[1], device=x.device).expand(x.shape[1], -1)
            self.note_neighbors(everything, dense_attention(q, k), "k·q")
        return self.W_o(y.transpose(1, 2).flatten(2))


class KvtAttention(_TokenLayer):
    """Attend to the K tokens whose product with a token is largest, in each head.

    Equals `Attention` at K = N. The N × N scores are never laid out.

    Args:
        width: C.
        num_heads: h, divides C.
        K: Tokens looked at.
        attention_dropout: Share of the attention weights dropped in training.

    Shape:
        (B, N, C) -> (B, N, C), N at least K.
    """

    Options = KvtOptions

    def __init__(self, width: int, num_heads: int = 1, K: int = 9, attention_dropout: float = 0.1):
        super().__init__(width, num_heads, KvtOptions(K=K, attention_dropout=attention_dropout))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        check_neighbors(self.K, x.shape[1])
        if x.is_meta:
            return torch.empty_like(x)
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, 2))
        q = q * q.shape[2] ** -0.5
        indices = nearest_neighbors(q, k, self.K, "dot")[1]  # (B·h, N, K)
        y, attention = attend_neighbors(
            k,  # ranked
            q,  # ranking
            v,
            indices,
            v.new_ones(v.shape[2], self.K),
            metric="dot",
            self_score=None,
            dropout_p=self.attention_dropout,
            training=self.training,
            with_attention=True,
        )
        if recording():
            self.note_neighbors(indices, attention, "k·q")
        return self.proj(join_heads(y, self.num_heads))


class NeighborhoodAttention(_TokenLayer):
    """Attend to a window of K tokens around each; at the ends to the first or last K.

    Args:
        width: C.
        num_heads: h, divides C.
        K: Tokens of a window, odd.
        attention_dropout: Share of the attention weights dropped in training.

    Shape:
        (B, N, C) -> (B, N, C), N at least K.
    """

    Options = NeighborhoodOptions

    def __init__(self, width: int, num_heads: int = 1, K: int = 9, attention_dropout: float = 0.1):
        options = NeighborhoodOptions(K=K, attention_dropout=attention_dropout)
        super().__init__(width, num_heads, options)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        n, K = x.shape[1], self.K
        check_neighbors(K, n)
        if x.is_meta:
            return torch.empty_like(x)
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, 2))
        first = torch.arange(n, device=x.device).sub_(K // 2).clamp_(0, n - K)
        indices = first[:, None] + torch.arange(K, device=x.device)
        y, attention = attend_neighbors(
            k,
            q * q.shape[2] ** -0.5,
            v,
            indices,
            v.new_ones(v.shape[2], K),
            metric="dot",
            self_score=None,
            dropout_p=self.attention_dropout,
            training=self.training,
            with_attention=True,
        )
        if recording():
            self.note_neighbors(indices, attention, "Loc")
        return self.proj(join_heads(y, self.num_heads))


class LocalAttention(_TokenLayer):
    """Attend within windows: each token to those of its own window and of the two beside it.

    Args:
        width: C.
        num_heads: h, divides C.
        window_size: Tokens of a window; the last one may be shorter.
        attention_dropout: Share of the attention weights dropped in training.

    Shape:
        (B, N, C) -> (B, N, C)
    """

    Options = LocalOptions

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        window_size: int = 128,
        attention_dropout: float = 0.1,
    ):
        options = LocalOptions(window_size=window_size, attention_dropout=attention_dropout)
        super().__init__(width, num_heads, options)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        q, k, v = self.heads(self.to_qkv(x), 3)  # (B, h, N, D)
        n, w = x.shape[1], self.window_size
        p = self.attention_dropout if self.training else 0.0
        windows = [
            F.scaled_dot_product_attention(
                q[:, :, start : start + w],
                k[:, :, max(0, start - w) : start + 2 * w],
                v[:, :, max(0, start - w) : start + 2 * w],
                dropout_p=p,
            )
            for start in range(0, n, w)
        ]
        if recording():
            self._note(q, k)
        return self.to_out(torch.cat(windows, 2).transpose(1, 2).flatten(2))

    def _note(self, q: Tensor, k: Tensor) -> None:
        """Tell the tokens of each window, those beyond the ends with a weight of 0."""
        n, w = q.shape[2], self.window_size
        indices = q.new_zeros(n, 3 * w, dtype=torch.int64)
        weights = q.new_zeros(q.shape[0] * q.shape[1], n, 3 * w)
        for start in range(0, n, w):
            own = slice(start, min(start + w, n))
            first, last = max(0, start - w), min(start + 2 * w, n)
            at = slice(0, last - first)
            indices[own, at] = torch.arange(first, last, device=q.device)
            weights[:, own, at] = dense_attention(q[:, :, own], k[:, :, first:last])
        self.note_neighbors(indices, weights, "Loc")


class ConvNNAttention(_TokenLayer):
    """A convolution over the K tokens a learned similarity ranks first, in each head.

    Row i ranks the tokens j by k_i · q_j / √D (`matmul`, `dot`), their cosine, or their Euclidean
    distance. The K values, weighed by the softmax of their scores (of minus the distances) or by
    the scores as they are (one over the distance), go through a convolution of K taps: "standard",
    "depthwise" (at 1 to begin with: plain attention) or "depthwise-separable".

    With "random" or "spatial" candidates a token is its own first neighbor with a score (or
    distance) of 1, followed by the K - 1 best of the others. Published code kept a token itself
    among them where scores went below -0.1 or distances beyond 1.1, let its table of coordinates
    grow with every batch size, and could not build depthwise convolutions with coordinates: here
    these values carry none, as such a convolution mixes no channels.

    Args:
        width: C.
        num_heads: h, divides C.
        K: Neighbors of a token.
        sampling_type: "all", "random" or "spatial" candidates.
        num_samples: How many, where not all.
        sample_padding: Tokens left out at both ends of the "spatial" ones.
        magnitude_type: "matmul", "dot" (the same), "cosine" or "euclidean".
        convolution_type: "standard", "depthwise" or "depthwise-separable".
        softmax_topk_val: Softmax of the K scores.
        coordinate_encoding: Join a channel linspace(-1, 1, N) to q, k and v of each head.
        attention_dropout: Dropout on the convolution's output.

    Shape:
        (B, N, C) -> (B, N, C), with at least K candidates.
    """

    Options = ConvNNAttentionOptions

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        K: int = 9,
        sampling_type: str = "all",
        num_samples: int = -1,
        sample_padding: int = 0,
        magnitude_type: str = "matmul",
        convolution_type: str = "depthwise",
        softmax_topk_val: bool = True,
        coordinate_encoding: bool = False,
        attention_dropout: float = 0.1,
    ):
        options = ConvNNAttentionOptions(
            K=K,
            sampling_type=sampling_type,
            num_samples=num_samples,
            sample_padding=sample_padding,
            magnitude_type=magnitude_type,
            convolution_type=convolution_type,
            softmax_topk_val=softmax_topk_val,
            coordinate_encoding=coordinate_encoding,
            attention_dropout=attention_dropout,
        )
        super().__init__(width, num_heads, options)
        self.W_q, self.W_k, self.W_v, self.W_o = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        o = width // num_heads
        c = o + int(coordinate_encoding and convolution_type != "depthwise")
        groups = 1 if convolution_type == "standard" else c
        out = o if convolution_type == "standard" else c
        self.conv: nn.Module = nn.Conv1d(c, out, K, stride=K, groups=groups, bias=False)
        if convolution_type == "depthwise":
            nn.init.ones_(self.conv.weight)
        elif convolution_type == "depthwise-separable":
            self.conv = nn.Sequential(self.conv, nn.Conv1d(c, o, 1, bias=False))
        self.dropout = nn.Dropout(attention_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        n = x.shape[1]
        available = count_candidates(
            (n,), 0, self.sampling_type, self.num_samples, self.sample_padding
        )
        sampled = "" if available == n else f", with sampling_type {self.sampling_type}"
        check_neighbors(self.K, available, sampled)
        if x.is_meta:
            return torch.empty_like(x)
        q, k, v = (split_heads(p(x), self.num_heads) for p in (self.W_q, self.W_k, self.W_v))
        if self.magnitude_type in ("matmul", "dot"):
            k = k * k.shape[2] ** -0.5
        if self.coordinate_encoding:
            line = torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device)[:, None]
            if self.magnitude_type in ("matmul", "dot"):
                # The root is that of a head's width without the coordinate.
                k = _join(k, line * (self.width // self.num_heads) ** -0.5)
            else:
                k = _join(k, line)
            q = _join(q, line)
            v = v if self.convolution_type == "depthwise" else _join(v, line)
        indices, scores = self.choose(q, k)  # (B·h, N, K)
        if recording():
            self.note_neighbors(indices, scores, "k·q")
        taps = self.conv if isinstance(self.conv, nn.Conv1d) else self.conv[0]
        depthwise = taps.groups > 1 or taps.in_channels == taps.out_channels == taps.groups
        weight = taps.weight[:, 0] if depthwise else taps.weight
        y = weigh_neighbors(v, indices, scores.to(v.dtype), weight)  # (B·h, N, D)
        if taps is not self.conv:
            y = F.linear(y, self.conv[1].weight[:, :, 0])
        return self.W_o(join_heads(self.dropout(y), self.num_heads))

    def choose(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rank tokens, and weigh the first K: indices and weights (B·h, N, K)."""
        n = q.shape[1]
        metric = "dot" if self.magnitude_type == "matmul" else self.magnitude_type
        candidates = own = None
        if self.sampling_type == "random":
            candidates = random_index(n, self.num_samples, self.training, q.device)
        elif self.sampling_type == "spatial":
            candidates = spatial_index((n,), 0, self.num_samples, self.sample_padding, q.device)
        if candidates is not None:
            own = torch.arange(n, device=q.device)
        indices = nearest_neighbors(k, q, self.K, metric, self_index=own, candidates=candidates)[1]
        scores = pair_scores(k, q, indices, metric)
        if metric == "euclidean":
            # The root's slope at zero is infinite: distances begin at 1e-6.
            scores = scores.clamp(min=1e-12).sqrt()
        if own is not None:
            scores = torch.cat([torch.ones_like(scores[..., :1]), scores[..., 1:]], -1)
        if self.softmax_topk_val:
            return indices, (-scores if metric == "euclidean" else scores).softmax(-1)
        return indices, 1 / (scores + 1e-8) if metric == "euclidean" else scores


def _join(x: Tensor, line: Tensor) -> Tensor:
    """Join a channel to rows: (B, N, D) -> (B, N, D + 1)."""
    return torch.cat([x, line.expand(x.shape[0], -1, -1)], 2)


class ConvHeads(_TokenLayer):
    """A convolution along the sequence in every head, all heads by one set of weights."""

    Options = ConvOptions

    def __init__(self, width: int, num_heads: int = 1, kernel_size: int = 9):
        super().__init__(width, num_heads, ConvOptions(kernel_size=kernel_size))
        self.W_x, self.W_o = nn.Linear(width, width), nn.Linear(width, width)
        d = width // num_heads
        self.conv = nn.Conv1d(d, d, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        heads = split_heads(self.W_x(x), self.num_heads)  # (B·h, N, D)
        return self.W_o(join_heads(self.conv(heads.mT).mT, self.num_heads))


class _Branch(nn.Module):
    """The first channels to ConvNN attention, the others to another layer; then a Linear.

    A ratio that leaves a branch no channel builds the other one alone; `pointwise_linear` is there
    all the same, as in published weights, and is not used then. Published code called the branch
    that was not built.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        branch_ratio: float,
        other_name: str,
        other: Callable[..., nn.Module],
        **options,
    ):
        super().__init__()
        BranchAttentionOptions(branch_ratio=branch_ratio)
        self.channels = int(branch_ratio * width)
        self.other_name = other_name
        if self.channels:
            self.convnn = ConvNNAttention(self.channels, num_heads, **options)
        if self.channels < width:
            self.add_module(other_name, other(width - self.channels, num_heads))
        self.pointwise_linear = nn.Linear(width, width)
        self.branch_ratio = branch_ratio

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        if not self.channels:
            return getattr(self, self.other_name)(x)
        if self.channels == x.shape[2]:
            return self.convnn(x)
        mine, others = x[..., : self.channels], x[..., self.channels :]
        y = torch.cat([self.convnn(mine), getattr(self, self.other_name)(others)], 2)
        return self.pointwise_linear(y)

    def extra_repr(self) -> str:
        """Show the options that matter."""
        return f"branch_ratio={self.branch_ratio}"


class BranchAttention(_Branch):
    """ConvNN attention for int(ratio · C) of the channels, `Attention` for the others.

    Args:
        width: C.
        num_heads: h, divides the width of both branches.
        branch_ratio: Part of the channels of the first branch.
        attention_dropout: Of both branches.
        **options: Of `ConvNNAttention`.

    Shape:
        (B, N, C) -> (B, N, C)
    """

    Options = BranchAttentionOptions

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        branch_ratio: float = 0.5,
        attention_dropout: float = 0.1,
        **options,
    ):
        def other(width: int, num_heads: int) -> nn.Module:
            return Attention(width, num_heads, attention_dropout)

        options["attention_dropout"] = attention_dropout
        super().__init__(width, num_heads, branch_ratio, "attention", other, **options)


class BranchConv(_Branch):
    """ConvNN attention for int(ratio · C) of the channels, a convolution for the others.

    Args:
        width: C.
        num_heads: h, divides the width of both branches.
        branch_ratio: Part of the channels of the first branch.
        kernel_size: Of the convolution along the sequence, odd.
        **options: Of `ConvNNAttention`.

    Shape:
        (B, N, C) -> (B, N, C)
    """

    Options = BranchConvOptions

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        branch_ratio: float = 0.5,
        kernel_size: int = 9,
        **options,
    ):
        def other(width: int, num_heads: int) -> nn.Module:
            return ConvHeads(width, num_heads, kernel_size)

        super().__init__(width, num_heads, branch_ratio, "conv1d", other, **options)
