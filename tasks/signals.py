"""Signals with a class each: MNIST-1D, generated here, and files of the UCR archive.

References:
    S. Greydanus, D. Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024,
    https://arxiv.org/abs/2011.14439; H. A. Dau et al., "The UCR Time Series Archive", 2018,
    https://arxiv.org/abs/1810.07758.

Symbols: N signals, C channels, L samples of a signal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import Data, FeatureArray
from files import DataError
from options import OptionError, Options, option
from utils import memory_size

__all__ = ["MNIST1DOptions", "UCROptions", "build_mnist1d", "build_ucr", "draw_mnist1d"]

# Heights of the ten digits, drawn in one stroke from left to right (Greydanus & Kobak).
TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
FEWEST_PADDING, MOST_PADDING = 36, 60
NOISE_SIGMA = 2.0  # of the Gaussian that correlates the noise, in samples
UNEQUAL = ("refuse", "zeros", "last", "resample")
MISSING = ("refuse", "interpolate")


@dataclass(frozen=True)
class MNIST1DOptions(Options):
    """Ten digits as curves, generated from --seed: padded, scaled, moved, sheared, with noise."""

    title = "Generated signals (mnist1d)"
    num_train: int = option(4000, "generated training signals", least=1, most=10**7)
    num_test: int = option(1000, "generated test signals", least=1, most=10**7)
    scale_coeff: float = option(
        0.4, "mnist1d: heights are multiplied by 1 ± half of this", least=0, most=2
    )
    max_translation: int = option(
        48, "mnist1d: positions that a digit may begin at", least=1, most=72
    )
    corr_noise_scale: float = option(
        0.25, "mnist1d: strength of the correlated noise beside the digit", least=0, most=100
    )
    iid_noise_scale: float = option(
        0.02, "mnist1d: standard deviation of the white noise on every sample", least=0, most=100
    )
    shear_scale: float = option(
        0.75, "mnist1d: the slope added along a signal is up to half of this", least=0, most=100
    )
    seq_length: int = option(40, "mnist1d: samples of a signal in the end", least=2, most=65536)


@dataclass(frozen=True)
class UCROptions(Options):
    """Signals of the UCR archive: NAME_TRAIN.tsv, .ts or .arff, and NAME_TEST beside it."""

    title = "Signals in files (ucr)"
    data_path: str = option(
        "./Data", "the training file, NAME_TRAIN.tsv, .txt, .csv, .ts or .arff", resumable=True
    )
    unequal: str = option(
        "refuse",
        "signals of unequal length: refuse them; pad their ends by zeros or by the last value; or "
        "resample all to the longest",
        choices=UNEQUAL,
    )
    missing: str = option(
        "refuse",
        "values missing inside a signal: refuse them, or draw a line between their neighbors",
        choices=MISSING,
    )


# ---------------------------------------------------------------------------------------------
# MNIST-1D


def templates() -> Tensor:
    """Return the ten digits: (10, 12), of mean square 1/36 about their mean, beginning at 0."""
    x = torch.tensor(TEMPLATES, dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    return (x - x[:, :1]) / 6


def read_between(x: Tensor, places: Tensor) -> Tensor:
    """Read rows between their samples: (N, L) at places (N, M) in samples -> (N, M)."""
    last = x.shape[1] - 1
    low = places.floor().clamp(0, max(last - 1, 0)).long()
    part = (places - low).clamp(0, 1)
    return torch.lerp(x.gather(1, low), x.gather(1, (low + 1).clamp(max=last)), part)


def evenly(count: int, ends: Tensor) -> Tensor:
    """Return `count` places from 0 to each end: (N,) -> (N, count)."""
    return torch.linspace(0, 1, count, dtype=ends.dtype) * ends[:, None]


def smoothed(noise: Tensor) -> Tensor:
    """Correlate white noise by a Gaussian: (N, L + 2R) -> (N, L), R = 4 sigma."""
    reach = round(4 * NOISE_SIGMA)
    taps = torch.arange(-reach, reach + 1, dtype=noise.dtype)
    taps = torch.exp(-0.5 * (taps / NOISE_SIGMA) ** 2)
    return F.conv1d(noise[:, None], (taps / taps.sum())[None, None])[:, 0]


def draw_mnist1d(
    count: int, options: MNIST1DOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw signals of the ten digits.

    A digit of 12 samples is padded by 36 to 60 zeros and stretched to 72 samples, scaled, and moved
    to the right, round the end. Correlated noise fills what is no digit, white noise comes on top;
    a slope is added, and the signal is read at `seq_length` places.

    Args:
        count: Number of signals.
        options: Their options.
        generator: What draws.

    Returns:
        Signals (count, 1, seq_length) float32 and labels (count,): the digits in turn, shuffled.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    labels = (torch.arange(count) % len(TEMPLATES))[torch.randperm(count, generator=generator)]
    digit = len(TEMPLATES[0])
    side = digit + MOST_PADDING
    padding = FEWEST_PADDING + (uniform(count) * (MOST_PADDING - FEWEST_PADDING + 1)).floor()
    places = evenly(side, digit + padding - 1)
    x = read_between(F.pad(templates()[labels], (0, MOST_PADDING)), places)
    x = x * (1 + options.scale_coeff * (uniform(count, 1) - 0.5))
    shift = torch.randint(options.max_translation, (count, 1), generator=generator)
    moved = (torch.arange(side) - shift) % side
    x, inside = x.gather(1, moved), (places < digit).gather(1, moved)
    white = torch.randn(
        count, side + 2 * round(4 * NOISE_SIGMA), generator=generator, dtype=torch.float64
    )
    x = torch.where(inside, x, options.corr_noise_scale * smoothed(white))
    x = x + options.iid_noise_scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    slope = options.shear_scale * (uniform(count, 1) - 0.5)
    x = x - slope * torch.linspace(-0.5, 0.5, side, dtype=torch.float64)
    ends = torch.full((count,), side - 1.0, dtype=torch.float64)
    return read_between(x, evenly(options.seq_length, ends)).float()[:, None], labels


def build_mnist1d(
    *,
    seed: int,
    num_train: int,
    num_test: int,
    min_side: int,
    normalize: bool,
    **others: Any,
) -> Data:
    """Generate both sets, from seeds of their own."""
    options = MNIST1DOptions(num_train=num_train, num_test=num_test, **others)
    parts = [
        draw_mnist1d(count, options, torch.Generator().manual_seed(2 * seed + part))
        for part, count in enumerate((num_train, num_test))
    ]
    names = [str(digit) for digit in range(len(TEMPLATES))]
    return signal_data("mnist1d", *parts, names, min_side=min_side, normalize=normalize)


def signal_data(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    *,
    min_side: int,
    normalize: bool,
) -> Data:
    """Wrap signals (N, C, L) and labels (N,) as classification data.

    Args:
        name: Name of the data set.
        train: Signals and labels.
        test: The same for testing.
        class_names: One name a class.
        min_side: The fewest samples that the model accepts.
        normalize: Subtract each channel's mean over the training set and divide by its standard
            deviation; otherwise signals stay as they are.
    """
    if train[0].shape[2] < min_side:
        raise DataError(
            f"--dataset {name} has signals of {train[0].shape[2]} samples, and the model needs at "
            f"least {min_side}. Take another --model, or longer signals."
        )
    x, test_x = train[0], test[0]
    if normalize:
        mean = x.double().mean((0, 2), keepdim=True)
        std = x.double().std((0, 2), correction=0, keepdim=True).clamp_min(1e-6)
        x, test_x = (((part - mean) / std).float() for part in (x, test_x))
    return Data(
        name=name,
        task="classification",
        train=FeatureArray(x, train[1]),
        test=FeatureArray(test_x, test[1]),
        sample_shape=tuple(x.shape[1:]),
        num_outputs=len(class_names),
        class_names=tuple(class_names),
    )


# ---------------------------------------------------------------------------------------------
# Files of the UCR archive


def partner(path: Path) -> Path:
    """Return the test file beside NAME_TRAIN.tsv: NAME_TEST.tsv."""
    stem, tail = path.stem, "_TRAIN"
    if not stem.upper().endswith(tail):
        raise DataError(
            "--dataset ucr reads a training file whose name ends in _TRAIN, and its test file "
            "beside it: --data_path must name NAME_TRAIN.tsv, .txt, .csv, .ts or .arff (got "
            f"{path})."
        )
    end = "_TEST" if stem.endswith(tail) else "_test"
    return path.with_name(stem[: -len(tail)] + end + path.suffix)


def read_table(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read lines of a class and values, apart by tabs, commas or spaces; NaN and ? are missing.

    Returns:
        Values (N, L) float64, NaN where there are none, and the classes as written.
    """
    rows, labels = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text: a UCR file is lines of numbers.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        try:
            rows.append([math.nan if word == "?" else float(word) for word in words[1:]])
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}, holds a word that is no number ({error}): a line is a "
                "class and the values of a signal, apart by tabs."
            ) from error
        labels.append(words[0])
    return as_array(rows), labels


