"""NLRN: a recurrent network whose every step looks at similar places around each position.

D. Liu et al., "Non-Local Recurrent Network for Image Restoration", NeurIPS 2018,
https://arxiv.org/abs/1806.02919. With default options the published network, of 340,099 parameters
(349,573 numbers with the running statistics of its batch norms; the paper says 0.35 M).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from layers.cnn import channels_last
from layers.nonlocal_window import WindowNonlocal
from models.dncnn import (
    FoldOptions,
    RestorationOptions,
    add_shared,
    fold_blocks,
    momentum_for,
    unfold_blocks,
)
from models.n3net import check_window
from ops.maps.windowed import MapWindows
from options import option

__all__ = ["NLRN", "NLRNOptions"]


@dataclass(frozen=True)
class NLRNOptions(FoldOptions, RestorationOptions):
    """The recurrent state and where it looks."""

    features: int = option(128, "channels of nlrn's state", least=1, most=10**10)
    recurrences: int = option(12, "nlrn: updates of the state", least=1, most=1000)
    window: int = option(
        45, "nlrn: side of the window around a position, in positions; odd", least=1, most=255
    )
    K: int = option(
        45**2,
        "nlrn: most similar positions of the window that are looked at; as many as it has, or "
        "more: all",
        least=1,
        most=10**6,
    )
    embed_channels: int = option(
        64, "nlrn: channels by which positions are compared", least=1, most=10**10
    )

    def __post_init__(self) -> None:
        """Refuse windows without a middle."""
        super().__post_init__()
        check_window(self.window)


class NLRN(nn.Module):
    """Batch norm and a convolution, a state updated several times by one block, a convolution.

    An update: batch norm, ReLU, nonlocal layer; batch norm, convolution; batch norm, ReLU,
    convolution; plus the features that the first convolution gave. After the last one batch norm,
    ReLU and a convolution, whose output is added to the input: to its first channels, where the two
    differ in number.

    Weights are shared among the updates. Batch norms are not, as in the published code: the state
    has another mean and variance after each update, and one running value for all of them would
    fit none. Published code does not pass correlations from state to state as the paper describes;
    neither does this. Its other starting values are kept, but the last convolution starts at zero:
    training begins at the noisy image instead of far from it.

    Args:
        in_channels: Channels of the noisy image.
        out_channels: Channels of the output; None: as many as the input has.
        features: Channels of the state.
        recurrences: Updates.
        window: Side of the window around a position, odd.
        K: Most similar positions of the window that are looked at; its number of positions, or
            more: all of them.
        embed_channels: Channels by which positions are compared.
        bn_momentum: Weight of a new batch in the running statistics; None: see
            `models.dncnn.momentum_for`.
        num_steps: Training steps of the run, which decide on bn_momentum if it is None.
        fold: Pixels of fold × fold blocks are one position, see `models.dncnn.DnCNN`.

    Shape:
        Noisy images (B, in_channels, H, W) in [0, 1], not clipped -> (B, out_channels, H, W).
    """

    Options = NLRNOptions
    # Batches as published; those of the other denoisers would take 22 GB here.
    defaults: ClassVar[dict] = {"dataset": "photos", "batch_size": 16, "crop_size": 43}
    family = "NLRN"
    tasks = ("denoising", "super_resolution")
    training = "gradient"
    uses_layer = False
    min_input_size = 1

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        features: int = 128,
        recurrences: int = 12,
        window: int = 45,
        K: int = 45**2,
        embed_channels: int = 64,
        bn_momentum: float | None = None,
        num_steps: int = 0,
        fold: int = 1,
    ) -> None:
        super().__init__()
        NLRNOptions(
            features=features,
            recurrences=recurrences,
            window=window,
            K=K,
            embed_channels=embed_channels,
            bn_momentum=bn_momentum,
            fold=fold,
        )
        momentum = momentum_for(num_steps) if bn_momentum is None else bn_momentum
        out_channels = in_channels if out_channels is None else out_channels
        self.fold, self.window, self.shared = fold, window, min(in_channels, out_channels)

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, momentum=momentum)

        self.norm_in = norm(in_channels * fold**2)
        self.conv_in = nn.Conv2d(in_channels * fold**2, features, 3, padding=1)
        self.norms = nn.ModuleList(
            nn.ModuleList(norm(features) for _ in range(3)) for _ in range(recurrences)
        )
        self.nonlocal_layer = WindowNonlocal(features, embed_channels, K)
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.norm_out = norm(features)
        self.conv_out = nn.Conv2d(features, out_channels * fold**2, 3, padding=1)
        for conv in (self.conv_in, self.conv1, self.conv2, self.conv_out):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Restore."""
        inner = channels_last(fold_blocks(x, self.fold))
        windows = MapWindows(tuple(inner.shape[2:]), self.window, inner.device)
        start = state = self.conv_in(self.norm_in(inner))
        for before, between, after in self.norms:
            state = self.nonlocal_layer(before(state).relu_(), windows)
            state = self.conv1(between(state))
            state = self.conv2(after(state).relu_()) + start
        out = self.conv_out(self.norm_out(state).relu_())
        return add_shared(unfold_blocks(out, self.fold, x), x, self.shared)
