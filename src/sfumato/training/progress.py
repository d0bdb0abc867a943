"""What a run shows while it runs: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Loss, pictures per second and time left, on stderr."""

    def __init__(self, every: int = 20):
        self.every = every
        self.console = Console(stderr=True)
        self.rate = 0.0
        self.loss = 0.0
        self._bar: Bar | None = None
        self._steps = 0
        self._last = time.perf_counter()

    @contextmanager
    def running(self, steps: int, start: int) -> Iterator[None]:
        """Show progress from step ``start`` to ``steps`` while the block runs."""
        self._steps, self._last = steps, time.perf_counter()
        if not self.console.is_terminal:
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

    def step(self, done: int, loss: float, pictures: int) -> None:
        """Report one finished step."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.rate = pictures / seconds if not self.rate else 0.95 * self.rate + 0.05 * pictures / seconds
        self.loss = loss if not self.loss else 0.98 * self.loss + 0.02 * loss
        text = f"loss {self.loss:.4f} · {self.rate:.0f} pictures/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif done % self.every == 0 or done == self._steps:
            left = (self._steps - done) * pictures / max(self.rate, 1e-9)
            print(f"step {done}/{self._steps} · {text} · {left / 60:.0f} min left", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say something that the user should know of."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Say something of passing interest."""
        self.console.print(text, markup=False, highlight=False)
