"""Layers of ours in networks of others: swaps convolutions, or attention, of any `nn.Module`.

A convolution is replaced where a layer can take its place: 2-D, square odd kernels larger than 1×1,
no groups, no dilation, padding that keeps the size of the map; an attention block by the rules of
`models.attentions`. The rest stays and is listed. `ForeignNetwork` builds a network of torchvision
or timm and converts it.
"""

import copy
import difflib
import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layers import LAYER_KINDS
from layers.convnn import Conv2d_NN
from models.attentions import is_attention, is_token_layer, reason_to_keep, replacement
from options import Options, check_choice, did_you_mean

__all__ = ["SOURCES", "Conversion", "ForeignNetwork", "convert"]

SOURCES = ("torchvision", "timm")  # whose networks `--model SOURCE:NAME` takes


@dataclass
class Conversion:
    """What was done.

    Attributes:
        module: The converted network.
        what: What is replaced, "convolution" or "attention block".
        replaced: Names of those that were replaced.
        kept: Names of those that were not, with the reason.
        copied: Names of the replaced ones whose weights live on.
    """

    module: nn.Module
    what: str = "convolution"
    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)

    def reasons(self) -> str:
        """Say why convolutions were kept, each reason with how often, and which they are.

        Those of 1x1 are left by rule and many: only their number is said, and at most four names
        of the others.
        """
        found: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            found.setdefault(why, []).append(name)
        parts = []
        for why, names in sorted(found.items(), key=lambda item: -len(item[1])):
            listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            parts.append(f"{why} ({len(names)}{'' if why == '1x1' else f': {listed}'})")
        return ", ".join(parts)

    def count(self) -> str:
        """Say how many were replaced."""
        number = len(self.replaced)
        return f"{number} {self.what}{'s' * (number != 1)} replaced"

    def __str__(self) -> str:
        parts = [f"{self.count()}, {len(self.copied)} with weights"]
        if self.kept:
            left = ", ".join(f"{name} ({why})" for name, why in self.kept.items())
            parts.append(f"left as they are: {left}")
        return "; ".join(parts) + "."


def convert(
    module: nn.Module,
    layer: str | Callable[..., nn.Module] = "ConvNN",
    *,
    keep_weights: bool = True,
    leave: Collection[str] = (),
    **options: Any,
) -> Conversion:
    """Put a layer in place of every convolution, or attention, that it can replace, in a copy.

    Layers over maps replace convolutions, layers over tokens (`layers.TOKEN_LAYERS`) attention
    blocks. Weights are kept where the layer computes the same from them: ordinary convolutions, and
    ConvNN with neighbors by location (`similarity_type="Loc"`, `magnitude_type="euclidean"`), whose
    K is k² (9 for 3×3) and whose padding is that of the convolution: such a network gives the
    outputs of the original one, on square maps (and other maps, where k = 3). Attention keeps its
    projections where their biases are 0, as ours have none; layers over K tokens, or windows, too,
    which give the outputs of the original one where they look at all tokens.

    Args:
        module: Any network.
        layer: A name of `layers.LAYERS` or `layers.TOKEN_LAYERS`, a layer of these tables with
            options (by `functools.partial`), or `layer(in_channels=, out_channels=, stride=)`.
        keep_weights: Copy weights where that is possible.
        leave: Names of what stays, e.g. ["conv1"], the 7×7 stem of a ResNet.
        **options: Of the layer, e.g. K=9.

    Returns:
        The converted copy, and what was done.

    Raises:
        ValueError: for another layer, options it cannot take, or names in `leave` that are none.

    Example:
        >>> done = convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), layer="Branching", K=9)
        >>> print(done)
        1 convolution replaced, 0 with weights.
    """
    if isinstance(layer, str):
        layer = _named_layer(layer, options)
    tokens = is_token_layer(layer)
    done = Conversion(copy.deepcopy(module), "attention block" if tokens else "convolution")
    places: dict[nn.Module, list[str]] = {}  # a module may be used in several
    for name, each in done.module.named_modules(remove_duplicate=False):
        if is_attention(each) if tokens else _is_convolution(each):
            places.setdefault(each, []).append(name)
    there = {name for names in places.values() for name in names}
    if unknown := sorted(set(leave) - there):
        raise ValueError(
            f"leave names {', '.join(unknown)}, which is no {done.what} of this network. There is: "
            f"{', '.join(names[0] for names in places.values()) or 'none'}."
        )
    for old, names in places.items():
        name = names[0]
        reason = reason_to_keep if tokens else _reason_to_keep
        why = "as asked" if set(names) & set(leave) else reason(old)
        if why is not None:
            done.kept[name] = why
            continue
        build = replacement if tokens else _replacement
        new, copied = build(old, layer, keep_weights, **options)
        new.train(old.training)
        done.replaced.append(name)
        if copied:
            done.copied.append(name)
        if not name:
            done.module = new
            continue
        for place in names:
            parent, _, last = place.rpartition(".")
            setattr(done.module.get_submodule(parent), last, new)
    return done