def read_ts(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a .ts file of signals of one channel: values apart by commas, a colon, the class."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith(("@", "#", "%")):
            continue
        parts = line.split(":")
        if len(parts) != 2:
            raise DataError(
                f"{path}, line {number}, has {len(parts) - 1} channels and a class, apart by "
                "colons: --dataset ucr reads one channel and a class."
            )
        try:
            rows.append([math.nan if w.strip() == "?" else float(w) for w in parts[0].split(",")])
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}.") from error
        labels.append(parts[1].strip())
    return as_array(rows), labels


def as_array(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Join rows of any lengths: (N, longest) float64, NaN after the end of shorter ones."""
    values = np.full((len(rows), max(map(len, rows), default=0)), math.nan)
    for row, numbers in zip(values, rows, strict=True):
        row[: len(numbers)] = numbers
    return values


def read_arff(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read an .arff file of numeric attributes and one nominal class, by SciPy."""
    try:
        from scipy.io import arff
    except ImportError as error:
        raise DataError(
            f"{path} needs SciPy, which is not installed. Try: pip install scipy, or the .tsv file."
        ) from error
    try:
        table, meta = arff.loadarff(path)
    except Exception as error:  # its parser raises what it likes
        raise DataError(
            f"{path} cannot be read as .arff ({type(error).__name__}: {error}). Multivariate files "
            "are not understood; try the .tsv file of the same data."
        ) from error
    kinds = dict(zip(meta.names(), meta.types(), strict=True))
    nominal = [name for name, kind in kinds.items() if kind != "numeric"]
    if len(nominal) != 1 or len(kinds) < 2:
        raise DataError(
            f"{path} has {len(kinds) - len(nominal)} numeric and {len(nominal)} other attributes: "
            "it needs values of signals and exactly one class."
        )
    columns = [np.asarray(table[name], dtype=np.float64) for name in kinds if name != nominal[0]]
    return np.stack(columns, 1), [label.decode() for label in table[nominal[0]]]


READERS = {
    ".tsv": read_table,
    ".txt": read_table,
    ".csv": read_table,
    ".ts": read_ts,
    ".arff": read_arff,
}


def read_signals(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read one file of the archive: values (N, L) with NaN where there are none, and classes."""
    if not path.is_file():
        raise DataError(f"--dataset ucr: there is no file {path}.")
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path}: --dataset ucr reads {', '.join(READERS)} (got {path.suffix or 'no suffix'})."
        )
    there = memory_size(torch.device("cpu"))
    if there is not None and path.stat().st_size * 8 > there:
        raise DataError(f"{path} of {path.stat().st_size:,} bytes does not fit into memory.")
    values, labels = READERS[path.suffix.lower()](path)
    if not values.size:
        raise DataError(f"{path} holds no signals.")
    if np.isinf(values).any():
        raise DataError(f"{path}: row {int(np.isinf(values).any(1).argmax()) + 1} is infinite.")
    return values, labels


def signal_lengths(values: np.ndarray) -> np.ndarray:
    """Return where each signal ends: after it there are only missing values, (N,)."""
    known = ~np.isnan(values)
    return np.where(known.any(1), values.shape[1] - known[:, ::-1].argmax(1), 0)


def complete(values: np.ndarray, length: int, path: Path, unequal: str, missing: str) -> np.ndarray:
    """Fill what is missing: (N, L) -> (N, length) without NaN.

    Args:
        values: As read, NaN where there are none.
        length: Samples of the longest signal of both sets.
        path: Where they come from, for messages.
        unequal: What is done about shorter signals, see `UCROptions`.
        missing: What is done about gaps inside.

    Raises:
        DataError: If that is to refuse them, or a signal has no values.
    """
    ends = signal_lengths(values)
    if (ends == 0).any():
        raise DataError(f"{path}: signal {int((ends == 0).argmax()) + 1} has no values.")
    if unequal == "refuse" and (ends < length).any():
        row = int((ends < length).argmax())
        raise DataError(
            f"{path}: signal {row + 1} has {ends[row]} samples, and the longest has {length}. "
            "--unequal zeros or last pads shorter ones at their end, --unequal resample stretches "
            "them."
        )
    filled = np.zeros((len(values), length))
    for number, (row, end) in enumerate(zip(values, ends, strict=True)):
        signal, places = row[:end], np.arange(end)
        gaps = np.isnan(signal)
        if gaps.any():
            if missing == "refuse":
                raise DataError(
                    f"{path}: signal {number + 1} lacks the value of sample {gaps.argmax() + 1}. "
                    "--missing interpolate draws a line between its neighbors."
                )
            signal = np.interp(places, places[~gaps], signal[~gaps])
        if unequal == "resample":
            filled[number] = np.interp(np.linspace(0, end - 1, length), places, signal)
        else:
            filled[number, :end] = signal
            filled[number, end:] = signal[-1] if unequal == "last" else 0
    return filled


def class_numbers(
    labels: Sequence[Sequence[str]], paths: Sequence[Path]
) -> tuple[list[Tensor], list[str]]:
    """Number the classes of the training set in order, numbers before words.

    Raises:
        DataError: If the test set has a class that the training set lacks, or there is one alone.
    """

    def order(label: str) -> tuple[int, float, str]:
        try:
            return 0, float(label), label
        except ValueError:
            return 1, 0.0, label

    names = sorted(set(labels[0]), key=order)
    if len(names) < 2:
        raise DataError(f"{paths[0]} has one class alone, {names[0]}: there is nothing to learn.")
    if unknown := set(labels[1]) - set(names):
        raise DataError(
            f"{paths[1]} has the class {min(unknown, key=order)}, which {paths[0]} lacks: it has "
            f"{', '.join(names[:20])}."
        )
    numbers = {name: number for number, name in enumerate(names)}
    return [torch.tensor([numbers[label] for label in part]) for part in labels], names


def build_ucr(
    *,
    data_path: str,
    seed: int,
    min_side: int,
    normalize: bool,
    unequal: str = "refuse",
    missing: str = "refuse",
) -> Data:
    """Read NAME_TRAIN and NAME_TEST; nothing is drawn at random."""
    if unequal not in UNEQUAL or missing not in MISSING:
        raise OptionError(f"unequal {unequal} or missing {missing} is no choice.")
    path = Path(data_path)
    paths = (path, partner(path))
    values, words = zip(*map(read_signals, paths), strict=True)
    labels, names = class_numbers(words, paths)
    length = int(max(signal_lengths(part).max() for part in values))
    signals = [
        torch.from_numpy(complete(part, length, where, unequal, missing)).float()[:, None]
        for part, where in zip(values, paths, strict=True)
    ]
    data = signal_data(
        "ucr", *zip(signals, labels, strict=True), names, min_side=min_side, normalize=normalize
    )
    shortest = int(min(signal_lengths(part).min() for part in values))
    if shortest < length:
        data.notes.append(
            f"Signals of {shortest} to {length} samples were made equally long (--unequal "
            f"{unequal})."
        )
    return data
