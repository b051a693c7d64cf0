"""Modules by their number of axes: networks for signals (1) and for images (2)."""

from torch import nn

__all__ = ["AVERAGES", "BATCH_NORMS", "CONVS", "MAX_POOLS"]

CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
AVERAGES = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
