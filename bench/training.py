"""Training pictures per second, and the share of this machine's matrix-multiplication rate that a step reaches.

    python bench/training.py [recipe] [seconds]

One step is the real one: fetch, mix, forward, backward, clip, optimizer, EMA. The rate of a large matmul is measured
in the same run and precision, before and after.
"""

import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.flop_counter import FlopCounterMode

from sfumato.data.pictures import load_pictures
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.loop import train
from sfumato.training.progress import Progress
from sfumato.training.recipe import load_recipe


def matmul_rate(dtype: torch.dtype, n: int = 2048, seconds: float = 2.0) -> float:
    """Floating-point operations per second of the best of many large products."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def main(path: str = "recipes/emoji-32.yaml", seconds: float = 30.0) -> None:
    recipe = load_recipe(Path(path), ["grid_every=0", "log_every=1000000", "checkpoint_every=1000000"])
    recipe = replace(recipe, data=replace(recipe.data, path="sample", where={}, exclude={}, weights={}))
    print(f"{recipe.name}: batch {recipe.batch}, {torch.get_num_threads()} threads, {torch.__version__}")
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        settings = replace(recipe, precision=precision, steps=1_000_000)
        pictures = load_pictures(
            settings.data, settings.model.size, Path(), channels=settings.model.network.in_channels
        )
        with TemporaryDirectory() as folder:
            task = DenoiserTask(settings, pictures, Path(folder))
            with FlopCounterMode(display=False) as counter:
                task.losses(task.module, task.fetch(range(8))).loss.mean().backward()
            flops = counter.get_total_flops() / 8
            watch = Watch(seconds)
            before = matmul_rate(dtype)
            with suppress(StopIteration):
                train(task, settings, Path(folder), watch)
            peak = max(before, matmul_rate(dtype))
        rate = watch.pictures / watch.seconds
        print(
            f"{precision}: {rate:6.1f} pictures/s, {flops / 1e9:.2f} GFLOP each, {rate * flops / 1e9:.0f} GFLOP/s of "
            f"matmul's {peak / 1e9:.0f}: share {rate * flops / peak:.2f}"
        )


class Watch(Progress):
    """Counts pictures after three steps of warm-up, and ends the run in time."""

    def __init__(self, limit: float):
        super().__init__(quiet=True)
        self.limit, self.pictures, self.seconds, self._steps_seen = limit, 0, 0.0, 0

    def step(self, done, loss, levels, pictures):
        self._steps_seen += 1
        now = time.perf_counter()
        if self._steps_seen == 3:
            self._start = now
        elif self._steps_seen > 3:
            self.pictures += pictures
            self.seconds = now - self._start
            if self.seconds > self.limit:
                raise StopIteration


if __name__ == "__main__":
    main(*sys.argv[1:2], *(float(s) for s in sys.argv[2:3]))
