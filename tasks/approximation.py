"""Approximation: a function known at points, e.g. a picture: position -> values in [0, 1]."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset import Data, FeatureArray, read_image
from options import Options, option
from run_folder import RunFolder
from tasks.quality import mse_to_psnr
from tasks.task import Finding, Task
from utils import save_panels

__all__ = ["ApproximationTask", "PictureOptions", "build_image"]


def build_image(*, image_path: str | None, seed: int = 0) -> Data:
    """Load one picture as a function: (row, column), counted in pixels -> RGB in [0, 1].

    Args:
        image_path: The picture; None takes a photograph that ships with scikit-learn.
        seed: Nothing is drawn at random.
    """
    notes = []
    if image_path is None:
        import sklearn

        image_path = str(Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg")
        notes.append(f"Picture: {image_path} (--image_path chooses another).")
    pixels, changed = read_image(image_path, color=True)
    if changed:
        notes.append(f"{image_path} is gray: it is learnt with three equal channels.")
    _, height, width = pixels.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([rows, columns], dim=-1).float().reshape(-1, 2)
    array = FeatureArray(positions, pixels.permute(1, 2, 0).reshape(-1, 3).float() / 255)
    return Data(
        name="image",
        task="approximation",
        train=array,
        test=array,
        sample_shape=(2,),
        num_outputs=3,
        notes=notes,
        extra={"image": pixels.float() / 255, "positions": positions},
    )


@dataclass(frozen=True)
class PictureOptions(Options):
    """One picture."""

    title = "Picture (--dataset image)"
    image_path: str = option(None, "the picture (default: a photograph)", kind=str)


@dataclass(frozen=True)
class ApproximationOptions(Options):
    """When a value counts as reached."""

    title = "Approximation"
    tolerance: float = option(
        0.05,
        "distance in RGB, [0, 1], from which on a pixel counts as wrong",
        fixed=True,
        most=1000,
    )


class ApproximationTask(Task):
    """A function known at points, e.g. a picture: position -> values in [0, 1].

    Args:
        tolerance: A prediction is right where its distance to the value is below this.
        seed: Nothing is drawn at random.
    """

    name = "approximation"
    headline, headline_name, headline_unit = "within", "Within tolerance", "%"
    Options = ApproximationOptions

    def __init__(self, *, tolerance: float = 0.05, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.tolerance = tolerance

    def sizes(self, data: Data) -> dict[str, Any]:
        """Return the number of coordinates and of values."""
        return {
            "num_inputs": data.sample_shape[0],
            "num_outputs": data.num_outputs,
            "tolerance": self.tolerance,
        }

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return 100 where within tolerance and 0 elsewhere, and the mean square error."""
        errors = outputs.float() - targets
        right = (errors.norm(dim=1) < self.tolerance).float() * 100
        return {"within": right, "mse": errors.square().mean(dim=1)}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file; PSNR is that of all points together."""
        return (
            f"Within tolerance: {metrics['within']:.4f}%, "
            f"PSNR: {mse_to_psnr(metrics['mse']):.4f} dB"
        )

    def show(self, model: nn.Module, data: Data, run: RunFolder) -> Finding:
        """Draw the picture, the centers and what is learnt, into ``image.png``."""
        image, positions = data.extra["image"], data.extra["positions"]
        device = next(model.buffers()).device
        parts = [model(part.to(device)).cpu() for part in positions.split(4096)]
        learnt = torch.cat(parts).t().reshape(image.shape).clamp(0, 1)
        layer = model.layers[0]
        centers = torch.ones_like(image)
        row, column = layer.centers.long().cpu().unbind(1)
        centers[:, row, column] = layer.targets.t().cpu()
        share = 100 * layer.num_centers / len(positions)
        quality = mse_to_psnr((learnt - image).square().mean().item())
        panels = {
            "picture": image,
            f"{layer.num_centers} centers ({share:.1f}%)": centers,
            f"reconstruction {quality:.2f} dB": learnt,
        }
        save_panels(run.file("image.png"), panels)
        line = (
            f"{layer.num_centers} centers, {share:.2f}% of {len(positions)} pixels; PSNR of the "
            f"picture {quality:.4f} dB; see image.png."
        )
        return Finding({"psnr": quality, "share": share}, [line])
