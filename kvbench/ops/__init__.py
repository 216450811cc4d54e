"""Public operators, one module per algorithm: validation, dispatch by device, launch geometry, and the
registry records.

Importing this package registers every kernel.
"""
from kvbench.ops import attention, block_gtq, kivi, quest, rabitq, rotation, selection, self_indexing, turboquant
from kvbench.ops import block_gtq_records as _block_gtq_records           # noqa: F401
from kvbench.ops import kivi_records as _kivi_records                     # noqa: F401
from kvbench.ops import rabitq_records as _rabitq_records                 # noqa: F401
from kvbench.ops import selection_records as _selection_records           # noqa: F401
from kvbench.ops import self_indexing_records as _self_indexing_records   # noqa: F401
from kvbench.ops import turboquant_records as _turboquant_records         # noqa: F401

__all__ = ["attention", "block_gtq", "kivi", "quest", "rabitq", "rotation", "selection", "self_indexing", "turboquant"]
