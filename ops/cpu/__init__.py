"""Compiled kernels for the CPU: `build` compiles and loads the C++ beside it."""
