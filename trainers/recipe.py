"""What adds to plain gradient descent: warm-up, mixed samples, averaged weights, memory formats."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from options import option
from trainers.trainer import TrainingOptions

__all__ = [
    "RecipeOptions",
    "Warmup",
    "build_average",
    "build_mix",
    "check_recipe",
    "set_channels_last",
]


@dataclass(frozen=True)
class RecipeOptions(TrainingOptions):
    """What may be added to plain gradient descent."""

    title = "Training by gradient"
    warmup_epochs: float = option(
        0.0,
        "epochs, also a part of one, in which the learning rate rises evenly from step to step up "
        "to what --lr and --scheduler say",
        least=0,
        most=10**6,
    )
    mixup: float = option(
        0.0,
        "classification of images: blend every training image and its class with another one, by "
        "a share drawn from Beta(ALPHA, ALPHA); 0: not",
        least=0,
        most=1000,
        metavar="ALPHA",
    )
    cutmix: float = option(
        0.0,
        "classification of images: paste a rectangle of another image into every training image, "
        "its share drawn from Beta(ALPHA, ALPHA); 0: not; with --mixup one of them per batch",
        least=0,
        most=1000,
        metavar="ALPHA",
    )
    ema: float = option(
        0.0,
        "evaluate and save the mean of the weights of the last steps, which fade by DECAY a step "
        "(0.99: about 100 steps count); 0: the weights themselves",
        least=0,
        below=1,
        metavar="DECAY",
    )
    channels_last: bool = option(
        False, "keep the channels of a pixel side by side in memory, which some convolutions like"
    )


def check_recipe(values: Mapping[str, Any], task_name: str) -> None:
    """Refuse what works on classes where there are none.

    Raises:
        ValueError: What is wrong, why, and what to try.
    """
    given = [name for name in ("label_smoothing", "mixup", "cutmix") if values[name] > 0]
    if given and task_name != "classification":
        raise ValueError(
            f"--{given[0]} {values[given[0]]:g} changes the classes of samples, and the task of "
            f"this run, {task_name}, has none. Leave it out, or choose a data set to classify."
        )


# ---------------------------------------------------------------------------------------------
# Samples


def build_mix(
    mixup: float, cutmix: float, num_classes: int, shape: Sequence[int]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Return what mixes images (B, C, H, W) and classes (B,) into images and shares (B, classes).

    It draws from PyTorch's global generator.

    Args:
        mixup: α of H. Zhang et al., "mixup", https://arxiv.org/abs/1710.09412; 0: not.
        cutmix: α of S. Yun et al., "CutMix", https://arxiv.org/abs/1905.04899; 0: not. One of the
            two is drawn for every batch where both are asked for.
        num_classes: Number of classes.
        shape: Shape of a sample.

    Raises:
        ValueError: If the samples are no images.
    """
    wanted = {"MixUp": mixup, "CutMix": cutmix}
    wanted = {name: alpha for name, alpha in wanted.items() if alpha > 0}
    if not wanted:
        return None
    if len(shape) != 3:
        raise ValueError(
            f"{next(iter(wanted)).lower()} mixes images of shape (C, H, W), and the samples here "
            f"have the shape {tuple(shape)}. Leave it out."
        )
    from torchvision.transforms import v2

    made = [getattr(v2, n)(alpha=alpha, num_classes=num_classes) for n, alpha in wanted.items()]
    return made[0] if len(made) == 1 else v2.RandomChoice(made)


def _keep_channels_last(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(
        x.contiguous(memory_format=torch.channels_last)
        if isinstance(x, Tensor) and x.ndim == 4
        else x
        for x in inputs
    )


def set_channels_last(model: nn.Module) -> None:
    """Let a model keep its weights, and what it is given, with channels last in memory."""
    model.to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(_keep_channels_last)


# ---------------------------------------------------------------------------------------------
# Steps


class Warmup:
    """A learning rate that rises evenly over the first steps of a run.

    It multiplies what a schedule says, whatever that is.

    Args:
        optimizer: What it steers.
        steps: Steps until the rate is there; 0: from the beginning.

    Attributes:
        done: Steps taken so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.optimizer, self.steps, self.done = optimizer, steps, 0

    def factor(self, step: int) -> float:
        """Return what the rate of a step is multiplied by; steps count from 1."""
        return min(1.0, step / self.steps) if self.steps else 1.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take a step in this block, with the rate that it is to have."""
        self.done += 1
        factor, groups = self.factor(self.done), self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"] * self.factor(max(1, self.done))


def build_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """Return the moving average of a model's weights and buffers; None for a decay of 0.

    Buffers of whole numbers, which have no mean, are copied.

    Args:
        model: The model.
        decay: What the average is multiplied by in each step.
    """
    if decay == 0:
        return None
    update = get_ema_multi_avg_fn(decay)

    def average(means: list[Tensor], values: list[Tensor], count: Any) -> None:
        if means[0].is_floating_point() or means[0].is_complex():
            update(means, values, count)
            return
        for mean, value in zip(means, values, strict=True):
            mean.copy_(value)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
