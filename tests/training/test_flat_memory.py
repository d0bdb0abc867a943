"""Memory stays flat however long a run goes on, and a leak would be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENV, ROOT

KIB_PER_STEP = 16.0  # of growth that is called flat, in the short form; a leak of four times that must be seen

SCRIPT = """
import json, resource, sys
from pathlib import Path

import numpy as np
import torch

from runs import few, run
from sfumato.training.allocator import keep_freed_memory
from sfumato.training.denoiser import DenoiserTask

folder, steps, leak_kib = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(1)
keep_freed_memory()  # as the command does
page = resource.getpagesize() / 1024
rss, kept = [], []

class Watched(DenoiserTask):
    def fetch(self, places):
        rss.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
        if leak_kib:
            kept.append(np.ones(int(leak_kib * 1024), np.uint8))
        return super().fetch(places)

run(few(), folder, f"steps={steps}", "checkpoint_every=50", "log_every=10", "workers=2", task=Watched)
late = np.array(rss[len(rss) // 3 :])  # allocators warm up
print(json.dumps({"steps": len(rss), "slope": float(np.polyfit(np.arange(len(late)), late, 1)[0])}))
"""


def growth(folder: Path, steps: int, leak_kib: float) -> float:
    """Train in a process of its own, and return how many KiB it grew per step, after its first third."""
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests/training")))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(steps), str(leak_kib)],
                          env={**ENV, "PYTHONPATH": paths}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] >= steps
    return found["slope"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system tells no resident memory")
def test_memory_is_flat_and_a_planted_leak_is_seen(tmp_path: Path, soak: bool):
    steps, bound = (5000, KIB_PER_STEP / 8) if soak else (200, KIB_PER_STEP)
    assert growth(tmp_path / "flat", steps, 0) < bound
    assert growth(tmp_path / "leaking", steps, 4 * bound) > bound
