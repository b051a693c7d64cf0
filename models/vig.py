"""Vision graph networks: patches are nodes that look at the nodes most like them.

Reference: Han et al., Vision GNN: An Image is Worth Graph of Nodes, NeurIPS 2022,
https://arxiv.org/abs/2206.00272. Symbols: B batch, N nodes, C channels, K neighbors, D dilation,
P pixels of an image along a node.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.graph import normalize_rows
from layers.record import Neighbors, grid_places, note, recording
from models.width import WidthOptions
from ops.maps.pairs import nearest_rows
from options import option

__all__ = ["PyramidViG", "ViG"]


@dataclass(frozen=True)
class Size:
    """Blocks, channels and pooling of the keys of each stage; how K grows to the last block."""

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    pools: tuple[int, ...]
    growth: int


HEAD = 1024  # channels between the mean of all nodes and the classes


@dataclass(frozen=True)
class ViGOptions(WidthOptions):
    """Size and parts of the network."""

    title = "Vision graph networks (vig_tiny, pvig_tiny)"
    patch_size: int = option(
        16, "pixels along a node of the first stage, a power of two", least=1, most=4096
    )
    K: int = option(
        9, "neighbors of a node; they grow to twice as many in vig_tiny", least=1, most=10**6
    )
    max_dilation: int = option(
        None,
        "every fourth block looks one wider, at every d-th of its K·d nearest, up to this d; not "
        "given: as far as there are nodes",
        kind=int,
        least=1,
        most=10**6,
    )
    position_bias: bool = option(
        True, "nodes that lie close are more alike: a fixed code of their distance is added"
    )
    drop_path: float = option(
        0.1,
        "share of the blocks left out of a sample in training, in the last block",
        least=0,
        below=1,
    )
    dropout: float = option(0.0, "dropout before the classifier", least=0, below=1)

    def __post_init__(self) -> None:
        """Refuse patches that no number of halvings makes."""
        super().__post_init__()
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(
                f"patch_size {self.patch_size} is no power of two: the stem halves an image until "
                "a patch is one node. Try 1, 2, 4, 8 or 16."
            )


@dataclass(frozen=True)
class PyramidViGOptions(ViGOptions):
    """The same in stages."""

    patch_size: int = option(
        4, "pixels along a node of the first stage, a power of two", least=1, most=4096
    )


class Linear(nn.Module):
    """A linear map of rows and batch norm: (B, N, C) -> (B, N, O)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows."""
        return normalize_rows(self.norm, self.linear(x))


class DropPath(nn.Module):
    """Leave a branch out of some samples in training; the others weigh more."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Multiply samples by 0 or by 1 / (1 - share)."""
        if not self.training or self.share == 0:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.share
        return x * (kept.to(x.dtype) / (1 - self.share))

    def extra_repr(self) -> str:
        """Show the share."""
        return f"{self.share:.3g}"


