"""Layers of ours in networks of others: swaps the convolutions of any `nn.Module`.

A convolution is replaced where a layer can take its place: 2-D, square odd kernels larger than 1×1,
no groups, no dilation, padding that keeps the size of the map. The rest stays and is
listed. `ForeignNetwork` builds a network of torchvision or timm and converts it.
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

from layers import LAYERS
from layers.convnn import Conv2d_NN
from options import Options, check_choice, did_you_mean

__all__ = ["SOURCES", "Conversion", "ForeignNetwork", "convert"]

SOURCES = ("torchvision", "timm")  # whose networks `--model SOURCE:NAME` takes


@dataclass
class Conversion:
    """What was done.

    Attributes:
        module: The converted network.
        replaced: Names of the convolutions that were replaced.
        kept: Names of those that were not, with the reason.
        copied: Names of the replaced ones whose weights live on.
    """

    module: nn.Module
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

    def __str__(self) -> str:
        parts = [f"{len(self.replaced)} convolutions replaced, {len(self.copied)} with weights"]
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
    """Put a layer in place of every convolution that it can replace, in a copy of the network.

    Weights are kept where the layer computes the same from them: ordinary convolutions, and ConvNN
    with neighbors by location (`similarity_type="Loc"`, `magnitude_type="euclidean"`), whose K is
    k² (9 for 3×3) and whose padding is that of the convolution: such a network gives the outputs of
    the original one, on square maps (and other maps, where k = 3).

    Args:
        module: Any network.
        layer: A name of `layers.LAYERS`, or `layer(in_channels=, out_channels=, stride=)`.
        keep_weights: Copy weights where that is possible.
        leave: Names of convolutions that stay, e.g. ["conv1"], the 7×7 stem of a ResNet.
        **options: Of the layer, e.g. K=9.

    Returns:
        The converted copy, and what was done.

    Raises:
        ValueError: for another layer, options it cannot take, or names in `leave` that are none.

    Example:
        >>> done = convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), layer="Branching", K=9)
        >>> print(done)
        1 convolutions replaced, 0 with weights.
    """
    if isinstance(layer, str):
        check_choice("layer", layer, LAYERS)
        known = {each.argument or each.name for each in LAYERS[layer].Options.declared()}
        for name in options:
            if name not in known:
                raise ValueError(
                    f"{layer} has no option {name!r}.{did_you_mean(name, known)} There is: "
                    f"{', '.join(sorted(known))}."
                )
        layer = LAYERS[layer]
    done = Conversion(copy.deepcopy(module))
    places: dict[nn.Module, list[str]] = {}  # a convolution may be used in several
    for name, each in done.module.named_modules(remove_duplicate=False):
        if isinstance(each, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            places.setdefault(each, []).append(name)
    there = {name for names in places.values() for name in names}
    if unknown := sorted(set(leave) - there):
        raise ValueError(
            f"leave names {', '.join(unknown)}, which is no convolution of this network. There is: "
            f"{', '.join(names[0] for names in places.values())}."
        )
    for conv, names in places.items():
        name = names[0]
        why = "as asked" if set(names) & set(leave) else _reason_to_keep(conv)
        if why is not None:
            done.kept[name] = why
            continue
        new = layer(
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            stride=conv.stride if len(set(conv.stride)) > 1 else conv.stride[0],
            **options,
        )
        if keep_weights and _copy_weights(conv, new):
            done.copied.append(name)
        new.to(conv.weight.device, conv.weight.dtype).train(conv.training)
        done.replaced.append(name)
        if not name:
            done.module = new
            continue
        for place in names:
            parent, _, last = place.rpartition(".")
            setattr(done.module.get_submodule(parent), last, new)
    return done


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
        layer: `layer(in_channels=, out_channels=, stride=) -> nn.Module`.
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
            raise ValueError(
                f"{self.name} has no convolution that a layer can replace: "
                f"{self.conversion.reasons()}. Choose another network."
            )

    @property
    def notes(self) -> list[str]:
        """Say how many convolutions were replaced, and which were left and why."""
        kept = self.conversion.kept
        left = f"; {len(kept)} left as they are: {self.conversion.reasons()}" if kept else ""
        count = len(self.conversion.replaced)
        return [f"note: {self.name}: {count} convolution{'s' * (count != 1)} replaced{left}."]

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if not x.is_meta:
            return self.network(x)
        try:
            return self.network(x)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"{self.name} takes no images of {x.shape[2]}x{x.shape[3]} with {x.shape[1]} "
                f"channel{'s' * (x.shape[1] != 1)} ({str(error).strip().rstrip('.')}). "
                f"{size_hint(self.network)}"
            ) from error

    def extra_repr(self) -> str:
        """Say what was converted."""
        return str(self.conversion)


def size_hint(network: nn.Module) -> str:
    """Say of what size the images are that a network is made for."""
    known = (getattr(network, "default_cfg", None) or {}).get("input_size")
    if known is None:
        return "Most networks are made for images of 224x224: try --resize 224."
    return f"It is made for images of {known[1]}x{known[2]}: try --resize {known[1]}."


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
