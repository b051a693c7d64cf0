"""Checks of the options the layers share.

Every function raises `ValueError` with a complete sentence: what is wrong, why, what to try.
Options are called by their constructor names, which are also the names users give them.
"""

from collections.abc import Iterable

__all__ = [
    "AGGREGATION_TYPES",
    "MAGNITUDE_TYPES",
    "SAMPLING_TYPES",
    "SHUFFLE_PATTERNS",
    "SIMILARITY_TYPES",
    "check_choice",
    "check_fraction",
    "check_kernel_size",
    "check_neighbor_options",
    "check_shuffle",
]

SAMPLING_TYPES = ("all", "random", "spatial")
SHUFFLE_PATTERNS = ("BA", "NA", "B", "A")
MAGNITUDE_TYPES = ("cosine", "euclidean")
SIMILARITY_TYPES = ("Loc", "Col", "Loc_Col")
AGGREGATION_TYPES = ("Col", "Loc_Col")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)} (got {value!r}).")


def check_fraction(name: str, value: float, meaning: str) -> None:
    """Refuse a number outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1 (got {value}): it is {meaning}.")


def check_at_least(name: str, value: int, least: int, meaning: str) -> None:
    """Refuse a count below its least sensible value."""
    if value < least:
        raise ValueError(f"{name} must be at least {least} (got {value}): it is {meaning}.")


def check_kernel_size(kernel_size: int) -> None:
    """Refuse kernels that cannot keep the size of the map with equal padding on both sides."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd and at least 1 (got {kernel_size}): the convolution keeps "
            "the size of the map, which takes the same padding on both sides. "
            f"Try kernel_size {max(1, kernel_size + 1)}."
        )


def check_shuffle(shuffle_pattern: str, shuffle_scale: int) -> None:
    """Refuse a shuffle without a scale."""
    check_choice("shuffle_pattern", shuffle_pattern, SHUFFLE_PATTERNS)
    if shuffle_scale < 0:
        raise ValueError(f"shuffle_scale must not be negative (got {shuffle_scale}); 0 is off.")
    if shuffle_pattern != "NA" and shuffle_scale < 1:
        raise ValueError(
            f"shuffle_pattern {shuffle_pattern} needs shuffle_scale >= 1 (got {shuffle_scale}): "
            "it is the factor by which the map shrinks. Try shuffle_scale 2, or "
            "shuffle_pattern NA."
        )


def check_sampling(sampling_type: str, num_samples: int, sample_padding: int) -> None:
    """Refuse a number of samples that does not belong to the way of sampling."""
    check_choice("sampling_type", sampling_type, SAMPLING_TYPES)
    if sampling_type == "all" and num_samples != -1:
        raise ValueError(
            f"sampling_type all needs num_samples -1 (got {num_samples}): every position is a "
            "candidate, there is nothing to count. Leave num_samples out, or try sampling_type "
            "random or spatial."
        )
    if sampling_type != "all" and num_samples < 1:
        what = {
            "random": "the number of candidates drawn",
            "spatial": "the side of the sampling grid",
        }[sampling_type]
        raise ValueError(
            f"sampling_type {sampling_type} needs num_samples >= 1 (got {num_samples}): it is "
            f"{what}. Try num_samples {'64' if sampling_type == 'random' else '8'}."
        )
    check_at_least("sample_padding", sample_padding, 0, "the margin left out of the sampling grid")


def check_neighbor_options(
    *,
    in_channels: int,
    out_channels: int,
    K: int,
    stride: int,
    padding: int,
    sampling_type: str,
    num_samples: int,
    sample_padding: int,
    shuffle_pattern: str,
    shuffle_scale: int,
    magnitude_type: str,
    aggregation_type: str,
) -> None:
    """Check everything the convolutions over nearest neighbors have in common."""
    check_at_least("in_channels", in_channels, 1, "the number of input channels")
    check_at_least("out_channels", out_channels, 1, "the number of output channels")
    check_at_least("K", K, 1, "the number of neighbors, the position itself included")
    check_at_least("stride", stride, 1, "the step between output positions")
    check_at_least("padding", padding, 0, "the width of the border of zeros around the map")
    check_sampling(sampling_type, num_samples, sample_padding)
    check_shuffle(shuffle_pattern, shuffle_scale)
    check_choice("magnitude_type", magnitude_type, MAGNITUDE_TYPES)
    check_choice("aggregation_type", aggregation_type, AGGREGATION_TYPES)
