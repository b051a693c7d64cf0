"""Operators: functions without parameters, each with its checks, gradients and PyTorch path.

`maps` searches feature maps and token rows, `sets` large sets of rows, `patches` images by their
patches; `centers` holds the distances and votes of growing networks; `cpu` and `triton` the
compiled kernels, which attach themselves to the operators.
"""

METRICS = ("cosine", "euclidean", "dot")  # in the order of Metric in cpu/vectors.h

import ops.cpu.operators  # noqa: E402
import ops.triton.operators  # noqa: E402, F401
