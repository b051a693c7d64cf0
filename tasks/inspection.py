"""Looking at every sample of a data set before anything is learnt: ``--check_data``."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset import Data, DataError, loading_processes

__all__ = ["inspect_data"]


class _Inspected(Dataset):
    """The labels of a data set, or in their place what is wrong with a sample."""

    def __init__(self, dataset: Dataset, name: str, num_classes: int) -> None:
        self.dataset, self.name, self.num_classes = dataset, name, num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int | str | None:
        what = f"sample {index} of {self.name}"
        try:
            inputs, target = self.dataset[index]
        except DataError as error:
            return str(error)
        if not torch.isfinite(inputs).all():
            return f"{what} holds numbers that are not finite"
        target = torch.as_tensor(target)
        if target.ndim or target.is_floating_point():  # no class
            return None
        if not 0 <= target < self.num_classes:
            return f"{what} has the label {int(target)}, and there are {self.num_classes} classes"
        return int(target)


def inspect_data(data: Data, num_workers: int = 0) -> tuple[dict[str, list[int]], list[str]]:
    """Read every sample of every set once.

    Args:
        data: The data.
        num_workers: See :func:`build_loader`.

    Returns:
        For every set the number of samples of every class (empty where there are no classes), and
        a line a set.

    Raises:
        DataError: With what is wrong with the first samples that cannot be used.
    """
    counts: dict[str, list[int]] = {}
    lines, faults, total = [], [], 0
    sets = {"train": data.train, "val": data.val, "test": data.test}
    for name, part in sets.items():
        if part is None:
            continue
        inspected = _Inspected(part, name, data.num_outputs)
        workers = loading_processes(part, num_workers)
        found: list[int | str | None] = []
        for batch in DataLoader(inspected, 64, num_workers=workers, collate_fn=list):
            found += batch
        faults += [item for item in found if isinstance(item, str)]
        total += len(found)
        labels = [item for item in found if isinstance(item, int)]
        counts[name] = np.bincount(labels, minlength=data.num_outputs).tolist() if labels else []
        lines.append(_count_line(name, len(found), counts[name], data.class_names))
    if faults:
        shown = "\n  ".join(fault.rstrip(".") for fault in faults[:20])
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError(f"{len(faults)} of {total} samples cannot be used:\n  {shown}{more}")
    return counts, lines


def _count_line(name: str, total: int, counts: list[int], class_names: Sequence[str]) -> str:
    """Word how often every class is there; of many classes the extremes."""
    line = f"{name}: {total:,} samples"
    if not counts:
        return line + "."
    line += f" of {len(counts)} classes"
    if len(counts) <= 20:
        names = class_names or [str(i) for i in range(len(counts))]
        pairs = zip(names, counts, strict=True)
        return f"{line}: {', '.join(f'{label}: {count:,}' for label, count in pairs)}."
    return (
        f"{line}, {min(counts):,} to {max(counts):,} of each; "
        f"{sum(count == 0 for count in counts)} classes without any."
    )
