"""Numba kernels: the fast path without a GPU.  One module per algorithm, under its stem."""
