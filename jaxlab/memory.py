"""Keeps freed memory in the process, for loops that need the same amount again a moment later."""

import ctypes
import functools
import platform

_GLIBC = platform.libc_ver()[0] == "glibc"
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


@functools.cache
def keep() -> None:
  """Host. Tells the C library not to return freed memory to the system. Does nothing where that is not glibc.

  On CPU, XLA allocates its scratch memory anew for each execution, glibc takes large blocks from the system and gives
  them back when freed, and the system clears every page when it is touched: up to half of the time of a training step.
  Afterwards the process holds on to its peak. Call it before JAX's first computation: threads that have allocated
  already are beyond its reach.
  """
  if _GLIBC:
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)  # the others' blocks are limited to 64 MB and go around these settings
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never


def trim() -> None:
  """Host. Returns what is free at this moment, for once. Does nothing where the C library is not glibc."""
  if _GLIBC:
    ctypes.CDLL(None).malloc_trim(0)
