"""Many pictures at once are the pictures that each request gives alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato.diffusion import SAMPLERS
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families.model import Model
from sfumato.pipeline.lockstep import Event, Lockstep, Run
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request

MIXED = [
    Request("a red apple", seed=1, steps=3, sampler="heun"),
    Request("a blue house in the rain", seed=2, steps=5, guidance=1.0),
    Request("a", negative="red red red", seed=3, steps=4, sampler="ddpm", guidance=7.0),
    Request("a red", seed=4, steps=6, sampler="dpmpp-2m-sde", guidance_interval=(0.3, 3.0)),
    Request("house", seed=5, steps=2, sampler="lcm", width=32, height=16),
    Request("rain", seed=6, steps=4, guidance_rescale=0.7, sampler="unipc"),
]


class Counting(nn.Module):
    """A network that notes how many rows each of its calls has."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.rows: list[int] = []

    def forward(self, x: Tensor, clock: Tensor, **conditioning: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.network(x, clock, **conditioning)


def finish(lockstep: Lockstep) -> list[tuple[Run, Event]]:
    seen: list[tuple[Run, Event]] = []
    for _ in range(1000):
        if not len(lockstep):
            return seen
        seen += lockstep.advance()
    raise AssertionError("it does not end")


def pictures(seen: list[tuple[Run, Event]], runs: list[Run]) -> list[Any]:
    last = dict(seen)
    return [last[run] for run in runs]


def test_every_picture_is_what_it_is_alone(tiny: Model) -> None:
    lockstep = Lockstep(tiny, 16)
    runs = [lockstep.start(request) for request in MIXED]
    seen = finish(lockstep)
    pipe = Pipeline(tiny)
    for run, made in zip(runs, pictures(seen, runs), strict=True):
        (alone,) = [e for e in pipe.run(run.request) if isinstance(e, Picture)]
        assert made.request == alone.request
        assert np.abs(made.pixels.astype(int) - alone.pixels).max() <= 1  # rounding, in another batch
        steps = [e for r, e in seen if r is run and not isinstance(e, Picture)]
        assert len(steps) == run.request.resolve(tiny).steps
    assert not torch.is_inference_mode_enabled()


def test_alone_a_picture_is_bitwise_the_pipelines(tiny: Model) -> None:
    lockstep = Lockstep(tiny, 1)
    runs = [lockstep.start(request) for request in MIXED]
    pipe = Pipeline(tiny)
    for run, made in zip(runs, pictures(finish(lockstep), runs), strict=True):
        assert np.array_equal(made.pixels, pipe.generate(**run.request.to_dict())[0].pixels)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "ddim-inversion"])
def test_every_sampler_meets_the_others_in_one_call(tiny: Model, sampler: str) -> None:
    network = Counting(tiny.network)
    lockstep = Lockstep(replace(tiny, network=network), 16)
    runs = [lockstep.start(Request("a", seed=i, steps=3, sampler=sampler)) for i in range(4)]
    seen = finish(lockstep)
    assert all(isinstance(p, Picture) for p in pictures(seen, runs))
    assert set(network.rows) == {8}, "four pictures, each with and without words"


def test_a_batch_is_bounded_and_pictures_come_and_go(tiny: Model) -> None:
    network = Counting(tiny.network)
    lockstep = Lockstep(replace(tiny, network=network), 3)
    runs = [lockstep.start(Request("a", seed=i, steps=4, guidance=1.0)) for i in range(5)]
    list(lockstep.advance())
    assert network.rows == [3, 2]
    lockstep.cancel(runs[0])
    late = lockstep.start(Request("a", seed=9, steps=4, guidance=1.0))
    seen = finish(lockstep)
    assert all(run is not runs[0] for run, _ in seen)
    assert runs[0].ended
    made = pictures(seen, [*runs[1:], late])
    alone = Pipeline(tiny).generate("a", seed=9, steps=4, guidance=1.0)[0]
    assert np.abs(made[-1].pixels.astype(int) - alone.pixels).max() <= 1
    assert len(lockstep) == 0


def test_what_fails_fails_alone(tiny: Model) -> None:
    class Picky(Counting):
        def forward(self, x: Tensor, clock: Tensor, **conditioning: Tensor) -> Tensor:
            if (x.abs() > 500).any():
                raise ValueError("too large")
            return super().forward(x, clock, **conditioning)

    lockstep = Lockstep(replace(tiny, network=Picky(tiny.network)), 16)
    good = [lockstep.start(Request("a", seed=i, steps=3)) for i in range(3)]
    refused = lockstep.start(Request("a", seed=3, steps=3, width=17, height=16))
    wild = lockstep.start(Request("a", seed=4, steps=6, guidance=100.0, negative="house", sampler="ddim"))
    seen = finish(lockstep)
    assert all(isinstance(p, Picture) for p in pictures(seen, good))
    assert isinstance(pictures(seen, [refused])[0], BadRequest)
    assert isinstance(pictures(seen, [wild])[0], (Picture, ValueError))


def test_numbers_that_overflow_are_tried_in_a_wider_type(tiny: Model) -> None:
    class Broken(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, clock: Tensor, **conditioning: Tensor) -> Tensor:
            return self.network(x, clock, **conditioning) * float("nan")

    lockstep = Lockstep(replace(tiny, network=Broken(tiny.network)), 16)
    runs = [lockstep.start(Request("a", seed=i, steps=3)) for i in range(2)]
    assert all(isinstance(e, BadCheckpoint) for e in pictures(finish(lockstep), runs))


def test_one_picture_a_run(tiny: Model, make_tiny_file: Callable[[int], Path]) -> None:
    with pytest.raises(BadRequest, match="n must be 1"):
        Lockstep(tiny).start(Request("a", n=2))
    with pytest.raises(BadRequest, match="batch"):
        Lockstep(tiny, 0)
