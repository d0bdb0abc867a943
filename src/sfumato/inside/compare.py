"""The same seed under other settings: guidance from weak to strong, samplers beside the solution they converge to."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from sfumato.diffusion import SAMPLERS
from sfumato.errors import BadRequest
from sfumato.inside.record import Json, data_url
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request
from sfumato.pixels import Pixels

WEIGHTS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 9.0, 11.0, 13.0, 15.0)
STEPS = (5, 10, 20, 50)
COMPARED = ("euler", "heun", "dpmpp-2m", "unipc", "ddpm")
EXACT, EXACT_STEPS = "heun", 50  # draws the converged solution, in at least so many steps


@dataclass(frozen=True, eq=False)
class Guided:
    """A picture under one guidance scale.

    Args:
        contrast: standard deviation of its values, of 255.
        clipped: share of its values that are 0 or 255: what strong guidance burns out.
    """

    guidance: float
    pixels: Pixels
    contrast: float
    clipped: float

    def to_dict(self) -> Json:
        """As JSON."""
        return {
            "guidance": self.guidance,
            "picture": data_url(self.pixels),
            "contrast": self.contrast,
            "clipped": self.clipped,
        }


class Progress(NamedTuple):
    """Steps done, of all that a comparison takes: what is yielded between its findings."""

    done: int
    total: int


def guidance(pipe: Pipeline, request: Request, weights: Sequence[float] = WEIGHTS) -> Iterator[Progress | Guided]:
    """Draw a picture again under each guidance scale; BadRequest for a model that takes none."""
    if pipe.model.distilled:
        raise BadRequest(f"model {pipe.model.name!r} is distilled: it is guided by no second call to compare")
    asked = []
    for w in weights:
        one = replace(request.single(), guidance=w)
        if w == 1:  # the strong denoiser alone: these have no effect there
            one = replace(one, negative="", guidance_rescale=0.0, guidance_interval=None)
        asked.append(one.resolve(pipe.model))
    count = Counter(pipe, asked)
    for w, one in zip(weights, asked, strict=True):
        _, picture = yield from draw(pipe, one, count)
        p = picture.pixels
        yield Guided(w, p, float(p.std()), float(((p == 0) | (p == 255)).mean()))


class Counter:
    """Counts the steps of requests that are drawn one after another."""

    def __init__(self, pipe: Pipeline, requests: Sequence[Request]) -> None:
        self.done, self.total = 0, sum(map(pipe.steps, requests))

    def step(self) -> Progress:
        """One more."""
        self.done += 1
        return Progress(self.done, self.total)


def draw(pipe: Pipeline, request: Request, count: Counter) -> Generator[Progress, None, tuple[Tensor, Picture]]:
    """Yield after each step, and return the last x (1, C, h, w) and the picture of a request."""
    x: Tensor | None = None
    for event in pipe.run(request):
        if isinstance(event, Picture):
            assert x is not None
            return x, event
        x = event.x
        yield count.step()
    raise AssertionError("a pipeline ends with pictures")


@dataclass(frozen=True, eq=False)
class Solution:
    """What every sampler without fresh noise converges to as steps grow.

    Args:
        steps: in how many it was computed.
        uncertainty: how far it may be off itself: its distance from the same in half as many steps.
    """

    steps: int
    x: Tensor
    pixels: Pixels
    uncertainty: float

    def to_dict(self) -> Json:
        """As JSON."""
        return {"steps": self.steps, "picture": data_url(self.pixels), "uncertainty": self.uncertainty}


@dataclass(frozen=True, eq=False)
class Run:
    """A sampler's picture in some number of steps.

    Args:
        calls: of the guided network.
        distance: root mean square of x − the solution's x, in units of x.
        stochastic: it draws fresh noise, and so converges in distribution, not to the solution.
    """

    sampler: str
    steps: int
    calls: int
    pixels: Pixels
    distance: float
    stochastic: bool

    def to_dict(self) -> Json:
        """As JSON."""
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "calls": self.calls,
            "picture": data_url(self.pixels),
            "distance": self.distance,
            "stochastic": self.stochastic,
        }


def check(pipe: Pipeline, request: Request, names: Sequence[str], steps: Sequence[int]) -> list[Request]:
    """Return the requests of a comparison of samplers: the solution's in half its steps, its own, and each run's.

    Raises BadRequest for one that cannot be served, before any is drawn.
    """
    if not names or not steps:
        raise BadRequest("name at least one sampler and one number of steps to compare")
    most = max(EXACT_STEPS, min(1000, 2 * max(steps)))
    runs = [(EXACT, most // 2), (EXACT, most), *((name, k) for name in names for k in steps)]
    asked = [replace(request.single(), sampler=name, eta=None, steps=k).resolve(pipe.model) for name, k in runs]
    for one in asked:
        try:
            pipe.paths(one)
        except BadRequest as e:
            raise BadRequest(f"samplers cannot be compared in {one.steps} steps, choose others: {e}", "steps") from None
    return asked


def samplers(
    pipe: Pipeline, request: Request, names: Sequence[str] = COMPARED, steps: Sequence[int] = STEPS
) -> Iterator[Progress | Solution | Run]:
    """Yield the converged solution, computed in twice the most steps or in more, then each sampler's runs."""
    half, exact, *asked = check(pipe, request, names, steps)
    count = Counter(pipe, [half, exact, *asked])
    rough, _ = yield from draw(pipe, half, count)
    x, picture = yield from draw(pipe, exact, count)
    yield Solution(exact.steps or 0, x, picture.pixels, distance(x, rough))
    for one in asked:
        y, picture = yield from draw(pipe, one, count)
        sampler, k = SAMPLERS[str(one.sampler)], one.steps or 0
        calls = sum(map(sampler.count, pipe.paths(one)))
        yield Run(sampler.name, k, calls, picture.pixels, distance(y, x), sampler.stochastic)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of a − b."""
    return float((a - b).square().mean().sqrt())


def observed_order(steps: Sequence[int], distances: Sequence[float], floor: float = 0.0) -> float | None:
    """Slope of −log(distance) over log(steps) by least squares, of those above a floor; None for fewer than two."""
    points = [(math.log(n), math.log(d)) for n, d in zip(steps, distances, strict=True) if d > max(floor, 0.0)]
    if len({u for u, _ in points}) < 2:
        return None
    mean_u, mean_v = (sum(c) / len(points) for c in zip(*points, strict=True))
    return -sum((u - mean_u) * (v - mean_v) for u, v in points) / sum((u - mean_u) ** 2 for u, _ in points)
