"""Triton kernels for GPUs, which `operators` registers for CUDA; loaded when first needed.

`launch` tells whether they can run. Each of the other files holds kernels and the function that
launches them. Triton's interpreter runs them without a GPU (`TRITON_INTERPRET=1`, set before the
start): so they are tested.
"""
