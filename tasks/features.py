"""Features for models that compare samples as they are: PCA, and a trained network's features.

References:
    K. Pearson, "On lines and planes of closest fit to systems of points in space", 1901 (PCA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset import Data, FeatureArray, build_loader

__all__ = ["PCA", "check_features", "last_linear", "load_features", "penultimate_features"]


def check_features(name: str, spec: str, *, learns: bool = False) -> None:
    """Refuse what is no feature: raw, pca:N, learned, or the checkpoint of a network.

    Args:
        name: Name of the option.
        spec: Its value.
        learns: Whether the model can learn features of its own.
    """
    if spec == "raw" or (learns and spec == "learned"):
        return
    if spec.startswith("pca:"):
        number = spec.removeprefix("pca:")
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"{name} {spec}: after pca: comes the number of components, e.g. pca:50."
            )
    elif not Path(spec).is_file():
        raise ValueError(
            f"{name} {spec} is neither raw, pca:N{', learned' if learns else ''} nor an existing "
            "checkpoint file (the best.pt of a network trained here)."
        )


def load_features(
    spec: str,
    load: Callable[[], Data],
    open_network: Callable[[str], tuple[Data, nn.Module, str]],
    device: torch.device,
) -> Data:
    """Load classification data in which every sample is replaced by its features.

    Args:
        spec: "raw", "pca:N", the checkpoint of a network trained here, or "learned": the model
            makes its own features of samples as they are.
        load: Loads the data as pixels in [0, 1].
        open_network: Loads, for a checkpoint, the data as its network wants it, the network, and
            the network's name.
        device: Where features are computed.

    Returns:
        The data; ``extra["pictures"]`` is `load` where samples are no pictures any more.
    """
    if spec in ("raw", "learned"):
        return load()
    if spec.startswith("pca:"):
        flat = encode_data(load(), partial(torch.flatten, start_dim=1))
        features = encode_data(flat, PCA.fit(flat.train.features, int(spec.removeprefix("pca:"))))
    else:
        data, network, name = open_network(spec)
        network.to(device).eval()
        features = encode_data(data, partial(penultimate_features, network), device=device)
        features.notes.append(
            f"Features: {features.sample_shape[0]} numbers a sample from the {name} in {spec}."
        )
    features.extra["pictures"] = load
    return features


class PCA:
    """Projection on the directions of largest variance: (N, D) -> (N, num_components).

    Directions are signed so that their largest entry is positive: the same data give the same
    projection everywhere.

    Args:
        mean: Mean of the samples, (D,).
        components: One direction a row, (num_components, D), of unit length.
    """

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        self.mean, self.components = mean, components

    @classmethod
    def fit(cls, x: Tensor, num_components: int) -> PCA:
        """Find the directions in samples (N, D).

        Raises:
            ValueError: If there are fewer features or samples than components.
        """
        if not 1 <= num_components <= min(x.shape):
            raise ValueError(
                f"PCA to {num_components} components needs at least as many samples and features: "
                f"there are {x.shape[0]} samples of {x.shape[1]} features"
            )
        mean = x.mean(dim=0)
        covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for part in x.split(4096):
            centered = (part - mean).float()
            covariance += (centered.t() @ centered).double()
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        components = vectors[:, -num_components:].t().flip(0)
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        return cls(mean, (components * largest.sign()).to(x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """Project samples (N, D) -> (N, num_components)."""
        return (x - self.mean.to(x.device)) @ self.components.t().to(x.device)


def last_linear(network: nn.Module) -> str:
    """Return the name of a network's last linear layer.

    Raises:
        ValueError: If it has none.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(network).__name__} has no linear layer: no features to take")
    return linear[-1]


@torch.no_grad()
def penultimate_features(network: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a classifier's last linear layer sees: (B, ...) -> (B, D).

    Args:
        network: A network in evaluation mode that ends in a linear layer.
        inputs: A batch, prepared as in the network's training.

    Raises:
        ValueError: If the network has no linear layer.
    """
    seen: list[Tensor] = []
    last = network.get_submodule(last_linear(network))
    hook = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        network(inputs)
    finally:
        hook.remove()
    return seen[-1].flatten(1).float()


def encode_data(
    data: Data,
    function: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Data:
    """Replace every sample of classification data by its features, once and for all.

    Args:
        data: The data; random augmentation is drawn once.
        function: Maps a batch of samples on the device to features (B, D).
        device: Where it is evaluated; the features are kept on the CPU.
        batch_size: Samples at a time.
    """

    def encode(part: Dataset | None) -> FeatureArray | None:
        if part is None:
            return None
        features, targets = [], []
        for x, y in build_loader(part, batch_size=batch_size):
            features.append(function(x.to(device)).cpu())
            targets.append(y)
        return FeatureArray(torch.cat(features), torch.cat(targets))

    train, val, test = (encode(part) for part in (data.train, data.val, data.test))
    shape = tuple(test.features.shape[1:])
    return replace(data, train=train, val=val, test=test, sample_shape=shape)
