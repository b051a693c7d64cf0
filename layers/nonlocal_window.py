"""Nonlocal layer: every position of a map adds what the most similar positions around it hold.

X. Wang et al., "Non-local Neural Networks", CVPR 2018, https://arxiv.org/abs/1711.07971, embedded
Gaussian, within a window as in D. Liu et al., "Non-Local Recurrent Network for Image Restoration",
NeurIPS 2018, https://arxiv.org/abs/1806.02919.
"""

from torch import Tensor, nn

from layers.record import Neighbors, grid_places, note, recording
from ops.maps.windowed import MapWindows

__all__ = ["WindowNonlocal"]


class WindowNonlocal(nn.Module):
    """z_i = x_i + Σ_j softmax_j(θ(x_i) · φ(x_j)) g(x_j), j the K best positions of i's window.

    θ, φ and g are 1×1 convolutions; g starts at zero. A position is one of its own candidates.
    Windows slide inward at the border, where published code sees zeros. Gradients reach θ and φ
    through the K scores.

    Of our operators this takes matrix products for the search, which no gradient passes, and the
    compiled attention over chosen neighbors (`ops.maps.attend`), whose softmax, sums and backward
    pass touch K rows a position: the fastest on a CPU where K is a small part of the window. A
    whole window is faster by PyTorch's fused attention, tile by tile. The kernels of N3
    (`ops.patches.windows`) weigh whole windows and know distances of one embedding only; a search
    among all positions (`ops.maps.search`) grows with the square of the map.

    Args:
        channels: C.
        embed_channels: Channels of θ and φ.
        K: Neighbors of a position; as many as the window has, or more: the published softmax.

    Shape:
        (B, C, H, W), and the windows of such a map -> (B, C, H, W).
    """

    def __init__(self, channels: int, embed_channels: int, K: int) -> None:
        super().__init__()
        self.widths, self.K = [embed_channels, embed_channels, channels], K
        self.project = nn.Linear(channels, sum(self.widths))  # θ, φ, g
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.weight[2 * embed_channels :].data)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, windows: MapWindows) -> Tensor:
        """Add what similar positions hold."""
        shape = x.shape[2:]
        rows = x.flatten(2).mT  # (B, C, H, W) -> (B, M, C)
        q, k, v = self.project(rows).split(self.widths, 2)
        y, indices, weights = windows.attend(q, k, v, self.K, chosen=recording())
        if recording():
            places = grid_places(shape, (0, 0), 1, x.device)
            found = (indices[:, None], weights[:, None])
            note(Neighbors(self, tuple(shape), places, places, *found, taken="θ·φ"))
        return x + y.mT.unflatten(2, shape)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"embed_channels={self.widths[0]}, K={self.K}"
