"""Neural nearest neighbors: a differentiable choice of the K nearest patches.

T. Plötz, S. Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12575. `layers.selection` turns distances into the weights of K neighbor
volumes; the layers here take distances and weighted sums over any sets, and over the patches of
images (`ops.patches`).

Symbols: B batch, M queries, N database items, O candidates of a query, K neighbor volumes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.cnn import channels_last, feature_cnn
from layers.record import Neighbors, grid_places, note, recording
from layers.selection import ConcreteNeighbors, HardNeighbors, NeuralNearestNeighbors
from ops.budget import chunk_bytes, pieces
from ops.patches.grid import PatchGrid, write_out
from ops.patches.tiles import (
    TileIndices,
    WindowTiles,
    aggregate_part,
    aggregate_tiles,
    distances_of_part,
    patch_norms,
    tile_distances,
)
from ops.patches.windows import Windows, window_aggregate, window_distances
from ops.relax import SATURATION
from ops.sets.candidates import candidate_aggregate, candidate_distances

__all__ = [
    "ConcreteBlock",
    "KNNBlock",
    "N3Aggregation",
    "N3Aggregation2d",
    "N3Block",
]


WINDOW_BYTES = 4 * 2**20  # weights of windows alive at a time in inference


class N3Aggregation(nn.Module):
    """Neural nearest neighbors over any sets: words, points, patches. Memory O(B·M·O), never M × N.

    Args:
        nnn: Turns distances into weights: `NeuralNearestNeighbors`, `HardNeighbors` or
            `ConcreteNeighbors`.

    Shape:
        items (B, N, F), item features (B, N, E), query features (B, M, E), indices (B, M, O) or
        (M, O), log temperature (B, M) -> (B, M, F, K).
    """

    def __init__(self, nnn: nn.Module | None = None) -> None:
        super().__init__()
        self.nnn = NeuralNearestNeighbors() if nnn is None else nnn

    def forward(
        self,
        items: Tensor,
        item_features: Tensor,
        query_features: Tensor,
        indices: Tensor,
        log_temp: Tensor | None = None,
    ) -> Tensor:
        """Sum the candidates of every query under the weights of each volume.

        Args:
            items: What is summed (B, N, F).
            item_features: What the items are matched by (B, N, E).
            query_features: What the queries are matched by (B, M, E).
            indices: Candidates of each query, positions among the items; leave a query's own item
                out of them.
            log_temp: Log temperature of each query, where it is external.

        Returns:
            Volumes (B, M, F, K).
        """
        if indices.ndim == 2:
            indices = indices.expand(items.shape[0], -1, -1)
        if indices.shape[-1] < self.nnn.K:
            raise ValueError(f"K = {self.nnn.K} neighbors asked of {indices.shape[-1]} candidates.")
        with torch.autocast(items.device.type, enabled=False):
            full = torch.float64 if items.dtype == torch.float64 else torch.float32
            distances = candidate_distances(
                query_features.to(full), item_features.to(full), indices
            )
            weights = self.nnn(distances, log_temp)  # (B, M, K, O)
            if recording():
                self._note(items.shape[1], indices, weights)
            volumes = candidate_aggregate(weights, items.to(full), indices)
        return volumes.transpose(-1, -2).to(items.dtype)

    def _note(self, count: int, indices: Tensor, weights: Tensor) -> None:
        """Tell the candidates of every query, and their weights by volume."""
        places = grid_places((count,), (0,), 1, weights.device)
        queries = grid_places((weights.shape[1],), (0,), 1, weights.device)
        note(
            Neighbors(
                self,
                (count,),
                queries,
                places,
                indices[:, None],
                weights.transpose(1, 2),
                group="volume",
                taken="embedding",
            )
        )


class N3Aggregation2d(nn.Module):
    """K neighbor volumes of an image: patches, windows, selection, weighted patches averaged back.

    Args:
        nnn: Selection, see `N3Aggregation`.
        patch_size: Side of a patch in pixels.
        stride: Distance of neighboring patches, at most `patch_size`.
        window: Side of the window of candidates in patches, odd; it shrinks on images with fewer
            patches.
        pad_mode: "zeros" or "reflect".
        temp_pool: Temperature of a patch: the "average" over its log-temperature pixels, or the
            "center" pixel.

    Shape:
        values (B, C, H, W), features (B, E, H, W), log temperature (B, 1, H, W) -> (B, K·C, H, W),
        volume-major.
    """

    def __init__(
        self,
        nnn: nn.Module | None = None,
        patch_size: int = 10,
        stride: int = 5,
        window: int = 15,
        pad_mode: str = "zeros",
        temp_pool: str = "average",
    ) -> None:
        super().__init__()
        for name, side in {"patch_size": patch_size, "stride": stride, "window": window}.items():
            if not isinstance(side, int):
                raise ValueError(
                    f"{name} takes one whole number (got {side!r}): patches and windows are square."
                )
        if patch_size < 1 or not 1 <= stride <= patch_size:
            raise ValueError(
                f"stride must be between 1 and patch_size, got stride {stride} and patch_size "
                f"{patch_size}."
            )
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}: a query sits in the middle of it.")
        if pad_mode not in ("zeros", "reflect"):
            raise ValueError(f"pad_mode must be 'zeros' or 'reflect', got {pad_mode!r}.")
        if temp_pool not in ("average", "center"):
            raise ValueError(f"temp_pool must be 'average' or 'center', got {temp_pool!r}.")
        self.aggregation = N3Aggregation(nnn)
        K = self.aggregation.nnn.K
        if window * window - 1 < K:
            raise ValueError(
                f"K = {K} neighbors asked of {window * window - 1} candidates (a window of "
                f"{window}x{window} patches without the query itself)."
            )
        self.patch_size = patch_size
        self.stride = stride
        self.window = window
        self.pad_mode = pad_mode
        self.temp_pool = temp_pool

    def grid(self, height: int, width: int, pad_start: tuple[int, int] | None = None) -> PatchGrid:
        """Patches of an image; refuses one with too few for K neighbors."""
        grid = PatchGrid(height, width, self.patch_size, self.stride, pad_start, self.pad_mode)
        found = min(self.window, grid.rows) * min(self.window, grid.cols) - 1
        if found < self.aggregation.nnn.K:
            raise ValueError(
                f"K = {self.aggregation.nnn.K} neighbors asked of {found} candidates: an image of "
                f"{height}x{width} has {grid.rows}x{grid.cols} patches of side "
                f"{self.patch_size} at stride {self.stride}."
            )
        return grid

    def patch_temperatures(self, log_temp: Tensor, grid: PatchGrid) -> Tensor:
        """Log temperature of every patch (B, M) from padded pixels (B, 1, Hp, Wp)."""
        if self.temp_pool == "average":
            return F.avg_pool2d(log_temp, self.patch_size, self.stride).flatten(1)
        middle = self.patch_size // 2
        centers = log_temp[:, 0, middle :: self.stride, middle :: self.stride]
        return centers[:, : grid.rows, : grid.cols].flatten(1)

    def forward(
        self,
        values: Tensor,
        features: Tensor,
        log_temp: Tensor | None = None,
        pad_start: tuple[int, int] | None = None,
    ) -> Tensor:
        """Average, in every pixel, what the neighbors of the patches over it have there.

        Args:
            values: Image to take patches of (B, C, H, W).
            features: Image the patches are matched by (B, E, H, W).
            log_temp: Log-temperature image (B, 1, H, W), where the temperature is external.
            pad_start: Rows and columns of padding at the top and left, see `PatchGrid`.

        Returns:
            Volumes (B, K·C, H, W): all channels of the nearest, then of the second nearest, and so
                on.
        """
        height, width = values.shape[2:]
        grid = self.grid(height, width, pad_start)
        with torch.autocast(values.device.type, enabled=False):
            full = torch.float64 if values.dtype == torch.float64 else torch.float32
            images = grid.pad(values.to(full))
            features = grid.pad(features.to(full))
            # Distances are unchanged by a common shift, and lose fewer digits around zero.
            features = features - features.detach().mean((2, 3), keepdim=True)
            if log_temp is not None:
                log_temp = self.patch_temperatures(grid.pad(log_temp.to(full)), grid)
            by_window = Windows.usable(grid, images, features)
            volumes = self._by_windows if by_window else self._by_tiles
            return volumes(images, features, log_temp, grid).to(values.dtype)

    def _by_windows(
        self, images: Tensor, features: Tensor, log_temp: Tensor | None, grid: PatchGrid
    ) -> Tensor:
        """Volumes from padded images and features and log temperatures (B, M), compiled."""
        nnn, windows = self.aggregation.nnn, Windows(grid, self.window, images.device)
        if torch.is_grad_enabled() or nnn.needs_all or recording():
            distances = window_distances(features, windows)  # (B, M, O)
            weights = nnn(distances, log_temp, windows.barred(0, grid.rows))
            if recording():
                self._note(windows.candidates(), weights, grid)
            return window_aggregate(weights, images, windows)
        (b, c), n = images.shape[:2], grid.cols
        out = images.new_empty(b, nnn.K * c, grid.height, grid.width)
        columns, rows = windows.columns(features), windows.rows(images)
        row_bytes = 4 * n * (nnn.K + 2) * math.prod(windows.size)
        budget = WINDOW_BYTES if images.device.type == "cpu" else chunk_bytes(images.device)
        for s, blocks in pieces(b, grid.block_rows, budget // row_bytes):
            first, last = blocks.start, blocks.stop
            begin, end = max(0, first - grid.ratio + 1), min(grid.rows, last)
            distances = windows.distances(columns[s], begin, end)
            here = None if log_temp is None else log_temp[s, begin * n : end * n]
            weights = nnn(distances, here, windows.barred(begin, end)).contiguous()
            windows.aggregate(weights, rows[s], out[s], (begin, end), (first, last))
        return out

    def _by_tiles(
        self, images: Tensor, features: Tensor, log_temp: Tensor | None, grid: PatchGrid
    ) -> Tensor:
        """Volumes from padded images and features and log temperatures (B, M)."""
        blocks, matched = grid.to_blocks(images), grid.to_blocks(features)
        device, dtype = images.device, images.dtype
        tiles = WindowTiles(grid.rows, grid.cols, self.window, grid.ratio, device, dtype)
        if torch.is_grad_enabled() or self.aggregation.nnn.needs_all or recording():
            distances = tile_distances(matched, tiles)  # (B, T, p, q, u, v)
            part = tiles.part(slice(None))
            weights = self._select(distances, log_temp, part)
            if recording():
                self._note(*part.by_query(weights), grid)
            sums = aggregate_tiles(weights, blocks, tiles)  # (B, G, K, F)
        else:
            sums = self._stream(matched, blocks, log_temp, tiles)
        return grid.from_blocks(sums, images.shape[1])

    def _select(self, distances: Tensor, log_temp: Tensor | None, part: TileIndices) -> Tensor:
        """Weights (B, T, p, q, K, u, v) from distances (B, T, p, q, u, v) of some tiles."""
        barred, counted = part.barred.flatten(-2), None
        if part.fresh is not None and self.aggregation.nnn.needs_all:
            counted = barred.exp() * part.fresh[..., None]
        if log_temp is not None:
            log_temp = log_temp[:, part.query]
        weights = self.aggregation.nnn(distances.flatten(-2), log_temp, barred, counted)
        return weights.unflatten(-1, distances.shape[-2:])

    def _stream(
        self, matched: Tensor, blocks: Tensor, log_temp: Tensor | None, tiles: WindowTiles
    ) -> Tensor:
        """Sums (B, G, K, F), some tiles at a time; for inference."""
        K = self.aggregation.nnn.K
        b, g, f = blocks.shape
        out = blocks.new_zeros(b, g, K * f)
        norms = patch_norms(matched, tiles.grid, tiles.ratio)
        for s, some in tiles.pieces(blocks, 2 * K):
            part = tiles.part(some)
            distances = distances_of_part(matched[s], norms[s], part, tiles.ratio)
            here = None if log_temp is None else log_temp[s]
            weights = self._select(distances, here, part)
            aggregate_part(weights, blocks[s], part, tiles.ratio, out[s])
        return out.view(b, g, K, f)

    def _note(self, candidates: Tensor, weights: Tensor, grid: PatchGrid) -> None:
        """Tell the candidates (M, O) of every patch, and their weights (B, M, K, O)."""
        middle = (grid.patch - 1) / 2
        first = (middle - grid.pads[0], middle - grid.pads[2])
        places = grid_places((grid.rows, grid.cols), first, grid.stride, weights.device)
        note(
            Neighbors(
                self,
                (grid.height, grid.width),
                places,
                places,
                candidates[None, None],
                weights.transpose(1, 2),
                group="volume",
                extent=grid.patch,
                taken="patches",
            )
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"patch_size={self.patch_size}, stride={self.stride}, window={self.window}, "
            f"pad_mode={self.pad_mode!r}, temp_pool={self.temp_pool!r}"
        )


class _NonlocalBlock(nn.Module):
    """Input beside what its neighbor volumes add to it; subclasses set the parts."""

    embedcnn: nn.Module | None
    tempcnn: nn.Module | None
    n3aggregation: N3Aggregation2d

    @property
    def volumes(self) -> int:
        """Number of neighbor volumes K."""
        return self.n3aggregation.aggregation.nnn.K

    def forward(
        self, x: Tensor, matched: Tensor | None = None, pad_start: tuple[int, int] | None = None
    ) -> Tensor:
        """Gather the neighbors of every patch.

        Args:
            x: Feature maps (B, C, H, W) of any height and width.
            matched: Features to match patches by (B, E, H, W); None: the embedding of x, or x
                where there is none.
            pad_start: Rows and columns of padding at the top and left, see `PatchGrid`.

        Returns:
            x, then each volume minus x: (B, (K + 1)·C, H, W).
        """
        inner = x if self.embedcnn is None and self.tempcnn is None else channels_last(x)
        if matched is None:
            matched = x if self.embedcnn is None else self.embedcnn(inner)
        log_temp = None if self.tempcnn is None else self.tempcnn(inner)
        z = self.n3aggregation(x, matched, log_temp, pad_start)
        return _JoinVolumes.apply(x, z)


class _JoinVolumes(torch.autograd.Function):
    """x (B, C, H, W) beside the volumes (B, K·C, H, W) minus x, without temporary copies."""

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor) -> Tensor:
        b, c, height, width = x.shape
        ctx.volumes = z.shape[1] // c
        out = x.new_empty(b, c + z.shape[1], height, width)
        out[:, :c] = x
        z = z.unflatten(1, (ctx.volumes, c))
        write_out(torch.sub, z, x[:, None], out[:, c:].unflatten(1, (ctx.volumes, c)))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        c = grad.shape[1] // (ctx.volumes + 1)
        grad_z = grad[:, c:]
        return grad[:, :c] - grad_z.unflatten(1, (ctx.volumes, c)).sum(1), grad_z


class N3Block(_NonlocalBlock):
    """Neural nearest neighbors block for images, with its published defaults.

    Args:
        in_channels: Channels C of the input.
        K: Neighbor volumes; the output has (K + 1)·C channels.
        patch_size: Side of a patch in pixels.
        stride: Distance of neighboring patches in pixels.
        window: Side of the window of candidate patches, odd; the query itself is excluded.
        embed_channels: Channels of the embedding; 0: no embedding network, patches of the input
            (or of the features given to `forward`) are compared as they are.
        embed_features: Channels inside the embedding and temperature networks.
        embed_depth: Convolutions in each of these networks.
        temperature: "image": a network gives one for every pixel; "learned": one scalar; "fixed":
            1 (times the bias).
        temp_bias: Its logarithm is added to the log temperature; 0 adds nothing.
        temp_pool: "average" over a patch (published code) or its "center" pixel (paper text).
        distance_bn: Scale distances by a batch norm.
        pad_mode: "zeros" (published) or "reflect", for what the patch grid needs around the image.
        bn_momentum: Weight of a new batch in the running statistics of the networks.
        saturation: See `relaxed_selection`.

    Shape:
        (B, C, H, W) -> (B, (K + 1)·C, H, W).

    References:
        Plötz & Roth, NeurIPS 2018, arXiv 1810.12575, sections 3 and 4.
    """

    def __init__(
        self,
        in_channels: int = 8,
        K: int = 7,
        patch_size: int = 10,
        stride: int = 5,
        window: int = 15,
        embed_channels: int = 8,
        embed_features: int = 64,
        embed_depth: int = 3,
        temperature: str = "image",
        temp_bias: float = 0.1,
        temp_pool: str = "average",
        distance_bn: bool = True,
        pad_mode: str = "zeros",
        bn_momentum: float = 0.001,
        saturation: float = SATURATION,
    ) -> None:
        super().__init__()
        if temperature not in ("image", "learned", "fixed"):
            raise ValueError(
                f"temperature must be 'image', 'learned' or 'fixed', got {temperature!r}."
            )

        def network(channels: int) -> nn.Module:
            return feature_cnn(in_channels, channels, embed_features, embed_depth, bn_momentum)

        self.embedcnn = network(embed_channels) if embed_channels else None
        self.tempcnn = network(1) if temperature == "image" else None
        nnn = NeuralNearestNeighbors(
            K,
            temperature="learned" if temperature == "learned" else "external",
            temp_bias=temp_bias,
            distance_bn=distance_bn,
            saturation=saturation,
        )
        self.n3aggregation = N3Aggregation2d(nnn, patch_size, stride, window, pad_mode, temp_pool)


class KNNBlock(_NonlocalBlock):
    """Hard twin of `N3Block`: the K nearest patches.

    Patches are matched on the features given to `forward`, or on the input itself.

    Args:
        K: Neighbors.
        patch_size: Side of a patch in pixels.
        stride: Distance of neighboring patches in pixels.
        window: Side of the window of candidate patches, odd; the query itself is excluded.
        pad_mode: "zeros" or "reflect".

    Shape:
        (B, C, H, W) -> (B, (K + 1)·C, H, W).
    """

    def __init__(
        self,
        K: int = 7,
        patch_size: int = 10,
        stride: int = 5,
        window: int = 15,
        pad_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.embedcnn = self.tempcnn = None
        self.n3aggregation = N3Aggregation2d(HardNeighbors(K), patch_size, stride, window, pad_mode)


class ConcreteBlock(_NonlocalBlock):
    """Stochastic twin of `N3Block`: an embedding and Concrete samples, the annealing learned.

    Args:
        in_channels: Channels C of the input.
        K: Neighbor volumes.
        patch_size: Side of a patch in pixels.
        stride: Distance of neighboring patches in pixels.
        window: Side of the window of candidate patches, odd; the query itself is excluded.
        embed_channels: Channels of the embedding; 0: none.
        embed_features: Channels inside the embedding network.
        embed_depth: Convolutions in the embedding network.
        distance_bn: Scale distances by a batch norm.
        annealing: Starting value of the annealing parameter.
        pad_mode: "zeros" or "reflect".
        bn_momentum: Weight of a new batch in the running statistics of the network.

    Shape:
        (B, C, H, W) -> (B, (K + 1)·C, H, W).
    """

    def __init__(
        self,
        in_channels: int = 8,
        K: int = 7,
        patch_size: int = 10,
        stride: int = 5,
        window: int = 15,
        embed_channels: int = 8,
        embed_features: int = 64,
        embed_depth: int = 3,
        distance_bn: bool = True,
        annealing: float = 0.1,
        pad_mode: str = "zeros",
        bn_momentum: float = 0.001,
    ) -> None:
        super().__init__()
        self.embedcnn = (
            feature_cnn(in_channels, embed_channels, embed_features, embed_depth, bn_momentum)
            if embed_channels
            else None
        )
        self.tempcnn = None
        nnn = ConcreteNeighbors(K, distance_bn=distance_bn, annealing=annealing)
        self.n3aggregation = N3Aggregation2d(nnn, patch_size, stride, window, pad_mode)
