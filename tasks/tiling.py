"""Run a denoiser on tiles of a large image: bounded memory, no seams."""

import torch
from torch import Tensor, nn

__all__ = ["check_tiles", "forward_in_tiles"]


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
    """First pixels of tiles along one axis; all but the first lie on the grid of patches."""
    if side <= tile:
        return [0]

    def down(position: int) -> int:  # to the grid of patches, which begins `origin` outside
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


@torch.no_grad()
def forward_in_tiles(model: nn.Module, images: Tensor, tile: int, overlap: int = 32) -> Tensor:
    """Denoise images tile by tile, blending in the middle of overlaps.

    Patches of a tile are those of the whole image. The result equals that of the whole image
    wherever no tile border lies within the network's field of view: everywhere, once a third of
    the overlap covers that field.

    Args:
        model: A denoiser that keeps the size of its input.
        images: Noisy images (B, C, H, W).
        tile: Side of a tile in pixels (a tile at the border may be larger by a patch stride).
        overlap: Pixels that neighboring tiles share, at least.

    Returns:
        Denoised images (B, C', H, W).
    """
    check_tiles(model, tile, overlap)
    height, width = images.shape[-2:]
    step = getattr(model, "patch_stride", 1) if getattr(model, "min_tile", 1) > 1 else 1
    origin = model.patch_origin(height, width) if step > 1 else (0, 0)
    axes = []
    for side, first in zip((height, width), origin, strict=True):
        starts = _starts(side, tile, overlap, step, first)
        stops = [side if start == starts[-1] else start + tile for start in starts]
        axes.append(list(zip(starts, stops, strict=True)))
    out = total = None
    rows, cols = axes
    for i, (top, bottom) in enumerate(rows):
        down = _ramp(top, bottom, height, *_overlaps(rows, i), images)
        for j, (left, right) in enumerate(cols):
            across = _ramp(left, right, width, *_overlaps(cols, j), images)
            options = {}
            if step > 1:
                options["pad_start"] = (origin[0] if top == 0 else 0, origin[1] if left == 0 else 0)
            part = model(images[:, :, top:bottom, left:right], **options)
            if out is None:
                out = part.new_zeros(part.shape[0], part.shape[1], height, width)
                total = part.new_zeros(height, width)
            weight = (down[:, None] * across).to(part.dtype)
            out[:, :, top:bottom, left:right] += part * weight
            total[top:bottom, left:right] += weight
    return out / total


def _overlaps(spans: list[tuple[int, int]], i: int) -> tuple[int, int]:
    """Pixels that span i shares with the spans before and after it."""
    before = spans[i - 1][1] - spans[i][0] if i > 0 else 0
    after = spans[i][1] - spans[i + 1][0] if i + 1 < len(spans) else 0
    return max(before, 0), max(after, 0)
