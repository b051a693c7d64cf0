"""Super-resolution: pictures reduced by MATLAB's bicubic filter, and enlarged again.

The network sees the bicubic enlargement of the small picture's luma, as in J. Kim et al., "Accurate
Image Super-Resolution Using Very Deep Convolutional Networks" (VDSR), CVPR 2016,
https://arxiv.org/abs/1511.04587, and in T. Plötz, S. Roth, "Neural Nearest Neighbors Networks",
NeurIPS 2018, https://arxiv.org/abs/1810.12575, section 5.3. One network serves several scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import Data, full_dataset
from options import OptionError, option
from run_folder import RunFolder
from tasks.pictures import to_unit
from tasks.quality import psnr, ssim
from tasks.restoration import (
    DegradedCrops,
    DegradedImages,
    ImageReport,
    RestorationOptions,
    RestorationTask,
)
from tasks.task import Evaluate, Finding

__all__ = ["SuperResolutionOptions", "SuperResolutionTask", "enlarge", "reduce"]

# ---------------------------------------------------------------------------------------------
# The bicubic filter


def _symmetric(side: int, border: int) -> Tensor:
    """Positions 0 … side - 1 with a border that repeats the edge pixel: 1 0 | 0 1 2 … ."""
    at = torch.arange(-border, side + border) % (2 * side)
    return torch.where(at < side, at, 2 * side - 1 - at)


def _resize(images: Tensor, border: int, factor: float) -> Tensor:
    """Resize (…, H, W) in float64, as MATLAB's `imresize` does, borders mirrored with the edge."""
    height, width = images.shape[-2:]
    rows, columns = (_symmetric(side, border).to(images.device) for side in (height, width))
    wide = images.double()[..., rows, :][..., columns].reshape(
        -1, 1, height + 2 * border, width + 2 * border
    )
    sides = [round(side * factor) for side in wide.shape[-2:]]
    # With antialiasing this is the kernel of MATLAB (a = -0.5), stretched where it reduces.
    out = F.interpolate(wide, sides, mode="bicubic", antialias=True, align_corners=False)
    cut = round(border * factor)
    out = out[..., cut : sides[0] - cut, cut : sides[1] - cut]
    return out.reshape(*images.shape[:-2], *out.shape[-2:]).to(images.dtype)


def reduce(images: Tensor, scale: int) -> Tensor:
    """Reduce images (…, H, W) whose sides `scale` divides, antialiased."""
    return _resize(images, 4 * scale, 1 / scale)


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Enlarge images (…, H, W)."""
    return _resize(images, 4, scale)


def whole_blocks(images: Tensor, scale: int) -> Tensor:
    """Cut images (…, H, W) at the bottom and right to sides that `scale` divides."""
    height, width = images.shape[-2:]
    return images[..., : height - height % scale, : width - width % scale]


def quantise(images: Tensor) -> Tensor:
    """Round images in [0, 1] to the 256 levels of a file."""
    return (images.clamp(0, 1) * 255).round() / 255


# BT.601 from R, G, B in [0, 1], and back
TO_YCBCR = torch.tensor(
    [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]],
    dtype=torch.float64,
)
OFFSET = torch.tensor([16.0, 128.0, 128.0], dtype=torch.float64)


def to_ycbcr(pixels: Tensor) -> Tensor:
    """Turn (3, H, W) from R, G, B to luma and two color differences; black is 16/255."""
    flat = TO_YCBCR.to(pixels.device) @ pixels.double().flatten(1)
    return ((flat + OFFSET.to(pixels.device)[:, None]) / 255).view_as(pixels)


def to_rgb(ycbcr: Tensor) -> Tensor:
    """Turn it back; not clipped."""
    inverse = torch.linalg.inv(TO_YCBCR).to(ycbcr.device)
    flat = inverse @ (ycbcr.double().flatten(1) * 255 - OFFSET.to(ycbcr.device)[:, None])
    return flat.view_as(ycbcr)


# ---------------------------------------------------------------------------------------------
# Data


class ReducedCrops(DegradedCrops):
    """Crops reduced and enlarged again, each by one of the scales, drawn at random."""

    def pair(self, crops: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return enlargements and (originals, their scales)."""
        degraded, scales = self.degrade(crops, None)
        return degraded, (crops, scales)


