"""Networks, one architecture family a file.

`MODELS` maps the names users give to builders taking keyword arguments: classes, or
`functools.partial` of classes. A model class says what it is, can do and needs:

- `family`: its folder under `Output/`;
- `tasks`: a tuple among "classification", "denoising", "super_resolution",
  "correspondence", "approximation", "language";
- `training`: "gradient"; "growth" (no gradients; sees pixels in [0, 1] instead of normalised) or
  "memory" (stores the training set as it is, in [0, 1]);
- `uses_layer`: whether it takes `layer=`;
- `layer_kind` (if it says so): the table of `layers.LAYER_KINDS` its layers come from; else "maps";
- `inputs` (if it says so): a tuple of the kinds of samples that it classifies, among "images",
  "signals" and "points"; else images;
- `min_input_size`: the smallest side of an image it accepts;
- `Options`: its options, which its constructor takes as keywords;
- `defaults`, `task_defaults` (if there are any): defaults of options of others that differ for it,
  everywhere and by task;
- `own_layer` (if there is one): the layer, and its options, that ``layer=None`` stands for;
- `token_grid` (if its instances have one): rows and columns of the patches that its last tokens
  come from, for `layers.record`;
- `notes` (if its instances have them): sentences that are printed once when a run begins.

Beside its options a constructor takes, by their names, what it must know of data and run:
`in_channels`, `image_size`, `num_classes`, `num_inputs`, `num_outputs`, `tolerance`, `batch_size`,
`num_passes`, `num_steps`, `layer`, and `features` (what samples are replaced by: "raw", ...). A new
model is a file and a row.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from models.cnnet import CNNet
from models.convert import SOURCES, ForeignNetwork, convert
from models.convnet import CNN1d, ConvNet
from models.densenet import DenseNet
from models.dgcnn import DGCNN
from models.dncnn import DnCNN
from models.dynamic import DynamicNetwork
from models.knn import KNNClassifier
from models.n3net import PRESETS, N3Net
from models.nlrn import NLRN
from models.resnet import ResBlock, ResNet, ResNet1d
from models.unet import UNet
from models.vgg import VGG
from models.vig import PyramidViG, ViG
from models.vit import ViT

__all__ = [
    "DGCNN",
    "MODELS",
    "NLRN",
    "PRESETS",
    "VGG",
    "CNN1d",
    "CNNet",
    "ConvNet",
    "DenseNet",
    "DnCNN",
    "DynamicNetwork",
    "ForeignNetwork",
    "KNNClassifier",
    "N3Net",
    "PyramidViG",
    "ResBlock",
    "ResNet",
    "ResNet1d",
    "UNet",
    "ViG",
    "ViT",
    "convert",
    "model_class",
]


class Networks(dict):
    """The rows, and beside them every `SOURCE:NAME` of a package of `models.convert.SOURCES`.

    These are as many as the packages have: they are found by their names and not listed.
    """

    def __contains__(self, name: object) -> bool:
        """Say whether there is a row, or may be a network of another package."""
        return super().__contains__(name) or self.foreign(name) is not None

    def __missing__(self, name: str) -> Callable[..., nn.Module]:
        """Return what builds a network of another package."""
        found = self.foreign(name)
        if found is None:
            raise KeyError(name)
        return partial(ForeignNetwork, source=found[0], name=found[1])

    @staticmethod
    def foreign(name: object) -> tuple[str, str] | None:
        """Split `SOURCE:NAME`; None for any other name."""
        source, _, network = name.partition(":") if isinstance(name, str) else ("", "", "")
        return (source, network) if source in SOURCES and network else None


MODELS: dict[str, Callable[..., nn.Module]] = Networks(
    {
        "vgg11": partial(VGG, depth=11),
        "vgg13": partial(VGG, depth=13),
        "vgg16": partial(VGG, depth=16),
        "vgg19": partial(VGG, depth=19),
        "resnet18": partial(ResNet, depth=18),
        "resnet34": partial(ResNet, depth=34),
        "convnet": ConvNet,
        "cnn1d": CNN1d,
        "resnet1d": partial(ResNet1d, depth=14),
        "densenet121": partial(DenseNet, depth=121),
        "densenet169": partial(DenseNet, depth=169),
        "densenet201": partial(DenseNet, depth=201),
        "densenet264": partial(DenseNet, depth=264),
        "torchvision:resnet18": partial(ForeignNetwork, source="torchvision", name="resnet18"),
        "torchvision:resnet50": partial(ForeignNetwork, source="torchvision", name="resnet50"),
        "vit": ViT,
        "vit_tiny": partial(ViT, size="tiny"),
        "vit_small": partial(ViT, size="small"),
        "vig_tiny": ViG,
        "pvig_tiny": PyramidViG,
        "dgcnn": DGCNN,
        "unet": UNet,
        "dncnn": DnCNN,
        "n3net": N3Net,
        "nlrn": NLRN,
        "cnnet": CNNet,
        "dynamic": DynamicNetwork,
        "knn": KNNClassifier,
    }
)


def model_class(name: str) -> type[nn.Module]:
    """Return the class a name of `MODELS` builds, for its `tasks` and `min_input_size`."""
    builder = MODELS[name]
    return builder.func if isinstance(builder, partial) else builder
