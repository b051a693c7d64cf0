"""Compile every Triton kernel for a GPU that need not be there: `python compile_kernels.py`.

Triton's interpreter does not look at types; its compiler does. Prints one line a kernel.
"""

import importlib
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOATS = {"q_ptr", "k_ptr", "x_ptr", "w_ptr", "gy_ptr", "y_ptr", "a_ptr", "b_ptr", "bias_ptr"}
LONGS = {"rows_ptr", "own_ptr", "names_ptr", "kept_ptr", "indices_ptr", "a_rows_ptr", "b_rows_ptr"}
SCAN = {"KEEP": 16, "BM": 16, "BN": 32, "BC": 32}
EXACT = {"FINAL": True, "WIDEN": True, "PRECISION": "ieee", "kept_ptr": None}
COARSE = {"FINAL": False, "WIDEN": False, "PRECISION": "tf32", "done_ptr": None}
PRODUCT = {"PRECISION": "ieee", "WIDEN": False, "BM": 16, "BO": 16, "BC": 16}
ATTEND = {"KP": 4, "BM": 2, "BC": 16}
WINDOW = {"BM": 16, "BN": 32, "BF": 16}
VOLUMES = {**WINDOW, "KP": 2, "PRECISION": "tf32"}
NO_INDEX = {"rows_ptr": None, "own_ptr": None, "names_ptr": None}
KERNELS = [
    ("search", "_scan", "fp32", {**SCAN, **COARSE, "METRIC": 0}),
    ("search", "_scan", "bf16", {**SCAN, **COARSE, **NO_INDEX, "METRIC": 1}),
    ("search", "_scan", "fp16", {**SCAN, **EXACT, "METRIC": 1}),
    ("search", "_scan", "fp32", {**SCAN, **EXACT, **NO_INDEX, "METRIC": 2, "key_ptr": None}),
    ("search", "_decide", "bf16", {"KEEP": 16, "METRIC": 0, "BM": 2, "BC": 32}),
    ("search", "_pair_scores", "fp16", {"SQUARED": True, "BM": 32, "BC": 32}),
    ("aggregate", "_forward", "bf16", PRODUCT),
    ("aggregate", "_input_gradient", "fp32", PRODUCT),
    ("aggregate", "_weight_gradient", "fp16", PRODUCT),
    ("attend", "_forward", "fp32", {**ATTEND, "EUCLIDEAN": True, "FIXED": True}),
    ("attend", "_backward", "fp32", {**ATTEND, "EUCLIDEAN": False, "FIXED": True}),
    ("attend", "_weight_gradient", "fp32", {**ATTEND, "keep_ptr": None}),
    ("windows", "_distances", "fp32", WINDOW),
    ("windows", "_distances_backward", "fp32", WINDOW),
    ("windows", "_aggregate", "fp32", VOLUMES),
    ("windows", "_aggregate_backward", "fp32", {**VOLUMES, "OF_WEIGHTS": True, "OF_IMAGES": True}),
]


def kind(name, floats):
    """Type of an argument by its name."""
    if not name.endswith("_ptr"):
        return "fp32" if name == "self_score" else "i32"
    if name == "done_ptr":
        return "*u8"
    return "*i64" if name in LONGS else f"*{floats}" if name in FLOATS else "*fp32"


def compile_kernel(module, name, floats, constants, capability):
    """Compile one kernel; return its PTX."""
    kernel = getattr(importlib.import_module(f"ops.triton.{module}"), name)
    kernel = kernel.fn if hasattr(kernel, "configs") else kernel  # without its tuning
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kind(n, floats) for n in names}
    fixed = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, fixed)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


if __name__ == "__main__":
    capability = int(sys.argv[1])
    for module, name, floats, constants in KERNELS:
        assert ".entry" in compile_kernel(module, name, floats, constants, capability)
        print(module, name, floats, flush=True)