class ReducedImages(DegradedImages):
    """Whole images, cut to whole blocks, at every scale: all at the first one, then the next."""

    def __init__(self, images: Sequence[Tensor], names: Sequence[str], degrade: Any, seed: int):
        super().__init__(images, names, degrade, seed)
        self.scales: Sequence[int] = degrade.__self__.scale
        folders = [name.rpartition("/") for name in self.names]
        self.names = [f"{a} x{scale}/{b}" for scale in self.scales for a, _, b in folders]

    def __len__(self) -> int:
        return len(self.images) * len(self.scales)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        which, number = divmod(index, len(self.images))
        scale = self.scales[which]
        clean = to_unit(whole_blocks(self.images[number], scale))
        return enlarge(reduce(clean, scale), scale), (clean, torch.tensor(scale))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return a batch of one image."""
        (index,) = indices
        degraded, (clean, scale) = self[index]
        return degraded[None], (clean[None], scale[None])


ReducedCrops.whole = ReducedImages

# ---------------------------------------------------------------------------------------------
# The task

SCALES = (2, 3, 4)


@dataclass(frozen=True)
class SuperResolutionOptions(RestorationOptions):
    """The scales, and what all restoration takes."""

    crop_size: int = option(84, "side of training crops, in pixels", least=1, most=4096)
    scale: list[int] = option(
        [2],
        "super-resolution: how many times larger; several: one network for all of them",
        kind=int,
        several="list",
        choices=SCALES,
        least=SCALES[0],
        most=SCALES[-1],
    )

    def __post_init__(self) -> None:
        """Refuse crops that are no whole number of blocks."""
        super().__post_init__()
        for scale in self.scale:
            if self.crop_size % scale:
                fits = self.crop_size - self.crop_size % 12
                raise OptionError(
                    f"crop_size {self.crop_size} is not divided by scale {scale}: a crop is "
                    f"reduced to whole pixels. Try --crop_size {max(fits, 12)}."
                )
        if len(set(self.scale)) < len(self.scale):
            raise OptionError(f"scale {' '.join(map(str, self.scale))} names a scale twice.")

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse what super-resolution does not do."""
        super().check(values)
        if values["color"]:
            raise ValueError(
                "--color has no place in super-resolution: the network enlarges the luma, and the "
                "colors of --input are enlarged by the bicubic filter. Leave it out."
            )
        if values["input"] is not None and len(values["scale"]) > 1:
            raise ValueError(
                f"--scale {' '.join(map(str, values['scale']))}: a picture is enlarged by one of "
                "them. Name it, e.g. --scale 2."
            )


