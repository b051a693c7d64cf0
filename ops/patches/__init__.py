"""Patches of images: the grid, tiles of products, windows by compiled kernels."""
