"""Freed memory stays in the process."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, numpy as np
from jaxlab import memory
{keep}
def touch():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**24)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(touch())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_the_second_allocation_faults_no_page():
  faults = [
    int(
      subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True).stdout
    )
    for keep in ("", "memory.keep()")
  ]
  assert faults[1] < 100
  assert faults[0] > 10 * faults[1]
