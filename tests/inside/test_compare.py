"""Distances to the converged solution fall at the samplers' orders; forward noise is the closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.diffusion.schedules import Flow
from sfumato.errors import BadRequest
from sfumato.families.model import Model
from sfumato.inside.compare import Guided, Progress, Run, Solution, guidance, observed_order, samplers
from sfumato.inside.path import curve, forward
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request

WORDS = "a red apple"


class Ideal(nn.Module):
    """The exact denoiser of pictures whose every number is normal, mean 0.3 and deviation 0.5, in flow form."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, clock: Tensor, **_: Any) -> Tensor:
        sigma = clock.double()[:, None, None, None]
        alpha, var = 1 - sigma, 0.25
        x0 = self.mean + var * alpha / (alpha**2 * var + sigma**2) * (x - alpha * self.mean)
        return (x - alpha * x0) / sigma - x0


@pytest.fixture
def ideal(tiny: Model) -> Pipeline:
    return Pipeline(replace(tiny, network=Ideal(), schedule=Flow(t_max=0.98)))


def test_distances_fall_with_steps_at_each_samplers_order(ideal: Pipeline) -> None:
    steps = (20, 40, 80)
    request = Request(WORDS, seed=4, guidance=1.0, spacing="karras")
    events = list(samplers(ideal, request, ("euler", "heun", "dpmpp-2m", "ddpm"), steps))
    (exact,) = [e for e in events if isinstance(e, Solution)]
    runs = [e for e in events if isinstance(e, Run)]
    progress = [e for e in events if isinstance(e, Progress)]
    assert [p.done for p in progress] == list(range(1, len(progress) + 1))
    assert progress[-1].done == progress[-1].total
    assert exact.steps == 160
    orders = {}
    for name in ("euler", "heun", "dpmpp-2m", "ddpm"):
        own = [r for r in runs if r.sampler == name]
        assert [r.steps for r in own] == list(steps)
        assert all(r.calls == (2 * r.steps - 1 if name == "heun" else r.steps) for r in own)
        orders[name] = observed_order(steps, [r.distance for r in own], exact.uncertainty)
    assert orders["euler"] == pytest.approx(1, abs=0.15)
    assert orders["heun"] == pytest.approx(2, abs=0.3)
    assert orders["dpmpp-2m"] == pytest.approx(2, abs=0.35)
    assert all(r.stochastic == (r.sampler == "ddpm") for r in runs)
    # The solution of this ODE in closed form: what x holds beyond its mean, scaled to the data's deviation.
    start = ideal.path(request)[0]
    x = ideal.initial_noise(request) * math.hypot(start.alpha, start.sigma)
    expected = 0.3 + 0.5 * (x - 0.3 * start.alpha) / math.sqrt(0.25 * start.alpha**2 + start.sigma**2)
    torch.testing.assert_close(exact.x, expected, atol=3 * exact.uncertainty, rtol=0)


def test_calls_are_those_of_the_steps_that_are_walked(tiny: Model) -> None:
    """Half a path from a picture, and two rounds of one that is enlarged on its way."""
    half = {"init": Image.new("RGB", (16, 16), "red"), "strength": 0.5}
    for settings, steps, rounds in ((half, 2, 1), ({"hires": 2.0}, 6, 2)):
        request = Request.from_dict({"prompt": WORDS, "seed": 1, "width": 16, "height": 16, **settings})
        runs = [e for e in samplers(Pipeline(tiny), request, ("euler", "heun"), (4,)) if isinstance(e, Run)]
        assert [(r.steps, r.calls) for r in runs] == [(4, steps), (4, 2 * steps - rounds)]  # none at σ = 0


def test_observed_order_of_a_power_and_of_too_little() -> None:
    assert observed_order([1, 2, 4], [3.0, 0.75, 0.1875]) == pytest.approx(2)
    assert observed_order([1, 2, 4], [3.0, 1e-9, 1e-9], floor=1e-6) is None


