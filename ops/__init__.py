"""Operators: functions without parameters, each with its checks, gradients and PyTorch path.

`maps` searches feature maps and token rows, `sets` large sets of rows, `patches` images by their
patches; `centers` holds the distances and votes of growing networks; `cpu` the compiled kernels.
"""

METRICS = ("cosine", "euclidean", "dot")
