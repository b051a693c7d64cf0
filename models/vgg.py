"""VGG networks with any layer in place of the convolutions.

Reference: Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image
Recognition, ICLR 2015, https://arxiv.org/abs/1409.1556. Symbols: B batch, C channels, H/W height
and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from models.width import WidthOptions, scaled
from options import option

__all__ = ["VGG"]

# Layers of each of the five stages; a stage ends in a 2x2 max pooling.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class VGGOptions(WidthOptions):
    """Width and head."""

    classifier: str = option(
        "published",
        "head of a VGG: two hidden layers of 4096 (published), or one Linear on the map's mean",
        choices=("published", "gap"),
    )


class VGG(nn.Module):
    """Classify images by 11, 13, 16 or 19 weight layers.

    Every layer is followed by BatchNorm and ReLU. The map is pooled to 7×7, whatever is left of
    it, for two hidden layers of 4096 with dropout.

    Args:
        layer: `layer(in_channels=, out_channels=, stride=1) -> nn.Module`, keeping the map's size.
        depth: 11, 13, 16 or 19.
        in_channels: channels of the images.
        num_classes: number of outputs.
        dropout: probability of dropping a hidden feature of the classifier.
        hidden_features: width of the two hidden layers of the classifier.
        width: factor of the channels of all stages.
        classifier: "published", or "gap": the mean of the map and one Linear.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes); H, W at least 32.

    Raises:
        ValueError: for another depth, or (in forward) for smaller images.
    """

    Options = VGGOptions
    family = "VGG"
    tasks = ("classification",)
    training = "gradient"
    uses_layer = True
    min_input_size = 32

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        depth: int = 11,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.5,
        hidden_features: int = 4096,
        width: float = 1.0,
        classifier: str = "published",
    ):
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth must be one of {', '.join(map(str, STAGES))} (got {depth}).")
        VGGOptions(width=width, classifier=classifier)
        widths = [scaled(channels, width) for channels in WIDTHS]
        modules: list[nn.Module] = []
        channels = in_channels
        for count, wide in zip(STAGES[depth], widths, strict=True):
            for _ in range(count):
                modules += [
                    layer(in_channels=channels, out_channels=wide),
                    nn.BatchNorm2d(wide),
                    nn.ReLU(inplace=True),
                ]
                channels = wide
            modules.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*modules)
        if classifier == "gap":
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.classifier = nn.Linear(channels, num_classes)
            return
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, hidden_features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_features, hidden_features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_features, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if min(x.shape[2:]) < self.min_input_size:
            raise ValueError(
                f"VGG needs images of at least {self.min_input_size} x {self.min_input_size} "
                f"pixels (got {x.shape[2]} x {x.shape[3]}): five poolings halve the map."
            )
        x = self.features(x)  # (B, C, H, W) -> (B, 512, H/32, W/32)
        x = self.avgpool(x).flatten(1)  # -> (B, 512·7·7)
        return self.classifier(x)
