"""Giving freed memory back to the system. It changes nothing but how much this process holds."""

import ctypes
import gc


def return_memory() -> None:
    """Let the C library return what was freed: glibc keeps the room of many middle-sized tensors, such as a dropped
    layer's, for itself. Where the C library is another, only garbage is collected."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
