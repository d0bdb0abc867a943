"""The path of a picture out of the noise, and the way back: what the network was given at each level, and what it saw.

x_p ─ denoise ─► (x0, ε) ─ mix at q ─► x_q          one frame: level p, x_p, the x0 seen in it
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from sfumato.diffusion.level import NoiseLevel, q_sample
from sfumato.errors import BadRequest
from sfumato.inside.attention import Maps, maps, watch
from sfumato.inside.record import Json, data_url, level_dict, number
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request
from sfumato.pixels import Pixels
from sfumato.text.spelling import Word

POINTS = 128  # of a schedule's curve


@dataclass(frozen=True, eq=False)
class Frame:
    """One level of a picture's path.

    Args:
        noisy: x there, decoded; uint8 (H, W, 3).
        predicted: the x0 that the network saw in it; None at the end, where the network is not called.
        attention: where the words looked, if it was asked for and the network attends to words.
    """

    level: NoiseLevel
    noisy: Pixels
    predicted: Pixels | None = None
    attention: Maps | None = None

    def to_dict(self) -> Json:
        """As JSON; a map is bytes of its share of 1/255, as many as cells."""
        seen = self.attention
        return {
            "level": level_dict(self.level),
            "noisy": data_url(self.noisy),
            "predicted": None if self.predicted is None else data_url(self.predicted),
            "attention": None
            if seen is None
            else {
                "share": seen.share,
                "mean": [float(m.mean()) for m in seen.maps],
                "peak": [float(m.max()) for m in seen.maps],
                "maps": [data_url(_grey(m)) for m in seen.maps],
            },
        }


def _grey(map: Any) -> Pixels:
    """A map (h, w) of shares, the largest as 255."""
    return (map / max(float(map.max()), 1e-12) * 255).round().astype(np.uint8)


def trajectory(pipe: Pipeline, request: Request, *, attention: bool = True) -> Iterator[Frame | Picture]:
    """Yield a frame for each level that a picture visits, the clean one included, then the picture itself.

    The picture is the same to the last bit whether attention is recorded or not.
    """
    request = request.single().resolve(pipe.model)
    model, recorder = watch(pipe.model, attention=attention)
    words, level = words_of(pipe, request), pipe.model.schedule.clean
    for event in Pipeline(model, pipe.batch, pipe.tile).run(request):
        if isinstance(event, Picture):
            yield Frame(level, event.pixels)
            yield event
            continue
        call, level = recorder.take(), event.level
        if call is not None:
            seen = maps(call.layers, (call.x.shape[-2], call.x.shape[-1]), words)
            yield Frame(call.level, visible(pipe, call.x, call.level), pipe.pixels(event.preview)[0], seen)


def words_of(pipe: Pipeline, request: Request) -> list[Word]:
    """The words of a request's prompt as its model reads them."""
    return list(pipe.model.words(request.prompt))


def visible(pipe: Pipeline, x: Tensor, level: NoiseLevel) -> Pixels:
    """Decode a noisy x (1, C, h, w), brought back to the size of data where the schedule lets it grow."""
    return pipe.pixels(x / max(1.0, math.hypot(level.alpha, level.sigma)))[0]


@dataclass(frozen=True)
class Curve:
    """A noise schedule, and the levels that a request visits on it."""

    levels: tuple[NoiseLevel, ...]
    visited: tuple[NoiseLevel, ...]

    def to_dict(self) -> Json:
        """As JSON: columns of the curve, and the visited levels."""
        return {
            "t": [float(p.t) for p in self.levels],
            "alpha": [float(p.alpha) for p in self.levels],
            "sigma": [float(p.sigma) for p in self.levels],
            "log_snr": [number(p.log_snr) for p in self.levels],
            "visited": [level_dict(p) for p in self.visited],
        }


def curve(pipe: Pipeline, request: Request) -> Curve:
    """Sample the model's schedule evenly in time, from its cleanest to its noisiest, and tell a request's levels."""
    schedule = pipe.model.schedule
    times = np.linspace(schedule.t_min, schedule.t_max, POINTS)
    visited = (level for path in pipe.paths(request) for level in path)
    return Curve(tuple(schedule(float(t)) for t in times), tuple(visited))


@dataclass(frozen=True, eq=False)
class Noised:
    """A given picture at one level of noise, and what the network sees in it.

    Args:
        error: root mean square of x0 − predicted x0, in units of x.
    """

    level: NoiseLevel
    noisy: Pixels
    predicted: Pixels
    error: float

    def to_dict(self) -> Json:
        """As JSON."""
        return {
            "level": level_dict(self.level),
            "noisy": data_url(self.noisy),
            "predicted": data_url(self.predicted),
            "error": self.error,
        }


def forward(pipe: Pipeline, request: Request, pixels: Pixels) -> Iterator[Noised]:
    """Noise a picture as training does, x_t = α·x0 + σ·ε, at each level of a request, and let the network split it.

    The network sees all of it: where the request repaints a part alone, nothing of what it keeps is laid over.

    Args:
        pixels: uint8 (H, W, 3), of the request's size.
    """
    request = request.single().resolve(pipe.model)
    if pixels.shape != (*request.size[::-1], 3):
        raise BadRequest(f"the picture has {pixels.shape[1]}x{pixels.shape[0]} pixels: give it the request's size")
    x0, path = pipe.latents([pixels]), pipe.path(request)
    denoise, eps = pipe.denoiser(replace(request, mask=None, outpaint=None)), pipe.initial_noise(request)
    for level in reversed(path[:-1]):
        x = q_sample(x0, eps, level)
        out = denoise(x, level)
        error = float((out.x0 - x0).square().mean().sqrt())
        yield Noised(level, visible(pipe, x, level), pipe.pixels(out.x0)[0], error)
