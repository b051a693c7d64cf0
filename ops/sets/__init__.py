"""Neighbors among the rows of large sets, and among listed candidates."""
