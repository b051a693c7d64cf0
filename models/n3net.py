"""N3Net: denoising networks in turn with neural nearest neighbors blocks.

T. Plötz, S. Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12575. Parameter names and shapes are those of the published
checkpoints, which `load_pretrained` reads (a file that the user has; it may not be passed on).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from layers.n3 import ConcreteBlock, KNNBlock, N3Block
from models.dncnn import DnCNN

__all__ = ["PRESETS", "N3Net", "load_pretrained"]

# Rows of the paper's ablation: model, and the options that differ from its defaults.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dncnn17": ("dncnn", {"depth": 17}),
    "dncnn18": ("dncnn", {"depth": 18}),
    "knn_input": ("n3net", {"num_blocks": 1, "nonlocal_block": "knn", "match_on": "input"}),
    "knn_dncnn": ("n3net", {"num_blocks": 1, "nonlocal_block": "knn", "match_on": "dncnn"}),
    "concrete": ("n3net", {"num_blocks": 1, "nonlocal_block": "concrete"}),
    "n3net_light": ("n3net", {"num_blocks": 1}),
    "n3net": ("n3net", {"num_blocks": 2}),
}


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
        bn_momentum: Weight of a new batch in the running statistics of batch norm.
        layer: What takes the place of the DnCNNs' inner convolutions; None: 3×3 convolutions.

    Shape:
        Noisy images (B, in_channels, H, W) in [0, 1], not clipped -> (B, out_channels, H, W).
    """

    family = "N3Net"
    tasks = ("denoising",)
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
        bn_momentum: float = 0.001,
        layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if num_blocks < 0:
            raise ValueError(f"num_blocks must not be negative, got {num_blocks}.")
        if nonlocal_block not in ("n3", "knn", "concrete", "none"):
            raise ValueError(
                f"nonlocal_block must be n3, knn, concrete or none, got {nonlocal_block!r}."
            )
        match_on = match_on or ("dncnn" if nonlocal_block == "knn" else "embedding")
        if match_on not in ("embedding", "input", "dncnn"):
            raise ValueError(f"match_on must be embedding, input or dncnn, got {match_on!r}.")
        if nonlocal_block == "knn" and match_on == "embedding":
            raise ValueError(
                "nonlocal_block knn cannot match on an embedding: no gradient passes a hard "
                "choice, so nothing would train it. Match on input or dncnn."
            )
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


# Allocated by the published code, never applied: 64 gains, biases, means and variances each.
_DEAD = re.compile(r"blocks\.\d+\.bn1\.(weight|bias|running_mean|running_var|num_batches_tracked)")


def load_pretrained(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load weights by name; every one must arrive.

    The published batch norms that are never applied are left out, and counters of batches that
    older files lack stay at zero.

    Args:
        model: A DnCNN or N3Net.
        weights: By name, as `train_eval.read_weights` gives them.

    Returns:
        Names that were left out.

    Raises:
        ValueError: If names are missing or unknown or shapes differ; lists all of them.
    """
    own = model.state_dict()
    dead = [name for name in weights if _DEAD.fullmatch(name) and name not in own]
    found = {name: value for name, value in weights.items() if name not in dead}
    counter = "num_batches_tracked"
    problems = [
        f"missing: {name} {tuple(value.shape)}"
        for name, value in own.items()
        if name not in found and not name.endswith(counter)
    ]
    problems += [
        f"unknown: {name} {tuple(value.shape)}" for name, value in found.items() if name not in own
    ]
    problems += [
        f"other shape: {name} is {tuple(value.shape)} there and {tuple(own[name].shape)} here"
        for name, value in found.items()
        if name in own and value.shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit this {type(model).__name__}; {len(problems)} names differ:\n  "
            + "\n  ".join(problems)
        )
    model.load_state_dict(found, strict=False)
    return dead
