"""Growing networks beside a plain implementation of the same formulas: time, memory, centers.

The plain twin does what the formulas say, word by word: differences of all pairs as one tensor,
everything recomputed for every prediction, a loop over the classes, centers joined by torch.cat.
Both see the same batches in one run; the script fails unless both keep the same centers in the
same order. Times are the best of --repeats runs.

    python scripts/bench_dynamic.py                         # all cases, sizes of a minute or two
    python scripts/bench_dynamic.py --case cosine --samples 60000 --data mnist --data_path ./Data
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import gzip
import json
import math
import struct
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layers.dynamic import DynamicNeighbors
from ops.centers.distances import DistanceKernel


class PlainNeighbors:
    """The growing network written straight from its formulas; slow on purpose."""

    def __init__(
        self, *, kernel: DistanceKernel, num_classes: int | None, target_accuracy: float, **rule
    ) -> None:
        self.kernel, self.num_classes, self.target_accuracy = kernel, num_classes, target_accuracy
        self.max_count, self.tolerance = rule.get("max_count", 3), rule.get("tolerance", 0.05)
        self.centers: Tensor | None = None

    def weights(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, N), with all differences in memory where the formula has them."""
        kernel, centers = self.kernel, self.centers
        if kernel.kernel_type in ("cosine", "dot"):
            if kernel.kernel_type == "cosine":
                normalize = torch.nn.functional.normalize
                product = normalize(x) @ normalize(centers).t()
            else:
                product = x @ centers.t()
            return torch.pow(1 - product.abs() + kernel.epsilon, kernel.exponent)
        difference = x[:, None, :] - centers[None, :, :]  # (B, N, D)
        if kernel.kernel_type == "euclidean_pyramid":
            levels = [difference[:, :, :: 2**s].norm(dim=2) for s in range(kernel.scales)]
            return (
                sum(torch.pow(d + kernel.epsilon, kernel.exponent) for d in levels) / kernel.scales
            )
        distance = difference.norm(dim=2) + kernel.epsilon
        if kernel.kernel_type == "influence_cone":
            nearest = distance.min(dim=1, keepdim=True).values
            return torch.clamp(kernel.factor * nearest - distance, min=0)
        return torch.pow(distance, kernel.exponent)

    def predict(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        if self.num_classes is None:
            return weights @ self.targets / weights.sum(dim=1, keepdim=True)
        scores = torch.zeros(x.shape[0], self.num_classes)
        for label in range(self.num_classes):
            members = (self.targets == label).nonzero().flatten()
            if members.numel():
                scores[:, label] = weights[:, members].sum(dim=1)
        return scores / scores.sum(dim=1, keepdim=True)

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        prediction = self.predict(x)
        if self.num_classes is None:
            return (prediction - y).norm(dim=1) < self.tolerance
        return prediction.argmax(dim=1) == y

    def grow(self, x: Tensor, y: Tensor) -> None:
        if self.centers is None:
            self.centers, self.targets = x.clone(), y.clone()
            return
        for _ in range(self.max_count):
            wrong = (~self.right(x, y)).nonzero().flatten()
            if wrong.numel():
                self.centers = torch.cat([self.centers, x[wrong]])
                self.targets = torch.cat([self.targets, y[wrong]])
            if self.right(x, y).float().mean() >= self.target_accuracy:
                break


def images(path: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read MNIST's own files (plain or .gz) as rows in [0, 1] and labels."""

    def read(name: str) -> Tensor:
        for candidate in (path / "MNIST/raw" / name, path / "raw" / name, path / name):
            for file in (candidate, candidate.with_name(candidate.name + ".gz")):
                if file.exists():
                    raw = (
                        gzip.decompress(file.read_bytes())
                        if file.suffix == ".gz"
                        else file.read_bytes()
                    )
                    sides = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
                    return torch.frombuffer(
                        bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8
                    ).view(sides)
        raise SystemExit(f"no file {name} (or .gz) under {path}; use --data synthetic")

    kind = "train" if train else "t10k"
    return read(f"{kind}-images-idx3-ubyte").flatten(1) / 255, read(
        f"{kind}-labels-idx1-ubyte"
    ).long()


def blobs(samples: int, features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ten classes of overlapping clouds in [0, 1]^D: rows and labels."""
    modes = torch.rand(40, features, generator=generator)
    mode = torch.randint(40, (samples,), generator=generator)
    x = modes[mode] + 1.9 * torch.rand(samples, features, generator=generator)
    return x / x.max(), mode % 10


def picture(height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A synthetic picture with edges and grain as (row, column) -> RGB in [0, 1]."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    r, c = row / height, column / width
    waves = [
        0.5 + 0.5 * torch.sin(a * r + b * c + 3 * torch.sin(7 * r * c))
        for a, b in ((9, 5), (4, 11), (14, 8))
    ]
    disks = ((r - 0.5) ** 2 + (c - 0.4) ** 2 < 0.05).float() - (
        (r - 0.7) ** 2 + (c - 0.75) ** 2 < 0.03
    ).float()
    rgb = torch.stack([(w + 0.4 * disks).clamp(0, 1) for w in waves], dim=-1)
    rgb = (rgb + 0.06 * torch.randn(rgb.shape, generator=generator)).clamp(0, 1)
    position = torch.stack([row, column], dim=-1).float()
    return position.reshape(-1, 2), rgb.reshape(-1, 3)


def memory(kind: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, or VmHWM, its peak (Linux; else nan)."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(lines[kind].split()[0]) / 1024
    except (OSError, KeyError):
        return math.nan


def measure(model, batches: list[tuple[Tensor, Tensor]], test: Tensor, predict) -> dict[str, float]:
    """Grow on all batches, then predict the test rows: seconds, and memory needed on the way."""
    rows = len(batches[0][0])
    if isinstance(model, DynamicNeighbors):  # batches in groups, as the program hands them over
        ahead = max(1, 1024 // rows)
        groups = [batches[first : first + ahead] for first in range(0, len(batches), ahead)]
        batches = [tuple(torch.cat(part) for part in zip(*group, strict=True)) for group in groups]
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    start = time.perf_counter()
    for x, y in batches:
        if isinstance(model, DynamicNeighbors):
            model.grow(x, y, batch_size=rows)
        else:
            model.grow(x, y)
    grown = time.perf_counter()
    for x in test.split(256):
        predict(x)
    tested = time.perf_counter()
    return {
        "grow_s": grown - start,
        "test_s": tested - grown,
        "peak_mib": memory("VmHWM") - before,
    }


def best(*runs: dict[str, float]) -> dict[str, float]:
    """Take the shortest times, and the largest memory."""
    return {n: (max if n == "peak_mib" else min)(run[n] for run in runs) for n in runs[0]}


def compare(
    name: str,
    batches,
    test: Tensor,
    num_classes: int | None,
    kernel: DistanceKernel,
    repeats: int,
    **rule,
) -> dict:
    """Run ours and the plain twin on the same batches."""
    outputs = None if num_classes else batches[0][1].shape[1]
    fast, slow = [], []
    for _ in range(repeats):  # in turn, to share the moods of the machine
        ours = DynamicNeighbors(
            num_features=test.shape[1],
            num_classes=num_classes,
            num_outputs=outputs,
            kernel=kernel,
            **rule,
        )
        fast.append(measure(ours, batches, test, ours))
        plain = PlainNeighbors(kernel=kernel, num_classes=num_classes, **rule)
        slow.append(measure(plain, batches, test, plain.predict))
    fast, slow = best(*fast), best(*slow)
    same = ours.centers.shape == plain.centers.shape and torch.equal(ours.centers, plain.centers)
    row = {
        "case": name,
        "samples": sum(len(x) for x, _ in batches),
        "features": test.shape[1],
        "centers": ours.num_centers,
        "same_centers_in_order": same,
        "ours": fast,
        "plain": slow,
        "grow_ratio": slow["grow_s"] / fast["grow_s"],
        "test_ratio": slow["test_s"] / fast["test_s"],
    }
    print(
        f"{name:10s} {row['samples']:6d} x {row['features']:<5d} centers {row['centers']:6d} "
        f"same {'yes' if same else 'NO'} | grow {fast['grow_s']:8.2f}s vs {slow['grow_s']:8.2f}s = "
        f"{row['grow_ratio']:6.1f}x | test {fast['test_s']:6.2f}s vs {slow['test_s']:7.2f}s = "
        f"{row['test_ratio']:6.1f}x | +{fast['peak_mib']:.0f} vs +{slow['peak_mib']:.0f} MiB",
        flush=True,
    )
    return row


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the chosen cases; exit with an error if any pair of runs kept different centers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", default=["cosine", "euclidean", "image"])
    parser.add_argument("--data", choices=["synthetic", "mnist"], default="synthetic")
    parser.add_argument(
        "--data_path", type=Path, default=Path("./Data"), help="folder of MNIST (default ./Data)"
    )
    parser.add_argument(
        "--samples", type=int, help="training rows (default 60000 cosine, 12288 euclidean)"
    )
    parser.add_argument(
        "--test_samples", type=int, help="test rows (default a sixth of the training rows)"
    )
    parser.add_argument(
        "--side", type=int, nargs=2, default=[384, 512], help="height and width of the picture"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the best counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for case in args.case:
        if case == "image":
            x, y = picture(*args.side, generator)
            order = torch.randperm(len(x), generator=generator)
            batches = [(x[part], y[part]) for part in order.split(256)]
            kernel = DistanceKernel("euclidean")
            rule = {"target_accuracy": 0.8, "tolerance": 0.2}
            test = x[: args.test_samples or len(x) // 6]
            rows.append(compare("image", batches, test, None, kernel, args.repeats, **rule))
            continue
        samples = args.samples or (60_000 if case in ("cosine", "dot") else 12_288)
        tests = args.test_samples or max(samples // 6, 1)
        if args.data == "mnist":
            x, y = images(args.data_path, train=True)
            test = images(args.data_path, train=False)[0][:tests]
        else:
            x, y = blobs(samples + tests, 784, generator)
            x, y, test = x[:samples], y[:samples], x[samples:]
        order = torch.randperm(len(x), generator=generator)[:samples]
        batches = [(x[part], y[part]) for part in order.split(64)]
        kernel = DistanceKernel(case)
        rows.append(compare(case, batches, test, 10, kernel, args.repeats, target_accuracy=0.9))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if not all(row["same_centers_in_order"] for row in rows):
        raise SystemExit("the two implementations kept different centers")
    return rows


if __name__ == "__main__":
    main()
