"""What a run shows while it runs: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Loss, by level too, pictures per second, memory and time left, on stderr.

    Args:
        every: steps between two lines where stderr is no terminal.
        quiet: show nothing, as all ranks but the first do.
    """

    def __init__(self, every: int = 20, quiet: bool = False):
        self.every, self.quiet = every, quiet
        self.console = Console(stderr=True, quiet=quiet)
        self.rate = 0.0
        self.loss = math.nan
        self._bar: Bar | None = None
        self._steps = 0
        self._last = time.perf_counter()
        self._levels: list[float] = []

    @property
    def memory(self) -> int:
        """The process's peak memory in MB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // (1 << 20) if sys.platform == "darwin" else peak // 1024

    @contextmanager
    def running(self, steps: int, start: int) -> Iterator[None]:
        """Show progress from step ``start`` to ``steps`` while the block runs."""
        self._steps, self._last = steps, time.perf_counter()
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        with Bar(*columns, console=self.console) as bar:
            self._bar = bar
            self._task = bar.add_task("train", total=steps, completed=start, text="")
            try:
                yield
            finally:
                self._bar = None

    def step(self, done: int, loss: float, levels: Sequence[float], pictures: int) -> None:
        """Report one finished step: its loss, the loss by noise level (cleanest first), its number of pictures."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.rate = 0.95 * self.rate + 0.05 * pictures / seconds if self.rate else pictures / seconds
        self.loss = _smooth(self.loss, loss)
        self._levels = [_smooth(a, b) for a, b in zip(self._levels or levels, levels, strict=True)]
        by_level = " ".join("–" if math.isnan(v) else f"{v:.3f}" for v in self._levels)
        text = f"loss {self.loss:.4f} (clean → noise {by_level}) · {self.rate:.0f} pictures/s · {self.memory} MB"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif not self.quiet and (done % self.every == 0 or done == self._steps):
            left = (self._steps - done) * pictures / self.rate
            print(f"step {done}/{self._steps} · {text} · {left / 60:.0f} min left", file=sys.stderr, flush=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave what is done meanwhile out of the pictures per second."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - started

    def warn(self, text: str) -> None:
        """Say something that the user should know of."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Say something of passing interest."""
        self.console.print(text, markup=False, highlight=False)


def _smooth(old: float, new: float) -> float:
    if not math.isfinite(old) or not math.isfinite(new):  # a bad step must not hide the good ones after it
        return new if math.isfinite(new) else old
    return 0.98 * old + 0.02 * new
