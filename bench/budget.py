"""Our own trainer under a budget of CPU time, for the benches that give every contender as much."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.training.loop import Task, train
from sfumato.training.progress import Progress
from sfumato.training.recipe import Recipe


def keep_to(out: Path, question: dict[str, Any]) -> None:
    """Write what is asked into the folder of results, or end in one line if these are of another question."""
    path = out / "question.json"
    if path.exists() and (before := json.loads(path.read_text())) != question:
        raise SystemExit(f"{out} holds results of {before}, not of {question}: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(question))


class Clock:
    """CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self.start = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self.start


class Enough(Exception):
    pass


class Watch(Progress):
    """Notes when each step was done, and ends a run that is over its limit."""

    def __init__(self, limit: float):
        super().__init__(quiet=True)
        self.limit, self.clock, self.times = limit, Clock(), list[float]()

    def step(self, done: int, loss: float, levels: Any, pictures: int) -> None:
        self.times.append(self.clock.seconds)
        if done % 100 == 0:
            print(f"  step {done}: loss {loss:.4f}, {self.clock.seconds:.0f} s", flush=True)
        if self.clock.seconds > self.limit and done >= 4:
            raise Enough


def train_within(
    budget: float, recipe: Recipe, build: Callable[[Recipe, Path], Task], folder: Path, trial: float = 10.0
) -> dict[str, Any]:
    """Train over as many steps as fit into so many CPU seconds, and return what was spent.

    A trial tells how many that are, and its time is counted too. ``build`` is given the recipe and the run's folder;
    the weights are in ``final.safetensors``.
    """

    def run(recipe: Recipe, name: str, limit: float) -> list[float]:
        """Train until done or over the limit, and return the CPU seconds at which each step was done."""
        task, watch = build(recipe, folder / name), Watch(limit)
        with suppress(Enough):
            train(task, recipe, folder / name, watch)
        return [*watch.times, watch.clock.seconds]

    *times, spent = run(replace(recipe, steps=1 << 20), f"trial-{time.time_ns()}", min(trial, budget / 20))
    half = len(times) // 2  # the first steps are slow
    each = (times[-1] - times[half]) / (len(times) - 1 - half)
    steps = max(1, int((budget - spent - times[0]) / each * 0.98))
    recipe = replace(recipe, steps=steps, checkpoint_every=1 << 30)
    seconds = run(recipe, f"run-{steps}", float("inf"))[-1]
    (folder / "final.safetensors").write_bytes((folder / f"run-{steps}/final.safetensors").read_bytes())
    return {"seconds": spent + seconds, "steps": steps, "batch": recipe.batch}
