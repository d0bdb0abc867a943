"""What a step frees is a later one's: after a few steps no page is cleared again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
from runs import ENV

SCRIPT = """
import json, resource
import torch
from sfumato.training.allocator import keep_freed_memory

keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        kept = [torch.ones(9 << 20) for _ in range(2)]  # 36 MiB each: above all that glibc keeps by itself
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([faults() for _ in range(16)]))  # glibc settles where each goes after two to five
"""
PAGES = 2 * 36 * 256


def faults(**env: str) -> list[int]:
    """Page faults in each round of the same large tensors, in a process of its own."""
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**quiet, **ENV, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again_unless_the_environment_wants_otherwise():
    found = faults()
    assert found[0] > PAGES / 2
    assert found[-1] < PAGES / 10
    assert faults(MALLOC_ARENA_MAX="1")[-1] > PAGES
