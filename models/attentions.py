"""Attention blocks of other networks, and layers over tokens in their place.

A block is replaced where a layer can take its place: `nn.MultiheadAttention` of a width, with
samples first, and blocks as timm has them (`qkv` and `proj`, both Linear, and `num_heads`) that
hold nothing else and need nothing but tokens. Symbols: B batch, N tokens, C width.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layers import TOKEN_LAYERS, Attention, ConvNNAttention

__all__ = ["SelfAttention", "is_attention", "is_token_layer", "reason_to_keep", "replacement"]


def is_token_layer(layer: Callable[..., nn.Module]) -> bool:
    """Say whether a layer, or one with options, is a row of `layers.TOKEN_LAYERS`."""
    while isinstance(layer, partial):
        layer = layer.func
    return layer in TOKEN_LAYERS.values()


def is_attention(module: nn.Module) -> bool:
    """Say whether a module is an attention block, as far as its parts tell."""
    linear = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))
    return isinstance(module, nn.MultiheadAttention) or (
        linear and isinstance(getattr(module, "num_heads", None), int)
    )


def reason_to_keep(module: nn.Module) -> str | None:
    """Say why no layer over tokens can replace an attention block; None if one can."""
    if isinstance(module, nn.MultiheadAttention):
        if not module.batch_first:
            return "samples come second"
        if not module._qkv_same_embed_dim:
            return "keys of another width"
        return "keys are added" if module.bias_k is not None or module.add_zero_attn else None
    width = module.qkv.in_features
    if (module.qkv.out_features, module.proj.in_features, module.proj.out_features) != (
        *(3 * width, width, width),
    ):
        return "heads of another width"
    held = {name.partition(".")[0] for name in module.state_dict()} - {"qkv", "proj"}
    if held:
        return f"holds {', '.join(sorted(held))} too"
    _, *others = inspect.signature(module.forward).parameters.values()
    needed = [each.name for each in others if each.default is each.empty]
    return f"needs {', '.join(needed)} too" if needed else None


class SelfAttention(nn.Module):
    """A layer over tokens that is called as the attention block was that it stands for.

    Args:
        layer: (B, N, C) -> (B, N, C).
        pairs: Answer as `nn.MultiheadAttention` does, with None for the weights.

    Raises:
        ValueError: in forward, for what these layers cannot do: masks, keys that are not the
            queries, tokens in windows.
    """

    batch_first, in_proj_bias = True, None  # what transformers of PyTorch ask of theirs

    def __init__(self, layer: nn.Module, pairs: bool) -> None:
        super().__init__()
        self.layer, self.pairs = layer, pairs

    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        **_: Any,
    ) -> Any:
        """Mix tokens."""
        if attn_mask is not None or key_padding_mask is not None or is_causal:
            raise ValueError("layers over tokens take no masks: leave this attention as it is")
        if any(each is not None and each is not x for each in (key, value)):
            raise ValueError(
                "layers over tokens have no other keys than the tokens: leave this attention"
            )
        if x.dim() != 3:
            raise ValueError(f"layers over tokens take (B, N, C), got {tuple(x.shape)}")
        y = self.layer(x)
        return (y, None) if self.pairs else y


def replacement(
    module: nn.Module, layer: Callable[..., nn.Module], keep_weights: bool, **options: Any
) -> tuple[SelfAttention, bool]:
    """Build what takes the place of an attention block.

    Returns:
        The layer, and whether it has the weights of the block.
    """
    pairs = isinstance(module, nn.MultiheadAttention)
    width = module.embed_dim if pairs else module.qkv.in_features
    new = layer(width=width, num_heads=module.num_heads, **options)
    weight = module.in_proj_weight if pairs else module.qkv.weight
    new.to(weight.device, weight.dtype)
    return SelfAttention(new, pairs), keep_weights and _copy_weights(module, weight, new)


@torch.no_grad()
def _copy_weights(module: nn.Module, weight: Tensor, new: nn.Module) -> bool:
    """Copy the projections, whose biases must be 0; return whether the layer has such."""
    pairs = isinstance(module, nn.MultiheadAttention)
    out = module.out_proj if pairs else module.proj
    biases = (module.in_proj_bias if pairs else module.qkv.bias, out.bias)
    if any(bias is not None and not bias.is_meta and bias.any() for bias in biases):
        return False
    for joined, last in (("qkv", "proj"), ("to_qkv", "to_out")):
        if hasattr(new, joined):
            getattr(new, joined).weight.copy_(weight)
            getattr(new, last).weight.copy_(out.weight)
            return True
    if not isinstance(new, Attention | ConvNNAttention):
        return False
    names = "qkvo" if isinstance(new, Attention) else "kqvo"  # whose keys ask, and queries answer
    for name, part in zip(names, (*weight.chunk(3), out.weight), strict=True):
        getattr(new, f"W_{name}").weight.copy_(part)
    return True
