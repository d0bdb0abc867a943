"""What is told of the time that is left: a job's steps together are its cost, whatever its rounds and choices."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sfumato.families import load
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request
from sfumato.server.context import Context
from sfumato.server.settings import Settings
from sfumato.server.wire import ModelFacts, facts_of


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"best_of": 4}, {"hires": 2.0}, {"width": 32, "height": 32}])
def test_what_is_left_goes_evenly_to_nothing(model_file: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    model = load(str(model_file))
    facts = ModelFacts.from_message("tiny", facts_of(model) | {"has_critic": True})
    steps = Pipeline(model).steps(Request("a red apple", seed=1, **{**more, "best_of": 1}))
    done: list[float] = []

    async def served() -> None:
        context = Context(Settings(tmp_path, models=(str(model_file),)))
        try:
            context.models[context.default_model] = facts
            words = {"prompt": "a red apple", "seed": 1}
            first = await context.submit("jobs", "a", words | more)
            second = await context.submit("jobs", "b", words)
            context.supervisor.workers[:] = cast("Any", [SimpleNamespace(jobs={first.id: first})])
            rate = 2.0  # steps of one picture in a second
            context.pace = cast("Any", SimpleNamespace(add=done.append, seconds=lambda work: work / rate))
            await context.db(context.queue.claim, lambda job: job.id == first.id)
            for step in range(steps + 1):
                context._note_step(first, {"step": step, "steps": steps, "level": None})
                left = first.cost * (1 - step / steps)
                assert context._progress[first.id]["seconds_left"] == pytest.approx(left / rate)
                context._forget_places()
                assert await context.place(second.id) == (0, pytest.approx((left + second.cost) / rate))
            assert sum(done) == pytest.approx(first.cost)
        finally:
            context.supervisor.workers.clear()
            await context.stop()

    asyncio.run(served())
