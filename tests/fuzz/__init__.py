"""Hostile input for the program: flags, args files, npz, IDX, pictures, checkpoints.

`inputs` draws cases, `harness` runs them, ``python -m tests.fuzz --count 10000`` runs many.
"""
