"""CUDA C sources of the kernels, as data: one ``.cu`` file per algorithm, shared headers under ``include/``."""
