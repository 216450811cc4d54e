"""Public operators, one module per algorithm: validation, dispatch by device, launch geometry, and the
registry records.

Importing this package registers every kernel.
"""
from kvbench.ops import attention, rotation, turboquant

__all__ = ["attention", "rotation", "turboquant"]