def test_guidance_sweeps_the_same_noise(tiny: Model) -> None:
    pipe = Pipeline(tiny)
    request = Request(WORDS, seed=2, steps=2, negative="blue", guidance_rescale=0.3)
    swept = [e for e in guidance(pipe, request, (1.0, 2.0, 8.0)) if isinstance(e, Guided)]
    assert [g.guidance for g in swept] == [1, 2, 8]
    for g, asked in zip(
        swept,
        [Request(WORDS, seed=2, steps=2, guidance=1.0), *(replace(request, guidance=w) for w in (2.0, 8.0))],
        strict=True,
    ):
        (plain,) = [e for e in pipe.run(asked) if isinstance(e, Picture)]
        assert np.array_equal(g.pixels, plain.pixels)
        assert g.contrast == pytest.approx(plain.pixels.std())
    with pytest.raises(BadRequest, match="distilled"):
        next(guidance(Pipeline(replace(tiny, distilled=True)), request))


def test_forward_noise_is_the_closed_form_and_the_ideal_denoiser_errs_as_much_as_it_must(ideal: Pipeline) -> None:
    """The ideal denoiser's error on a picture of known variance is known in closed form."""
    request = Request(WORDS, seed=9, steps=5, guidance=1.0, width=64, height=64)
    values = 0.3 + 0.5 * np.random.default_rng(1).standard_normal((64, 64, 3)).clip(-1.3, 1.3)
    pixels = np.round((values + 1) * 127.5).clip(0, 255).astype(np.uint8)
    noised = list(forward(ideal, request, pixels))
    levels = ideal.path(request)[:-1]
    assert [n.level for n in noised] == list(reversed(levels))
    for n in noised:
        alpha, sigma = n.level.alpha, n.level.sigma
        x0 = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
        gain = 0.25 * alpha / (alpha**2 * 0.25 + sigma**2)
        # x0 − x̂0 = (1 − gain·α)·(x0 − mean) − gain·σ·ε, two independent parts
        expected = (((1 - gain * alpha) ** 2 * (x0 - 0.3).square().mean()) + (gain * sigma) ** 2) ** 0.5
        assert n.error == pytest.approx(float(expected), rel=0.03)
    with pytest.raises(BadRequest, match="size"):
        next(forward(ideal, request, pixels[:32]))
    with pytest.raises(BadRequest, match="encoder"):
        next(forward(Pipeline(replace(ideal.model, encode_picture=None)), request, pixels))


def test_what_is_seen_in_forward_noise_is_of_that_picture_alone(tiny: Model) -> None:
    pipe, red, mask = Pipeline(tiny), Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), "white")
    mask.paste(0, (0, 0, 16, 8))
    whole = Request.from_dict({"prompt": WORDS, "seed": 1, "steps": 2, "init": red, "strength": 1.0})
    part = Request.from_dict({**whole.to_dict(), "init": red, "mask": mask})
    blue = np.full((16, 16, 3), (0, 0, 255), np.uint8)
    for one, other in zip(forward(pipe, part, blue), forward(pipe, whole, blue), strict=True):
        assert np.array_equal(one.predicted, other.predicted), "nothing of the picture that the request keeps"
        assert one.error == other.error


def test_a_schedules_curve_and_the_levels_on_it(tiny: Model) -> None:
    request = Request(WORDS, steps=4, seed=0)
    told = curve(Pipeline(tiny), request).to_dict()
    assert told["visited"][-1]["log_snr"] is None, "infinite, which JSON cannot say"
    np.testing.assert_allclose(np.add(told["alpha"], told["sigma"]), 1)
    assert (np.diff(told["t"]) > 0).all()
    assert len(told["visited"]) == 5
    larger = curve(Pipeline(tiny), replace(request, hires=2.0))
    assert len(larger.visited) == 5 + 3, "both rounds, half the steps in the second"
