"""The few places where one process, DDP, FSDP2 and DeepSpeed ZeRO differ, behind one small set of methods.

On all of them weights, gradients, sums over ranks and the optimizer are float32; lower precision is autocast's.
"""

from lib.backends.device import auto_workers, peak_memory_bytes, usable_cores
from lib.backends.precision import Precision, choose_precision
from lib.backends.replicated import Backend
from lib.backends.start import start

__all__ = [
    "Backend",
    "Precision",
    "auto_workers",
    "choose_precision",
    "peak_memory_bytes",
    "start",
    "usable_cores",
]
