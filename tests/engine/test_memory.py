# SPDX-License-Identifier: Apache-2.0
import platform
import subprocess
import sys

import pytest

ROUNDS, PAGES = 5, 10_000
# Page faults of taking, writing and freeing a block of that many pages, round after round.
CHILD = f"""
import ctypes
import resource
import numpy as np
from attncache_vllm.engine.memory import keep_freed_memory

PR_SET_THP_DISABLE = 41  # one huge page would stand for 512, as luck has it
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
if {{keep}}:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    block = np.empty({PAGES} * resource.getpagesize(), dtype=np.uint8)
    block[:: resource.getpagesize()] = 1
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    child = [sys.executable, "-c", CHILD.format(keep=keep)]
    return int(subprocess.run(child, capture_output=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_pages_that_were_freed_are_taken_again() -> None:
    assert faults(keep=False) > 0.9 * ROUNDS * PAGES
    assert faults(keep=True) < 2 * PAGES
