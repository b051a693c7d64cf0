"""Entry points for `torch.hub`: every network of `models.MODELS`, and networks trained here.

    net = torch.hub.load(DIR, "resnet18", source="local", layer="ConvNN", K=9, num_classes=10)
    net = torch.hub.load(DIR, "trained", "Output/ResNet/ConvNN", source="local")

DIR is a clone of this repository. Options are named and meant as the flags of `main.py` (`python
main.py --help resnet18`, `--help ConvNN`), beside what the data otherwise say: `in_channels`,
`num_classes`, `image_size`, …; `weights` names a file of weights.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from checkpoints import load_pretrained, read_weights
from layers import LAYER_KINDS
from models import MODELS, model_class
from options import check_choice, did_you_mean

dependencies = ["torch", "numpy"]


def _network(
    name: str, *, layer: str | None = None, weights: str | None = None, **options: Any
) -> nn.Module:
    builder, model_type = MODELS[name], model_class(name)
    known = set(inspect.signature(builder).parameters)
    keywords: dict[str, Any] = {}
    layer_names: set[str] = set()
    if model_type.uses_layer:
        known -= {"layer"}
        table = LAYER_KINDS[getattr(model_type, "layer_kind", "maps")]
        keywords["layer"] = None
        defaults = getattr(model_type, "defaults", {})
        if layer is None and not hasattr(model_type, "own_layer"):
            layer = defaults.get("layer", "ConvNN")
        if layer is not None:
            check_choice("layer", layer, table)
            layer_names = table[layer].Options.names()
            mine = {k: v for k, v in {**defaults, **options}.items() if k in layer_names}
            keywords["layer"] = functools.partial(table[layer], **mine)
    elif layer is not None:
        raise ValueError(f"{name} takes no layer (got {layer!r}): leave it out.")
    for key in options:
        if key not in known | layer_names:
            where = name if layer is None else f"{name} with layer {layer}"
            hint = did_you_mean(key, known | layer_names)
            raise ValueError(
                f"{where} has no option {key!r}.{hint} There are: "
                f"{', '.join(sorted(known | layer_names))}."
            )
    needed = {
        key
        for key, each in inspect.signature(builder).parameters.items()
        if each.default is each.empty and key in known and key not in options
    }
    if needed:
        raise ValueError(
            f"{name} must be told {', '.join(sorted(needed))}, which follow from the data of a run."
        )
    model = builder(**keywords, **{key: v for key, v in options.items() if key in known})
    if weights is not None:
        load_pretrained(model, read_weights(weights)[0])
    return model


def _entry(name: str) -> Callable[..., nn.Module]:
    """Make the entry point of a row of `MODELS`."""

    def build(**options: Any) -> nn.Module:
        return _network(name, **options)

    model_type = model_class(name)
    about = (model_type.__doc__ or "").strip().partition("\n")[0]
    lines = [f"{name}: {about}", "", "Args:"]
    if model_type.uses_layer:
        table = LAYER_KINDS[getattr(model_type, "layer_kind", "maps")]
        lines.append(f"    layer: {', '.join(table)}; its options go beside it.")
    lines.append("    weights: File of weights.")
    names = set(inspect.signature(MODELS[name]).parameters) - {"layer"}
    lines.append(f"    **options: {', '.join(sorted(names))}.")
    build.__name__, build.__doc__ = name, "\n".join(lines)
    return build


globals().update({name: _entry(name) for name in MODELS})


def trained(run: str) -> nn.Module:
    """Open the network of a run, with the weights of its best epoch, in evaluation.

    Args:
        run: The run's folder, or a file of `weights/`.
    """
    from builders import open_run

    return open_run(run).model
