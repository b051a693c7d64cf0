"""Trackers: what a run measures, sent to TensorBoard or Weights & Biases as well.

Both are optional packages, loaded only where they are asked for. A tracker is told every row of
metrics.csv, and at the end the pictures that the run has drawn, its hyperparameters and its final
metrics. `WRITERS` maps flags to classes: another tracker is a class, a row and a flag.
"""

import contextlib
import importlib.util
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["WRITERS", "Tracker", "TrackerError", "check_trackers", "tracked"]

MOST_PICTURES = 64  # of a run


class TrackerError(RuntimeError):
    """A tracker that cannot be started; the message says why."""


class Tracker(Protocol):
    """What is told of a run.

    Args:
        folder: The run folder.
        wanted: Value of the flag.
        settings: The hyperparameters, plain types by name.
        goes_on: Whether the run goes on from an earlier one in this folder.
    """

    package: str

    def __init__(
        self, folder: Path, wanted: Any, settings: Mapping[str, Any], goes_on: bool
    ) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics.csv; its first column counts."""

    def conclude(self, pictures: Sequence[Path], final: Mapping[str, float]) -> None:
        """Take the pictures that the run has drawn, and its final metrics."""

    def close(self, *, failed: bool) -> None:
        """End; the run may have failed."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by name, but for its counter."""
    return {k: float(v) for k, v in list(row.items())[1:] if isinstance(v, int | float)}


class TensorBoard:
    """Event files below ``tensorboard/`` of the run folder.

    Rows that a resumed run knows already are written anew, so that each stands there once.
    """

    package = "tensorboard"

    def __init__(
        self, folder: Path, wanted: Any, settings: Mapping[str, Any], goes_on: bool
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.settings, self.step = folder, settings, 0
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row."""
        self.step = int(next(iter(row.values())))
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, self.step)
        self.writer.flush()

    def conclude(self, pictures: Sequence[Path], final: Mapping[str, float]) -> None:
        """Write pictures, and the table of hyperparameters and final metrics."""
        import numpy as np
        from PIL import Image

        for path in pictures:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            tag = str(path.relative_to(self.folder).with_suffix(""))
            self.writer.add_image(tag, pixels, self.step, dataformats="HWC")
        plain = (bool, int, float, str)
        settings = {k: v if isinstance(v, plain) else str(v) for k, v in self.settings.items()}
        metrics = {f"final/{name}": value for name, value in final.items()}
        self.writer.add_hparams(settings, metrics, run_name=".")

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a project of wandb; without a network by its own ``WANDB_MODE=offline``.

    The number of its run is kept in ``wandb_id.txt``, so that a resumed run goes on with it.
    """

    package = "wandb"

    def __init__(
        self, folder: Path, wanted: Any, settings: Mapping[str, Any], goes_on: bool
    ) -> None:
        import wandb

        self.wandb, self.folder, self.step = wandb, folder, 0
        path = folder / "wandb_id.txt"
        number = path.read_text("utf-8").strip() if goes_on and path.is_file() else uuid.uuid4().hex
        path.write_text(number + "\n", "utf-8")
        try:
            self.run = wandb.init(
                project=wanted,
                name=folder.resolve().name,
                dir=str(folder),
                id=number,
                resume="allow",
                config=dict(settings),
            )
        except wandb.Error as error:
            raise TrackerError(
                f"--wandb {wanted} cannot start: {error}. Log in by wandb login, or set "
                "WANDB_MODE=offline and send the run later by wandb sync."
            ) from error

    def row(self, row: Mapping[str, Any]) -> None:
        """Send a row that is not there yet."""
        self.step = int(next(iter(row.values())))
        if self.step >= self.run.step:
            self.run.log(numbers(row), step=self.step)

    def conclude(self, pictures: Sequence[Path], final: Mapping[str, float]) -> None:
        """Send pictures and final metrics."""
        images = {
            str(path.relative_to(self.folder).with_suffix("")): self.wandb.Image(str(path))
            for path in pictures
        }
        if images:
            self.run.log(images, step=self.step)
        self.run.summary.update({f"final/{name}": value for name, value in final.items()})

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self.run.finish(exit_code=int(failed))


WRITERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_trackers(values: Mapping[str, Any]) -> None:
    """Refuse trackers whose package is not there.

    Args:
        values: The flags of `WRITERS` by name.

    Raises:
        ValueError: Names the package and the line that installs it.
    """
    for flag, writer in WRITERS.items():
        if values[flag] and importlib.util.find_spec(writer.package) is None:
            raise ValueError(
                f"--{flag} needs the package {writer.package}, which is not installed here: "
                f"pip install {writer.package}"
            )


def final_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that a run ends with: the best one, the last ones, those of the test."""
    found = {name: results.get(name) for name in ("best", "best_epoch")}
    found |= numbers((results.get("history") or [{}])[-1])
    found |= {f"test_{name}": value for name, value in (results.get("test") or {}).items()}
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float)}


class Trackers:
    """All trackers of a run."""

    def __init__(self, folder: Path, made: Sequence[Tracker]) -> None:
        self.folder, self.made = folder, made

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand on rows of metrics.csv."""
        for row in rows:
            for tracker in self.made:
                tracker.row(row)

    def conclude(self, results: Mapping[str, Any]) -> None:
        """Hand on the pictures in the folder, and the final metrics."""
        pictures = sorted(self.folder.rglob("*.png"))
        if self.made and len(pictures) > MOST_PICTURES:
            print(f"note: trackers get the first {MOST_PICTURES} of {len(pictures)} pictures.")
        for tracker in self.made:
            tracker.conclude(pictures[:MOST_PICTURES], final_metrics(results))


@contextlib.contextmanager
def tracked(
    folder: Path, wanted: Mapping[str, Any], settings: Mapping[str, Any], *, goes_on: bool
) -> Iterator[Trackers]:
    """Start the trackers that are asked for, and end them with this block.

    Args:
        folder: The run folder, which is there.
        wanted: Values of the flags of `WRITERS`.
        settings: The hyperparameters.
        goes_on: Whether the run goes on from an earlier one in this folder.

    Raises:
        TrackerError: If one cannot be started.
    """
    made: list[Tracker] = []
    failed = True
    try:
        for flag, writer in WRITERS.items():
            if wanted[flag]:
                made.append(writer(folder, wanted[flag], settings, goes_on))
        yield Trackers(folder, made)
        failed = False
    finally:
        for tracker in made:
            tracker.close(failed=failed)
