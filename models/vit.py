"""Vision transformers with any layer over tokens in place of the attention.

References: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021,
https://arxiv.org/abs/2010.11929; Kang & Farias, Attention via Convolutional Nearest Neighbors,
https://arxiv.org/abs/2511.14137. Symbols: B batch, N tokens, C width, P side of a patch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from options import Options, option

__all__ = ["ViT"]

# Blocks, width, heads, width of the MLP.
SIZES = {"tiny": (12, 192, 3, 768), "small": (12, 384, 6, 1536), "base": (12, 768, 12, 3072)}


@dataclass(frozen=True)
class ViTOptions(Options):
    """Size and parts of the transformer."""

    title = "Vision transformers (vit, vit_tiny, vit_small)"
    patch_size: int = option(16, "side of the patches that become tokens", least=1, most=4096)
    num_layers: int = option(
        None, "blocks of a transformer; not given: as its name says", kind=int, least=1, most=1000
    )
    num_heads: int = option(
        None, "heads; not given: as the name says", kind=int, least=1, most=10**6
    )
    d_hidden: int = option(
        None, "width; not given: as the name says", kind=int, least=1, most=10**6
    )
    d_mlp: int = option(
        None, "width of the MLPs; not given: as the name says", kind=int, least=1, most=10**6
    )
    dropout: float = option(0.1, "dropout after attention and in MLPs", least=0, below=1)
    pos_encoding: str = option(
        "sine", "position code: fixed waves (published), or learned", choices=("sine", "learned")
    )
    final_norm: bool = option(False, "LayerNorm after the last block (published: none)")


class PatchEmbedding(nn.Module):
    """A strided convolution and a LayerNorm: (B, C, H, W) -> (B, N, width)."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.linear_projection = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Cut into patches."""
        return self.norm(self.linear_projection(x).flatten(2).transpose(1, 2))


class PositionalEncoding(nn.Module):
    """Put the class token first, then add a code of the position: (B, N, C) -> (B, N + 1, C)."""

    def __init__(self, width: int, num_tokens: int, kind: str):
        super().__init__()
        self.cls_tokens = nn.Parameter(torch.randn(1, 1, width))
        if kind == "learned":
            self.pe = nn.Parameter(0.02 * torch.randn(1, num_tokens, width))
        else:
            self.register_buffer("pe", sine_code(num_tokens, width)[None])

    def forward(self, x: Tensor) -> Tensor:
        """Add token and code."""
        return torch.cat([self.cls_tokens.expand(len(x), -1, -1), x], 1) + self.pe


def sine_code(num_tokens: int, width: int) -> Tensor:
    """Code positions by waves of lengths 2π to 20,000π: sine on even channels, cosine on odd."""
    steps = torch.arange(0, width, 2) * (-math.log(10000.0) / width)
    angles = torch.arange(num_tokens)[:, None] * steps.exp()
    code = torch.zeros(num_tokens, width)
    code[:, 0::2], code[:, 1::2] = angles.sin(), angles.cos()[:, : width // 2]
    return code


class Block(nn.Module):
    """x + dropout(layer(norm(x))), then x + dropout(MLP(norm(x)))."""

    def __init__(
        self, layer: Callable[..., nn.Module], width: int, num_heads: int, d_mlp: int, p: float
    ):
        super().__init__()
        self.attention = layer(width=width, num_heads=num_heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout1, self.dropout2 = nn.Dropout(p), nn.Dropout(p)
        self.mlp = nn.Sequential(
            nn.Linear(width, d_mlp), nn.GELU(), nn.Dropout(p), nn.Linear(d_mlp, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens."""
        x = x + self.dropout1(self.attention(self.norm1(x)))
        return x + self.dropout2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Classify images by a transformer over their patches.

    Args:
        layer: `layer(width=, num_heads=) -> nn.Module`, (B, N, C) -> (B, N, C).
        size: "tiny", "small" or "base": blocks, width, heads and MLP where they are not given.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        image_size: Their height and width.
        patch_size: P, divides both.
        num_layers: Blocks.
        num_heads: Heads, divides the width.
        d_hidden: Width.
        d_mlp: Width of the MLPs.
        dropout: Dropout after attention and in MLPs.
        pos_encoding: "sine" or "learned".
        final_norm: LayerNorm after the last block.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes)

    Raises:
        ValueError: for a patch size that does not divide the image, or heads the width.
    """

    Options = ViTOptions
    defaults: ClassVar[dict] = {
        "layer": "ConvNNAttention",
        "resize": 224,
        "lr": 5e-4,
        "weight_decay": 0.05,
        "scheduler": "cosine",
    }
    family = "ViT"
    tasks = ("classification",)
    training = "gradient"
    uses_layer = True
    layer_kind = "tokens"
    min_input_size = 1

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        size: str = "base",
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        num_layers: int | None = None,
        num_heads: int | None = None,
        d_hidden: int | None = None,
        d_mlp: int | None = None,
        dropout: float = 0.1,
        pos_encoding: str = "sine",
        final_norm: bool = False,
    ):
        super().__init__()
        given = (num_layers, d_hidden, num_heads, d_mlp)
        blocks, width, heads, hidden = (
            d if g is None else g for g, d in zip(given, SIZES[size], strict=True)
        )
        ViTOptions(
            patch_size=patch_size,
            num_layers=blocks,
            num_heads=heads,
            d_hidden=width,
            d_mlp=hidden,
            dropout=dropout,
            pos_encoding=pos_encoding,
        )
        if any(side % patch_size for side in image_size):
            raise ValueError(
                f"patch_size {patch_size} does not divide images of {image_size[0]} x "
                f"{image_size[1]} pixels: they are cut into whole patches. Try another "
                f"patch_size, or resize {max(1, image_size[0] // patch_size) * patch_size}."
            )
        tokens = math.prod(side // patch_size for side in image_size) + 1
        self.image_size = tuple(image_size)
        # Where tokens lie, for `layers.record`: all but the first one on a grid.
        self.token_grid = tuple(side // patch_size for side in image_size)
        self.patch_embedding = PatchEmbedding(in_channels, width, patch_size)
        self.positional_encoding = PositionalEncoding(width, tokens, pos_encoding)
        self.transformer_encoder = nn.ModuleList(
            Block(layer, width, heads, hidden, dropout) for _ in range(blocks)
        )
        self.final_norm = nn.LayerNorm(width) if final_norm else nn.Identity()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if x.shape[2:] != self.image_size:
            raise ValueError(
                f"this ViT has position codes for images of {self.image_size[0]} x "
                f"{self.image_size[1]} pixels (got {x.shape[2]} x {x.shape[3]})."
            )
        x = self.positional_encoding(self.patch_embedding(x))  # (B, N + 1, C)
        for block in self.transformer_encoder:
            x = block(x)
        return self.classifier(self.final_norm(x)[:, 0])
