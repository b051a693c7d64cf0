"""N3Net: denoising networks in turn with neural nearest neighbors blocks.

T. Plötz, S. Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12575. Parameter names and shapes are those of the published
checkpoints, which `checkpoints.load_pretrained` reads (a file that the user has; it may not be
passed on).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from layers.n3 import ConcreteBlock, KNNBlock, N3Block
from models.dncnn import OWN_LAYER, DnCNN, DnCNNOptions, momentum_for
from options import OptionError, option

__all__ = ["PRESETS", "N3Net", "check_window"]

# Rows of the paper's tables, and other networks to compare with them: model, and the options that
# differ from its defaults.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dncnn17": ("dncnn", {"depth": 17}),
    "dncnn18": ("dncnn", {"depth": 18}),
    "knn_input": ("n3net", {"num_blocks": 1, "nonlocal_block": "knn", "match_on": "input"}),
    "knn_dncnn": ("n3net", {"num_blocks": 1, "nonlocal_block": "knn", "match_on": "dncnn"}),
    "concrete": ("n3net", {"num_blocks": 1, "nonlocal_block": "concrete"}),
    "n3net_light": ("n3net", {"num_blocks": 1}),
    "n3net": ("n3net", {"num_blocks": 2}),
    # Super-resolution, section 5.3: three parts of depth 7; and its baseline.
    "n3net_sr": (
        "n3net",
        {"task": "super_resolution", "depth": 7, "num_blocks": 2, "scale": [2, 3, 4]},
    ),
    "vdsr": (
        "dncnn",
        {"task": "super_resolution", "depth": 20, "batch_norm": False, "scale": [2, 3, 4]},
    ),
    # Nonlocal and recurrent: as published, and of a size that a CPU trains.
    "nlrn": ("nlrn", {}),
    "nlrn_small": (
        "nlrn",
        {
            "features": 96,
            "embed_channels": 32,
            "recurrences": 8,
            "window": 15,
            "K": 9,
            "fold": 2,
        },
    ),
}


def check_window(window: int) -> None:
    """Refuse a window without a middle."""
    if window % 2 == 0:
        raise OptionError(
            f"window {window} is even: a query sits in the middle of its window. "
            f"Try {window - 1} or {window + 1}."
        )


@dataclass(frozen=True)
class N3NetOptions(DnCNNOptions):
    """DnCNNs and the nonlocal blocks between them."""

    depth: int = option(6, "convolutions of (each) DnCNN", least=2, most=100)
    num_blocks: int = option(2, "n3net: nonlocal blocks; 1 is light", least=0, most=20)
    block_channels: int = option(8, "n3net: channels into a block", least=1, most=10**10)
    nonlocal_block: str = option(
        "n3",
        "n3net: neural, hard or stochastic nearest neighbors, or nothing, between the DnCNNs",
        choices=("n3", "knn", "concrete", "none"),
    )
    match_on: str = option(
        None,
        "n3net: compare patches by a learned embedding (not knn), by the noisy input or by "
        "the output of the DnCNN before; not given: embedding, for knn dncnn",
        choices=("embedding", "input", "dncnn"),
    )
    num_volumes: int = option(7, "n3net: neighbors of a patch", least=1, most=10**4)
    patch_size: int = option(10, "n3net: side of a patch, in pixels", least=1, most=255)
    patch_stride: int = option(5, "n3net: step between patches", least=1, most=255)
    window: int = option(15, "n3net: side of the window, in patches; odd", least=1, most=255)
    embed_channels: int = option(8, "n3net: channels of the embedding", least=1, most=10**10)
    embed_features: int = option(64, "n3net: channels on the way there", least=1, most=10**10)
    embed_depth: int = option(3, "n3net: convolutions on the way there", least=1, most=100)
    temperature: str = option(
        "image",
        "n3net: temperature of n3 blocks: a network's for every patch, one number, or fixed",
        choices=("image", "learned", "fixed"),
    )
    temp_bias: float = option(
        0.1,
        "n3net: its logarithm is added to the log temperature; 0 adds nothing",
        least=0,
        most=1e12,
    )
    temp_pool: str = option(
        "average",
        "n3net: temperature of a patch: average over it (published code) or center pixel",
        choices=("average", "center"),
    )
    distance_bn: bool = option(True, "n3net: batch norm of distances")
    pad_mode: str = option(
        "zeros",
        "n3net: what the grid of patches sees beyond the border; zeros is published",
        choices=("zeros", "reflect"),
    )

    def __post_init__(self) -> None:
        """Refuse windows without a middle, and choices that nothing would train."""
        super().__post_init__()
        check_window(self.window)
        if self.nonlocal_block == "knn" and self.match_on == "embedding":
            raise ValueError(
                "nonlocal_block knn cannot match on an embedding: no gradient passes a hard "
                "choice, so nothing would train it. Match on input or dncnn."
            )


class N3Net(nn.Module):
    """DnCNN, nonlocal block, DnCNN, …: the published network with default options.

    Args:
        in_channels: Channels of the noisy image.
        out_channels: Channels of the output; None: as many as the input has.
        num_blocks: Gaps between the DnCNNs, each filled by a nonlocal block; 2, or 1 ("light").
        depth: Convolutions of each DnCNN.
        features: Channels inside the DnCNNs.
        block_channels: Channels C that go into each gap; (K + 1)·C come out of a nonlocal block.
        nonlocal_block: "n3", "knn" (hard choice), "concrete" (stochastic) or "none".
        match_on: What patches are compared by: their learned "embedding", the noisy "input", or the
            output of the "dncnn" before the block. None: "embedding", for knn "dncnn".
        num_volumes: Neighbor volumes K of a nonlocal block.
        patch_size: Side of a patch in pixels.
        patch_stride: Distance of neighboring patches in pixels.
        window: Side of the window of candidate patches, odd; the query itself is excluded.
        embed_channels: Channels of the embedding.
        embed_features: Channels inside embedding and temperature networks.
        embed_depth: Convolutions of embedding and temperature networks.
        temperature: "image" (a network), "learned" (one number) or "fixed".
        temp_bias: Its logarithm is added to the log temperature; 0 adds nothing.
        temp_pool: "average" over a patch or its "center" pixel.
        distance_bn: Scale distances by a batch norm.
        pad_mode: "zeros" (published) or "reflect", around the grid of patches.
        batch_norm: Batch norm in the DnCNNs.
        residual: Add the input of each DnCNN to the channels that it shares with the output.
        bn_momentum: Weight of a new batch in the running statistics of batch norm; None: see
            `models.dncnn.momentum_for`.
        num_steps: Training steps of the run, which decide on bn_momentum if it is None.
        layer: What takes the place of the DnCNNs' inner convolutions; None: 3×3 convolutions.

    Shape:
        Noisy images (B, in_channels, H, W) in [0, 1], not clipped -> (B, out_channels, H, W).
    """

    Options = N3NetOptions
    defaults: ClassVar[dict] = {"dataset": "photos"}
    own_layer = OWN_LAYER
    # Allocated by the published code, never applied: 64 gains, biases, means and variances each.
    dead_weights = r"blocks\.\d+\.bn1\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    family = "N3Net"
    tasks = ("denoising", "super_resolution")
    training = "gradient"
    uses_layer = True
    min_input_size = 1

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        num_blocks: int = 2,
        depth: int = 6,
        features: int = 64,
        block_channels: int = 8,
        nonlocal_block: str = "n3",
        match_on: str | None = None,
        num_volumes: int = 7,
        patch_size: int = 10,
        patch_stride: int = 5,
        window: int = 15,
        embed_channels: int = 8,
        embed_features: int = 64,
        embed_depth: int = 3,
        temperature: str = "image",
        temp_bias: float = 0.1,
        temp_pool: str = "average",
        distance_bn: bool = True,
        pad_mode: str = "zeros",
        batch_norm: bool = True,
        residual: bool = True,
        bn_momentum: float | None = None,
        num_steps: int = 0,
        layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        N3NetOptions(
            depth=depth,
            features=features,
            batch_norm=batch_norm,
            residual=residual,
            bn_momentum=bn_momentum,
            num_blocks=num_blocks,
            block_channels=block_channels,
            nonlocal_block=nonlocal_block,
            match_on=match_on,
            num_volumes=num_volumes,
            patch_size=patch_size,
            patch_stride=patch_stride,
            window=window,
            embed_channels=embed_channels,
            embed_features=embed_features,
            embed_depth=embed_depth,
            temperature=temperature,
            temp_bias=temp_bias,
            temp_pool=temp_pool,
            distance_bn=distance_bn,
            pad_mode=pad_mode,
        )
        match_on = match_on or ("dncnn" if nonlocal_block == "knn" else "embedding")
        bn_momentum = momentum_for(num_steps) if bn_momentum is None else bn_momentum
        out_channels = in_channels if out_channels is None else out_channels
        self.match_on = match_on
        self.patch_stride = patch_stride
        self.patch_size = patch_size
        self.window = window

        geometry = {
            "K": num_volumes,
            "patch_size": patch_size,
            "stride": patch_stride,
            "window": window,
        }
        geometry["pad_mode"] = pad_mode
        embedding = {
            "in_channels": block_channels,
            "embed_channels": embed_channels if match_on == "embedding" else 0,
            "embed_features": embed_features,
            "embed_depth": embed_depth,
            "distance_bn": distance_bn,
            "bn_momentum": bn_momentum,
        }

        def block() -> nn.Module:
            if nonlocal_block == "knn":
                return KNNBlock(**geometry)
            if nonlocal_block == "concrete":
                return ConcreteBlock(**geometry, **embedding)
            return N3Block(
                **geometry,
                **embedding,
                temperature=temperature,
                temp_bias=temp_bias,
                temp_pool=temp_pool,
            )

        def dncnn(inputs: int, outputs: int) -> nn.Module:
            return DnCNN(
                inputs,
                outputs,
                depth=depth,
                features=features,
                batch_norm=batch_norm,
                residual=residual,
                bn_momentum=bn_momentum,
                layer=layer,
            )

        between = block_channels * (1 if nonlocal_block == "none" else num_volumes + 1)
        inputs = [in_channels, *[between] * num_blocks]
        outputs = [*[block_channels] * num_blocks, out_channels]
        self.blocks = nn.ModuleList(map(dncnn, inputs, outputs))
        gaps = 0 if nonlocal_block == "none" else num_blocks
        self.nls = nn.ModuleList(block() for _ in range(gaps))

    @property
    def min_tile(self) -> int:
        """Smallest side of an image tile that holds a whole window of patches, in pixels."""
        return (self.window - 1) * self.patch_stride + self.patch_size if len(self.nls) else 1

    def patch_origin(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns by which the first patch begins before an image of this size."""
        if not len(self.nls):
            return 0, 0
        pads = self.nls[0].n3aggregation.grid(height, width).pads
        return pads[0], pads[2]

    def forward(self, x: Tensor, pad_start: tuple[int, int] | None = None) -> Tensor:
        """Denoise.

        Args:
            x: Noisy images (B, in_channels, H, W).
            pad_start: Where the first patch begins, see `patch_origin`; None: as published. Tiles
                of an image set it so that their patches are those of the whole image.
        """
        matched = x if self.match_on == "input" else None
        out = self.blocks[0](x)
        for i, block in enumerate(self.blocks[1:]):
            if len(self.nls):
                out = self.nls[i](out, matched, pad_start)
            out = block(out)
        return out
