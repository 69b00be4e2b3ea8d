"""The few places where one process, DDP, FSDP2 and DeepSpeed ZeRO differ, behind one small set of methods.

On all of them weights, gradients, sums over ranks and the optimizer are float32; lower precision is autocast's.
"""

from lib.backends.device import peak_memory_bytes, usable_cores
from lib.backends.replicated import Backend
from lib.backends.start import start

__all__ = ["Backend", "peak_memory_bytes", "start", "usable_cores"]