def _named_layer(name: str, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """Return the layer of a name, which must have these options."""
    table = LAYER_KINDS["foreign"]
    check_choice("layer", name, table)
    known = {each.argument or each.name for each in table[name].Options.declared()}
    for key in options:
        if key not in known:
            raise ValueError(
                f"{name} has no option {key!r}.{did_you_mean(key, known)} There is: "
                f"{', '.join(sorted(known))}."
            )
    return table[name]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _replacement(
    conv: nn.Conv2d, layer: Callable[..., nn.Module], keep_weights: bool, **options: Any
) -> tuple[nn.Module, bool]:
    """Build what takes the place of a convolution; say whether it has the weights."""
    new = layer(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        stride=conv.stride if len(set(conv.stride)) > 1 else conv.stride[0],
        **options,
    )
    copied = keep_weights and _copy_weights(conv, new)
    return new.to(conv.weight.device, conv.weight.dtype), copied


def _reason_to_keep(conv: nn.Module) -> str | None:
    """Say why no layer can replace a convolution; None if one can."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}"
    k = conv.kernel_size
    if k == (1, 1):
        return "1x1"
    if conv.groups > 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return "dilated"
    if k[0] != k[1] or k[0] % 2 == 0:
        return f"kernel {k[0]}x{k[1]}"
    if conv.padding not in ((k[0] // 2,) * 2, "same") or conv.padding_mode != "zeros":
        return "padding that changes the size of the map, or is not of zeros"
    return None


@torch.no_grad()
def _copy_weights(conv: nn.Conv2d, new: nn.Module) -> bool:
    """Copy what computes the same; return whether anything does."""
    k = conv.kernel_size[0]
    if isinstance(new, Conv2d_NN):
        same = (
            (new.similarity_type, new.magnitude_type) == ("Loc", "euclidean")
            and (new.aggregation_type, new.sampling_type) == ("Col", "all")
            and (new.K, new.padding, new.scale_in, new.scale_out) == (k * k, k // 2, 1, 1)
            and k <= 5  # beyond, the k² nearest positions are no square
        )
        target = new.conv1d_layer
    else:
        target = getattr(new, "conv2d_layer", new)
        same = type(target) is nn.Conv2d and target.weight.shape == conv.weight.shape
        same = same and getattr(new, "scale_in", 1) == getattr(new, "scale_out", 1) == 1
    if not same:
        return False
    target.weight.copy_(conv.weight.reshape(target.weight.shape))
    if target.bias is not None:
        target.bias.zero_() if conv.bias is None else target.bias.copy_(conv.bias)
    return True


class ForeignNetwork(nn.Module):
    """A network of torchvision or timm, built without weights, with layers of ours.

    Args:
        layer: A row of `layers.LAYERS`, or of `layers.TOKEN_LAYERS`, with its options: what
            `convert` takes.
        source: "torchvision" or "timm".
        name: The network's name there.
        in_channels: Channels of the images.
        num_classes: Number of outputs.

    Attributes:
        conversion: What was replaced and what was not.
        notes: What is said of it when a run begins.

    Raises:
        ValueError: for a network that is not there, with the package to install, or one in which
            nothing can be replaced; when run by shapes alone, for images that it does not take.
    """

    Options = Options
    defaults: ClassVar[dict] = {"resize": 64}
    family = "Foreign"
    tasks = ("classification",)
    training = "gradient"
    uses_layer = True
    layer_kind = "foreign"
    min_input_size = 32

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        source: str,
        name: str,
        in_channels: int = 3,
        num_classes: int = 10,
    ):
        super().__init__()
        network = build_foreign(source, name, in_channels, num_classes)
        self.conversion = convert(network, layer)
        self.name, self.network = f"{source}:{name}", self.conversion.module
        if not self.conversion.replaced:
            what, reasons = self.conversion.what, self.conversion.reasons()
            other = "a convolution" if is_token_layer(layer) else "attention"
            raise ValueError(
                f"{self.name} has no {what} that a layer can replace{': ' * bool(reasons)}"
                f"{reasons}. Choose another network, or a layer that replaces {other}."
            )

    @property
    def notes(self) -> list[str]:
        """Say how many layers were replaced, and which were left and why."""
        kept = self.conversion.kept
        left = f"; {len(kept)} left as they are: {self.conversion.reasons()}" if kept else ""
        return [f"note: {self.name}: {self.conversion.count()}{left}."]

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if not x.is_meta:
            return self.network(x)
        try:
            return self.network(x)
        except (RuntimeError, AssertionError) as error:  # ValueError: layers of ours say all of it
            raise ValueError(
                f"{self.name} takes no images of {x.shape[2]}x{x.shape[3]} with {x.shape[1]} "
                f"channel{'s' * (x.shape[1] != 1)} ({str(error).strip().rstrip('.')}). "
                f"{size_hint(self.network, x.shape[2])}"
            ) from error

    def extra_repr(self) -> str:
        """Say what was converted."""
        return str(self.conversion)


def size_hint(network: nn.Module, side: int) -> str:
    """Say of what size the images are that a network is made for, where these are of another."""
    known = (getattr(network, "default_cfg", None) or {}).get("input_size")
    what = "Most networks are" if known is None else "It is"
    fits = 224 if known is None else known[1]
    if side == fits:
        return "Choose another network."
    return f"{what} made for images of {fits}x{fits}: try --resize {fits}."


# Networks that answer with more than scores while they learn, and what makes them stop.
SCORES_ALONE = {
    name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")
}


def build_foreign(source: str, name: str, in_channels: int, num_classes: int) -> nn.Module:
    """Build a network of another package, without weights."""
    try:
        zoo = importlib.import_module("torchvision.models" if source == "torchvision" else source)
    except ImportError as error:
        raise ValueError(
            f"{source}:{name} needs the package {source}, which is not installed. "
            f"Try: pip install {source}"
        ) from error
    there = zoo.list_models(module=zoo) if source == "torchvision" else zoo.list_models()
    if name not in there:
        close = difflib.get_close_matches(name.partition(".")[0], there, n=6)
        hint = (
            f"Close to it: {', '.join(close)}"
            if close
            else f"{zoo.__name__}.list_models() lists them"
        )
        raise ValueError(f"{source} has no network {name!r}. {hint}.")
    build = build_timm if source == "timm" else build_torchvision
    try:
        return build(zoo, name, in_channels, num_classes)
    except NotImplementedError:  # sizes that are computed by tensors are not there on meta
        device = torch.get_default_device()
        with torch.device("cpu"):
            return build(zoo, name, in_channels, num_classes).to(device)


def build_timm(zoo: ModuleType, name: str, in_channels: int, num_classes: int) -> nn.Module:
    """Build a network of timm."""
    return zoo.create_model(name, in_chans=in_channels, num_classes=num_classes)


def build_torchvision(zoo: ModuleType, name: str, in_channels: int, num_classes: int) -> nn.Module:
    """Build a network of torchvision; its first convolution anew for other numbers of channels."""
    extra = SCORES_ALONE.get(name, {})
    network = zoo.get_model(name, weights=None, num_classes=num_classes, **extra)
    if in_channels == 3:
        return network
    first, conv = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, last = first.rpartition(".")
    new = type(conv)(
        in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        bias=conv.bias is not None,
    )
    setattr(network.get_submodule(parent), last, new)
    return network
