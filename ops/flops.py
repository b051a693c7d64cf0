"""FLOP formulas of the operators, for `torch.utils.flop_counter`.

That module loads Triton, which takes as long as all of ours together: formulas wait here until
somebody counts. Who uses `FlopCounterMode` directly calls :func:`register_flop_formulas` before.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["flop_formula", "register_flop_formulas"]

_waiting: list[tuple[Any, Callable]] = []


def flop_formula(operator: Any) -> Callable[[Callable], Callable]:
    """Say how many operations an operator takes.

    Args:
        operator: The operator, e.g. ``torch.ops.neighbors.search``. The decorated function takes
            the shapes of its tensors, its other arguments, and ``out_shape``.
    """

    def keep(formula: Callable) -> Callable:
        _waiting.append((operator, formula))
        return formula

    return keep


def register_flop_formulas() -> None:
    """Hand all formulas to `torch.utils.flop_counter`; further calls do nothing."""
    from torch.utils.flop_counter import register_flop_formula

    while _waiting:
        operator, formula = _waiting.pop()
        register_flop_formula(operator)(formula)