class SuperResolutionTask(RestorationTask):
    """Luma reduced by 2, 3 or 4, enlarged by the bicubic filter; see `RestorationTask`.

    Measured as published: luma of BT.601, the image rounded to 8 bits, a border of `scale` pixels
    cropped; PSNR, and SSIM where its window fits.

    Args:
        scale: How many times larger; every training crop draws one of them.
        **options: See `RestorationTask`.
    """

    name = "super_resolution"
    before, after, done = "bicubic", "enlarged", "Enlarged"
    Options = SuperResolutionOptions
    defaults: ClassVar[dict[str, Any]] = {**RestorationTask.defaults}
    luma = "bt601"

    def __init__(self, *, scale: Sequence[int] = (2,), crop_size: int = 84, **options: Any) -> None:
        super().__init__(crop_size=crop_size, **options)
        self.scale = tuple(scale)

    def data_options(self, needs: Any) -> dict[str, Any]:
        """Return what builders of clean pictures take."""
        return {
            **super().data_options(needs),
            "kinds": (ReducedCrops, ReducedImages),
            "luma": self.luma,
        }

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Reduce crops (B, C, H, W) and enlarge them again; return them and their scales (B,)."""
        which = torch.randint(len(self.scale), (len(clean),), generator=generator)
        scales = torch.tensor(self.scale)[which]
        out = torch.empty_like(clean)
        for scale in self.scale:
            mine = scales == scale
            if mine.any():
                out[mine] = enlarge(reduce(clean[mine], scale), scale)
        return out, scales

    def describe_damage(self) -> str:
        """Word the reduction."""
        return "luma (BT.601) of 8 bits reduced by the antialiased bicubic filter, not rounded"

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Move a batch to the device: (enlargements, (originals, scales))."""
        inputs, (clean, scales) = batch
        return inputs.to(device, non_blocking=True), (
            clean.to(device, non_blocking=True),
            scales.to(device, non_blocking=True),
        )

    def loss(self, outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """Return the squared error, see `RestorationTask`."""
        return super().loss(outputs, targets[0])

    def metrics(self, outputs: Tensor, targets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return PSNR in dB and SSIM of every image, each without its border."""
        clean, scales = targets
        found: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        for image, original, border in zip(outputs, clean, scales.tolist(), strict=True):
            inner = (..., slice(border, -border), slice(border, -border))
            image, original = quantise(image[inner])[None], quantise(original[inner])[None]
            found["psnr"].append(psnr(image, original))
            found["ssim"].append(ssim(image, original, border="valid"))
        return {name: torch.cat(values) for name, values in found.items()}

    def examine(
        self, model: nn.Module, data: Data, run: RunFolder, evaluate: Evaluate
    ) -> tuple[dict[str, float], Finding]:
        """Evaluate on the test set, with a table of images, and pictures if they are asked for."""
        base = full_dataset(data.test)
        report = EnlargementReport(
            base.names, run, self.before, self.after, pictures=self.save_images
        )

        def observe(inputs: Tensor, outputs: Tensor, targets: Any, metrics: Mapping) -> None:
            before = self.metrics(inputs, targets)["psnr"]
            report.note(inputs, outputs, targets, metrics, before)

        metrics = evaluate(data.test, observe=observe)
        protocol = (
            f"Protocol: {self.describe_damage()}, enlarged by the same filter; outputs rounded to "
            "8 bits and clipped, a border of as many pixels as the scale cropped; PSNR and SSIM "
            "(Gaussian window of 11x11, sigma 1.5, where it fits) per image, then averaged."
        )
        return metrics, Finding({}, [protocol, *report.lines()])

    def treat(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, str]:
        """Enlarge (C, H, W): luma by the network, colors by the bicubic filter."""
        (scale,) = self.scale
        text = f", {scale} times"
        if len(pixels) == 1:
            return self.predict(model, enlarge(pixels, scale)[None])[0], text
        wide = enlarge(to_ycbcr(pixels), scale)
        luma = self.predict(model, wide[None, :1].to(pixels.dtype))[0]
        rgb = to_rgb(torch.cat((luma.double(), wide[1:])))
        return rgb.to(pixels.dtype), f"{text}, colors by the bicubic filter"

    def treat_alpha(self, alpha: Tensor) -> Tensor:
        """Enlarge the alpha channel (1, H, W)."""
        return enlarge(alpha, self.scale[0])


class EnlargementReport(ImageReport):
    """Panels: small, bicubic, ours, original."""

    def note(
        self,
        inputs: Tensor,
        outputs: Tensor,
        targets: tuple[Tensor, Tensor],
        metrics: Mapping[str, Tensor],
        before: Tensor,
    ) -> None:
        """Take note of a batch."""
        clean, scales = targets
        for i, scale in enumerate(scales.tolist()):
            small = quantise(reduce(clean[i], scale))
            shown = small.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
            self.enter(
                before[i].item(),
                {key: values[i].item() for key, values in metrics.items()},
                {f"low x{scale}": shown},
                inputs[i],
                outputs[i],
                {"original": clean[i]},
            )