class Block(nn.Module):
    """A grapher, x + fc(GELU(layer(fc(x)))), and an MLP, x + fc(GELU(fc(x))).

    Args:
        layer: `layer(in_channels=, out_channels=) -> nn.Module`, see `layers.graph`.
        channels: C.
        K: Neighbors of a node.
        dilation: D.
        pool: Keys are means of so many nodes along both sides.
        drop_path: Share of samples without a branch.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        channels: int,
        K: int,
        dilation: int,
        pool: int,
        drop_path: float,
    ):
        super().__init__()
        self.K, self.dilation, self.pool = K, dilation, pool
        self.fc1, self.fc2 = Linear(channels, channels), Linear(2 * channels, channels)
        self.graph = layer(in_channels=channels, out_channels=2 * channels)
        self.mlp1, self.mlp2 = Linear(channels, 4 * channels), Linear(4 * channels, channels)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, sides: tuple[int, int], position: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Transform nodes (B, N, C) of a map of these sides."""
        if x.is_meta:
            return torch.empty_like(x)
        y = self.fc1(x)
        keys = None if self.pool == 1 else pool_nodes(y, sides, self.pool)
        indices = nearest_rows(
            y, y if keys is None else keys, self.K, position=position, dilation=self.dilation
        )[1]
        if recording():
            self._note(indices, sides)
        y = self.fc2(F.gelu(self.graph(y, indices, keys)))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp2(F.gelu(self.mlp1(x))))

    def _note(self, indices: Tensor, sides: tuple[int, int]) -> None:
        """Tell which nodes (B, N, K) were taken, squares of nodes where they are pooled."""
        pool, device = self.pool, indices.device
        middle = (pool - 1) / 2
        pooled = [side // pool for side in sides]
        places = grid_places(pooled, (middle, middle), pool, device)
        queries = grid_places(sides, (0, 0), 1, device)
        note(Neighbors(self, tuple(sides), queries, places, indices[:, None], extent=pool))

    def extra_repr(self) -> str:
        """Show who looks at whom."""
        return f"K={self.K}, dilation={self.dilation}, pool={self.pool}"


def pool_nodes(x: Tensor, sides: tuple[int, int], pool: int) -> Tensor:
    """Average squares of a map of nodes: (B, H·W, C) -> (B, H·W / pool², C)."""
    b, _, c = x.shape
    h, w = (side // pool for side in sides)
    return x.view(b, h, pool, w, pool, c).mean((2, 4)).view(b, h * w, c)


def position_features(sides: tuple[int, int], channels: int, pool: int) -> tuple[Tensor, Tensor]:
    """Return features (N, P) of nodes and (M, P) of keys whose products are the position bias.

    The bias of two nodes is the mean over channels of the product of their sine codes, a sum of one
    function of their distance along each axis: the features are the roots of these two small
    tables, at most as many as a map has rows and columns.
    """
    parts = []
    for axis, side in enumerate(sides):
        waves = np.arange(side)[:, None] / 10000.0 ** (
            np.arange(max(1, channels // 4)) / max(1, channels // 4)
        )
        table = np.cos(waves[:, None] - waves[None]).mean(2) / 4  # (side, side)
        values, vectors = np.linalg.eigh(table)
        kept = values > 1e-8 * values.max()  # below what float32 tells apart
        root = vectors[:, kept] * np.sqrt(values[kept])  # (side, P)
        shape = (*sides, root.shape[1])
        parts.append(np.broadcast_to(np.expand_dims(root, 1 - axis), shape))
    features = torch.from_numpy(np.concatenate(parts, 2).astype(np.float32)).flatten(0, 1)
    return features, pool_nodes(features[None], sides, pool)[0]


class Stage(nn.Module):
    """Blocks over the nodes of one map; of each K, dilation and drop path."""

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        channels: int,
        sides: tuple[int, int],
        pool: int,
        blocks: list[tuple[int, int, float]],
        position_bias: bool,
    ):
        super().__init__()
        self.sides, self.position_bias = sides, position_bias
        if position_bias:
            features = position_features(sides, channels, pool)
            for name, values in zip(("queries", "keys"), features, strict=True):
                self.register_buffer(f"position_{name}", values, persistent=False)
        self.blocks = nn.ModuleList(
            Block(layer, channels, K, dilation, pool, drop_path)
            for K, dilation, drop_path in blocks
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map (B, C, H, W)."""
        rows = x.flatten(2).transpose(1, 2).contiguous()  # (B, N, C)
        position = (self.position_queries, self.position_keys) if self.position_bias else None
        for block in self.blocks:
            rows = block(rows, self.sides, position)
        return rows.transpose(1, 2).unflatten(2, self.sides)


def halving(in_channels: int, out_channels: int, stride: int = 2) -> list[nn.Module]:
    """Return a 3×3 convolution and its norm."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def build_stem(in_channels: int, channels: int, patch_size: int) -> nn.Sequential:
    """Halve an image until a patch is a node, channels doubling, then look around once more."""
    count = int(math.log2(patch_size))
    widths = [max(1, channels >> step) for step in range(count - 1, -1, -1)]
    steps: list[nn.Module] = []
    for c, o in zip([in_channels, *widths], widths, strict=False):
        steps += [*halving(c, o), nn.GELU()]
    return nn.Sequential(*steps, *halving(widths[-1] if widths else in_channels, channels, 1))


class ViG(nn.Module):
    """Classify images by a graph over their patches, one map of nodes from the stem to the head.

    A block's nodes look at the K nearest by cosine of their features plus the position bias, every
    D-th of the K·D nearest; D grows by one every four blocks. Weights that a batch norm follows
    have no bias.

    Args:
        layer: `layer(in_channels=, out_channels=) -> nn.Module`, see `layers.graph`.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        image_size: Their height and width.
        patch_size: P, a power of two that divides both; None: 16 (4 in stages).
        K: Neighbors in the first block; growing to twice as many in the last one.
        max_dilation: Largest D; None: as far as a block has nodes.
        position_bias: Add the bias.
        drop_path: Share of samples without a branch in the last block; from none in the first one.
        dropout: Before the classifier.
        width: Factor of all channels, which are rounded to multiples of eight.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes)

    Raises:
        ValueError: for a patch size that does not divide the image, and for more neighbors than
            nodes.
    """

    Options = ViGOptions
    defaults: ClassVar[dict] = {
        "layer": "MaxRelative",
        "resize": 224,
        "lr": 2e-3,
        "weight_decay": 0.05,
        "scheduler": "cosine",
    }
    family = "ViG"
    tasks = ("classification",)
    training = "gradient"
    uses_layer = True
    layer_kind = "graph"
    min_input_size = 1
    size: ClassVar[Size] = Size((12,), (192,), (1,), 2)

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: tuple[int, int] = (224, 224),
        patch_size: int | None = None,
        K: int = 9,
        max_dilation: int | None = None,
        position_bias: bool = True,
        drop_path: float = 0.1,
        dropout: float = 0.0,
        width: float = 1.0,
    ):
        super().__init__()
        patch_size = self.Options.defaults()["patch_size"] if patch_size is None else patch_size
        self.Options(
            patch_size=patch_size,
            K=K,
            max_dilation=max_dilation,
            position_bias=position_bias,
            drop_path=drop_path,
            dropout=dropout,
            width=width,
        )
        self.image_size = tuple(image_size)
        channels = [8 * max(1, round(c * width / 8)) for c in self.size.channels]
        sides = stage_sides(self.image_size, patch_size, self.size.pools)
        self.stem = build_stem(in_channels, channels[0], patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, channels[0], *sides[0]))
        schedule = self.schedule(sides, K, max_dilation, drop_path)
        stages: list[nn.Module] = []
        for i, blocks in enumerate(schedule):
            if i:
                stages.append(nn.Sequential(*halving(channels[i - 1], channels[i])))
            pool = self.size.pools[i]
            stages.append(Stage(layer, channels[i], sides[i], pool, blocks, position_bias))
        self.stages = nn.Sequential(*stages)
        hidden = 8 * max(1, round(HEAD * width / 8))
        self.classifier = nn.Sequential(
            nn.Linear(channels[-1], hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def schedule(
        self, sides: list[tuple[int, int]], K: int, max_dilation: int | None, drop_path: float
    ) -> list[list[tuple[int, int, float]]]:
        """Return K, dilation and drop path of every block of every stage, or refuse too large K."""
        total, found, number = sum(self.size.blocks), [], 0
        for stage, count in enumerate(self.size.blocks):
            candidates = math.prod(side // self.size.pools[stage] for side in sides[stage])
            blocks = []
            for _ in range(count):
                share = number / max(1, total - 1)
                mine = int(K * (1 + share * (self.size.growth - 1)) + 1e-6)
                most = max(1, candidates // mine) if max_dilation is None else max_dilation
                dilation = min(number // 4 + 1, most)
                number += 1
                check_candidates(number, mine, dilation, candidates)
                blocks.append((mine, dilation, share * drop_path))
            found.append(blocks)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if x.shape[2:] != self.image_size:
            raise ValueError(
                f"this ViG has nodes for images of {self.image_size[0]} x {self.image_size[1]} "
                f"pixels (got {x.shape[2]} x {x.shape[3]})."
            )
        x = self.stages(self.stem(x) + self.pos_embed)
        return self.classifier(x.mean((2, 3)))


class PyramidViG(ViG):
    """Classify images by graphs in four stages, the nodes of each a quarter of those before.

    In the first stages nodes look at means of 4×4 and 2×2 nodes. Arguments as in `ViG`, but K
    stays the same.
    """

    Options = PyramidViGOptions
    size = Size((2, 2, 6, 2), (48, 96, 240, 384), (4, 2, 1, 1), 1)


def stage_sides(
    image_size: tuple[int, int], patch_size: int, pools: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return the sides of the maps of nodes, or refuse an image that they do not fit."""
    found = []
    for stage, pool in enumerate(pools):
        step = patch_size << stage
        if any(side % (step * pool) for side in image_size):
            stages = ""
            if len(pools) > 1:
                squares = "" if pool == 1 else f", and their keys are {pool} x {pool} of them"
                stages = f" (nodes of stage {stage + 1} have {step} x {step} pixels{squares})"
            raise ValueError(
                f"patch_size {patch_size} does not divide images of {image_size[0]} x "
                f"{image_size[1]} pixels: they are cut into whole patches{stages}. Try another "
                "patch_size or resize."
            )
        found.append(tuple(side // step for side in image_size))
    return found


def check_candidates(block: int, K: int, dilation: int, candidates: int) -> None:
    """Refuse a block whose nodes would look at more nodes than there are."""
    if K * dilation <= candidates:
        return
    of = "" if dilation == 1 else f" with dilation {dilation} looks at {K * dilation} and"
    raise ValueError(
        f"K={K}{of} is larger than the number of nodes to choose from in block {block}, "
        f"{candidates}. Try a smaller K, max_dilation or patch_size, or a larger resize."
    )
