"""Run a denoiser on tiles of a large image: bounded memory, no seams."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from utils import free_memory

__all__ = ["check_tiles", "forward_in_tiles", "largest_tile", "peak_bytes"]


def check_tiles(model: nn.Module, tile: int, overlap: int) -> None:
    """Refuse tiles that cannot work, naming the smallest that do."""
    smallest = getattr(model, "min_tile", 1)
    if tile < smallest:
        raise ValueError(
            f"a tile of {tile} pixels is smaller than the window of patches; the smallest that "
            f"works is {smallest}."
        )
    if not 0 <= overlap <= tile // 2:
        raise ValueError(
            f"the overlap of tiles must lie between 0 and half a tile ({tile // 2} pixels), "
            f"got {overlap}."
        )


def _starts(side: int, tile: int, overlap: int, step: int, origin: int) -> list[int]:
    """First pixels of tiles along one axis; all but the first lie on the grid (of patches, say)."""
    if side <= tile:
        return [0]

    def down(position: int) -> int:  # to the grid, which begins `origin` outside
        return (position + origin) // step * step - origin

    starts = [0]
    last = down(side - tile)
    while True:
        following = down(starts[-1] + max(tile - overlap, step))
        if following <= starts[-1]:  # a tile shorter than a step of the grid
            following += step
        if following >= last:
            break
        starts.append(following)
    return starts if last <= starts[-1] else [*starts, last]


def _ramp(start: int, stop: int, side: int, before: int, after: int, like: Tensor) -> Tensor:
    """Blending weights of pixels start … stop - 1.

    They are 0 in the outer third of an overlap and rise to 1 over its middle third.
    """
    at = torch.arange(start, stop, device=like.device, dtype=like.dtype)
    weight = torch.ones_like(at)
    if start > 0:
        weight = torch.minimum(weight, (at - start + 0.5) * (3 / max(before, 1)) - 1)
    if stop < side:
        weight = torch.minimum(weight, (stop - at - 0.5) * (3 / max(after, 1)) - 1)
    return weight.clamp(min=0)


class _Allocations(TorchDispatchMode):
    """Add up the bytes of tensors that are alive at a time, wherever they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, list | tuple) else [out]:
            if not isinstance(each, Tensor):
                continue
            storage = each.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.known.add(key)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


@torch.no_grad()
def peak_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes of all tensors alive at the worst moment of a forward pass."""
    with _Allocations() as allocations:
        model(images)
    return allocations.peak


def largest_tile(model: nn.Module, channels: int, device: torch.device, share: float = 0.5) -> int:
    """Return the side of the largest tile for which the memory there is suffices.

    A small tile is run and its bytes counted; they grow with the pixels.

    Args:
        model: The network, on the device.
        channels: Channels of its input.
        device: Where it runs.
        share: Part of the free memory to use.

    Raises:
        ValueError: If not even the smallest tile fits.
    """
    smallest = getattr(model, "min_tile", 1)
    side = max(2 * smallest, 96)
    per_pixel = peak_bytes(model, torch.zeros(1, channels, side, side, device=device)) / side**2
    free = free_memory(device)
    tile = math.isqrt(int(share * free / per_pixel))
    if tile < max(smallest, 16):
        raise ValueError(
            f"the memory that is free, {free / 1e6:.0f} MB, does not hold a tile of "
            f"{max(smallest, 16)} pixels, which takes "
            f"{per_pixel * max(smallest, 16) ** 2 / 1e6:.0f} MB."
        )
    return tile


@torch.no_grad()
def forward_in_tiles(
    model: nn.Module, images: Tensor, tile: int, overlap: int = 32, *, progress: bool = False
) -> Tensor:
    """Denoise images tile by tile, blending in the middle of overlaps.

    Patches of a tile, and blocks of pixels folded into channels, are those of the whole image. The
    result equals that of the whole image wherever no tile border lies within the network's field of
    view: everywhere, once a third of the overlap covers that field.

    Args:
        model: A denoiser that keeps the size of its input.
        images: Noisy images (B, C, H, W).
        tile: Side of a tile in pixels (a tile at the border may be larger by a patch stride).
        overlap: Pixels that neighboring tiles share, at least.
        progress: Show a bar over the tiles where a person is watching.

    Returns:
        Denoised images (B, C', H, W).
    """
    check_tiles(model, tile, overlap)
    height, width = images.shape[-2:]
    patches = getattr(model, "min_tile", 1) > 1
    step = model.patch_stride if patches else getattr(model, "fold", 1)
    origin = model.patch_origin(height, width) if patches else (0, 0)
    axes = []
    for side, first in zip((height, width), origin, strict=True):
        starts = _starts(side, tile, overlap, step, first)
        stops = [side if start == starts[-1] else start + tile for start in starts]
        axes.append(list(zip(starts, stops, strict=True)))
    out = total = None
    rows, cols = axes
    hidden = None if progress else True
    bar = tqdm(total=len(rows) * len(cols), desc="tiles", leave=False, disable=hidden)
    for i, (top, bottom) in enumerate(rows):
        down = _ramp(top, bottom, height, *_overlaps(rows, i), images)
        for j, (left, right) in enumerate(cols):
            across = _ramp(left, right, width, *_overlaps(cols, j), images)
            options = {}
            if patches:
                options["pad_start"] = (origin[0] if top == 0 else 0, origin[1] if left == 0 else 0)
            part = model(images[:, :, top:bottom, left:right], **options)
            if out is None:
                out = part.new_zeros(part.shape[0], part.shape[1], height, width)
                total = part.new_zeros(height, width)
            weight = (down[:, None] * across).to(part.dtype)
            out[:, :, top:bottom, left:right] += part * weight
            total[top:bottom, left:right] += weight
            bar.update()
    bar.close()
    return out / total


def _overlaps(spans: list[tuple[int, int]], i: int) -> tuple[int, int]:
    """Pixels that span i shares with the spans before and after it."""
    before = spans[i - 1][1] - spans[i][0] if i > 0 else 0
    after = spans[i][1] - spans[i + 1][0] if i + 1 < len(spans) else 0
    return max(before, 0), max(after, 0)
