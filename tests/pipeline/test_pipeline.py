"""The pipeline: a picture is decided by request and model alone, whatever is made beside it, in whatever thread."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.diffusion import PARAMETERIZATIONS, SAMPLERS, SCHEDULES, SPACINGS, Step
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families import load
from sfumato.families.model import Model
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request

WORDS = "a red apple"
MAKERS = [name for name in SAMPLERS if name != "ddim-inversion"]


def last_x(pipe: Pipeline, request: Request) -> torch.Tensor:
    return [e.x for e in pipe.run(request) if isinstance(e, Step)][-1]


def test_a_run_yields_its_steps_and_then_its_pictures(tiny: Model) -> None:
    events = list(Pipeline(tiny).run(Request(WORDS, seed=5, n=3, steps=4)))
    steps, pictures = events[:4], events[4:]
    assert all(isinstance(s, Step) and s.x.shape == s.preview.shape == (3, 3, 16, 16) for s in steps)
    assert steps[-1].level.sigma == 0
    assert all(isinstance(p, Picture) and p.pixels.shape == (16, 16, 3) for p in pictures)
    assert [p.request.seed for p in pictures] == [5, 6, 7]
    assert all(p.request.n == 1 and p.request == p.request.resolve(tiny) for p in pictures)
    assert pictures[0].model_hash == tiny.hash
    assert pictures[0].model == tiny.path.name, "a picture tells no one where its maker's files lie"


def test_generate_takes_the_fields_of_request(tiny: Model) -> None:
    pipe = Pipeline(tiny)
    (a,), (b,) = pipe.generate(WORDS, seed=1, steps=3), pipe.generate(WORDS, seed=1, steps=3)
    assert np.array_equal(a.pixels, b.pixels)
    assert not np.array_equal(a.pixels, pipe.generate("a blue house", seed=1, steps=3)[0].pixels)
    assert not np.array_equal(a.pixels, pipe.generate(WORDS, seed=2, steps=3)[0].pixels)
    with pytest.raises(BadRequest, match="did you mean 'steps'"):
        pipe.generate(WORDS, stepz=3)


def test_words_that_do_not_fit_are_told_with_the_picture(tiny: Model) -> None:
    pipe, long = Pipeline(tiny), "a red apple in the rain " * 9
    (picture,) = pipe.generate(long, steps=1)
    lost = tiny.truncated(long)
    assert lost > 0
    assert picture.warnings == (f"prompt: too long for this model: its last {lost} tokens are left out",)
    assert pipe.generate("a", steps=1)[0].warnings == ()
    assert [w.partition(":")[0] for w in pipe.warnings(Request("a", negative=long, prompt_to=long))] == [
        "negative", "prompt_to",
    ]  # fmt: skip


def test_a_bad_request_is_refused_before_the_first_step(tiny: Model) -> None:
    pipe = Pipeline(tiny)
    with pytest.raises(BadRequest):
        pipe.run(Request(WORDS, steps=0))
    with pytest.raises(BadRequest, match="has 5 steps"):
        Pipeline(replace(tiny, schedule=SCHEDULES["linear"](steps=5))).run(Request(WORDS, steps=6))
    noise_only = replace(tiny, schedule=SCHEDULES["flow"](), parameterization=PARAMETERIZATIONS["eps"])
    with pytest.raises(BadRequest, match="cannot start from pure noise"):
        Pipeline(noise_only).run(Request(WORDS))


def test_initial_noise_is_of_unit_variance_and_belongs_to_its_seed(tiny: Model) -> None:
    pipe = Pipeline(tiny)
    noise = pipe.initial_noise(Request(WORDS, seed=10, n=8))
    assert noise.shape == (8, 3, 16, 16)
    assert noise.dtype == torch.float32
    assert abs(noise.std() - 1) < 0.03
    assert abs(noise.mean()) < 0.03
    for n in (1, 2, 3, 5, 8):
        assert torch.equal(pipe.initial_noise(Request("other words", seed=10, n=n)), noise[:n])
    for i in range(8):
        assert torch.equal(pipe.initial_noise(Request(WORDS, seed=10 + i))[0], noise[i])


@pytest.mark.parametrize("schedule", ["flow", "exploding", "cosine"])
def test_the_start_has_the_scale_of_the_first_level(tiny: Model, schedule: str) -> None:
    model = replace(tiny, schedule=SCHEDULES[schedule](), parameterization=PARAMETERIZATIONS["v"])
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny.network

        def forward(self, x: torch.Tensor, clock: torch.Tensor, **words: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return self.network(x, clock, **words)

    pipe = Pipeline(replace(model, network=Spy()))
    list(pipe.run(Request(WORDS, seed=0, steps=2, guidance=1.0)))
    first = SPACINGS["trailing"](model.schedule, 2)[0]
    scale = (first.alpha**2 + first.sigma**2) ** 0.5
    torch.testing.assert_close(seen[0], pipe.initial_noise(Request(WORDS, seed=0)) * scale)


@pytest.mark.parametrize("sampler", MAKERS)
def test_a_picture_is_the_same_to_the_bit_in_any_batch_and_slot(tiny: Model, sampler: str) -> None:
    pipe = Pipeline(tiny)
    request = Request(WORDS, seed=3, sampler=sampler, negative="rain", guidance_rescale=0.3)
    whole = last_x(pipe, replace(request, n=5))
    assert torch.equal(last_x(pipe, replace(request, n=2)), whole[:2])
    for i in (0, 2, 4):
        assert torch.equal(last_x(pipe, replace(request, seed=3 + i))[0], whole[i])


@pytest.mark.parametrize("guidance", [1.0, 2.0, 7.5])
@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddpm", "dpmpp-sde"])
def test_a_batched_network_changes_a_picture_by_rounding_only(tiny: Model, sampler: str, guidance: float) -> None:
    one_by_one, batched = Pipeline(tiny), Pipeline(tiny, batch=8)
    request = Request(WORDS, seed=7, n=8, sampler=sampler, guidance=guidance)
    x = last_x(one_by_one, request)
    for n in (1, 2, 3, 5, 8):
        assert (x[:n] - last_x(batched, replace(request, n=n))).abs().max() <= 1e-5


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_built_in_model_draws_the_same_in_batches_of_eight(guidance: float) -> None:
    """But for rounding, where a machine's kernels go by the number of rows: a step's, which later ones enlarge."""
    model = load(None)
    one_by_one, batched = Pipeline(model), Pipeline(model, batch=8)
    request = Request("a red fox", seed=3, n=8, steps=5, guidance=guidance, upscale=1)
    alone = [e.x for e in one_by_one.run(request) if isinstance(e, Step)]
    for n in (3, 8):
        together = [e.x for e in batched.run(replace(request, n=n)) if isinstance(e, Step)]
        assert (together[0] - alone[0][:n]).abs().max() <= 3e-6 * (1 + guidance)
        for p, q in zip(one_by_one.pixels(alone[-1][:n]), one_by_one.pixels(together[-1]), strict=True):
            off = np.abs(p.astype(int) - q)
            assert off.max() <= 1
            assert off.mean() < 0.01
    x = alone[-1]
    assert all(map(np.array_equal, one_by_one.pixels(x), batched.pixels(x)))


def test_guidance_one_calls_the_network_without_a_doubled_batch(tiny: Model) -> None:
    rows: list[int] = []
    handle = tiny.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        list(Pipeline(tiny, batch=4).run(Request(WORDS, seed=0, n=3, steps=2, sampler="euler", guidance=1.0)))
        assert rows == [3, 3]
        rows.clear()
        list(Pipeline(tiny, batch=4).run(Request(WORDS, seed=0, n=3, steps=2, sampler="euler", guidance=2.0)))
        assert rows == [6, 6]
        rows.clear()
        interval = Request(WORDS, seed=0, steps=4, sampler="euler", guidance=2.0, guidance_interval=(0.5, 4.0))
        list(Pipeline(tiny).run(interval))
        assert rows == [1, 2, 2, 1]
    finally:
        handle.remove()


def test_guidance_is_the_line_through_the_two_predictions(tiny: Model) -> None:
    """With one step of Euler the picture is the predicted x0, so it must lie on that line."""
    pipe = Pipeline(tiny)
    one = Request(WORDS, seed=0, steps=1, sampler="euler", guidance=1.0)
    words, nothing = last_x(pipe, one), last_x(pipe, replace(one, guidance=0.0))
    torch.testing.assert_close(
        last_x(pipe, replace(one, guidance=3.5)), nothing + 3.5 * (words - nothing), atol=1e-4, rtol=1e-4
    )
    rain = last_x(pipe, Request("rain", seed=0, steps=1, sampler="euler", guidance=1.0))
    torch.testing.assert_close(
        last_x(pipe, replace(one, guidance=3.5, negative="rain")), rain + 3.5 * (words - rain), atol=1e-4, rtol=1e-4
    )


def test_a_model_s_own_conditioning_and_spacing_reach_network_and_path(tiny: Model) -> None:
    told: list[torch.Tensor] = []

    class Told(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny.network

        def forward(
            self, x: torch.Tensor, clock: torch.Tensor, place: torch.Tensor, **words: torch.Tensor
        ) -> torch.Tensor:
            told.append(place)
            return self.network(x, clock, **words)

    model = replace(
        tiny,
        network=Told(),
        situate=lambda width, height, guidance: {"place": torch.tensor([[float(width), float(height), guidance]])},
        spacings=lambda width, height: {"shift": {"s": 5.0}},
    )
    request = Request(WORDS, seed=0, n=2, width=32, spacing="shift", guidance=2.0)
    steps = [e for e in Pipeline(model, batch=2).run(request) if isinstance(e, Step)]
    assert torch.equal(told[0], torch.tensor([[32.0, 16.0, 2.0]]).expand(4, 3))
    path = SPACINGS["shift"](tiny.schedule, 4, s=5.0)
    assert [s.level for s in steps] == list(path[1:])

    told.clear()
    distilled = replace(model, distilled=True)
    list(Pipeline(distilled, batch=2).run(request))
    assert torch.equal(told[0], torch.tensor([[32.0, 16.0, 2.0]]).expand(2, 3))
    with pytest.raises(BadRequest, match="negative has no effect with model"):
        Pipeline(distilled).run(replace(request, negative="rain"))


def test_inference_mode_stays_inside(tiny: Model) -> None:
    for event in Pipeline(tiny).run(Request(WORDS, seed=0, n=2)):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        if isinstance(event, Step):
            assert not event.x.is_inference()
            event.preview.add_(0)  # an inference tensor would refuse
            weight = torch.ones(1, requires_grad=True)
            (weight * event.x).sum().backward()
            assert weight.grad is not None


def test_threads_on_one_pipeline_do_not_meet(tiny: Model) -> None:
    pipe = Pipeline(tiny)
    requests = [Request(f"{WORDS} {i}", seed=i, sampler=MAKERS[i % len(MAKERS)], steps=2 + i % 3) for i in range(12)]
    alone = [last_x(pipe, r) for r in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda r: last_x(pipe, r), requests))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_runs_that_are_interleaved_do_not_meet(tiny: Model) -> None:
    pipe = Pipeline(tiny)
    a, b = Request(WORDS, seed=1, sampler="dpmpp-sde"), Request("house", seed=2, sampler="plms")
    pairs = list(zip(pipe.run(a), pipe.run(b), strict=True))
    assert torch.equal(pairs[3][0].x, last_x(pipe, a))  # type: ignore[union-attr]
    assert torch.equal(pairs[3][1].x, last_x(pipe, b))  # type: ignore[union-attr]


def overflowing(limit: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A decoder whose float32 overflows, as an autoencoder's float16 does."""

    def decode(x: torch.Tensor) -> torch.Tensor:
        return (x * limit) / limit

    return decode


def test_an_overflowing_decoder_is_tried_once_more_in_a_wider_type(tiny: Model) -> None:
    expected = Pipeline(tiny).generate(WORDS, seed=0)[0]
    retried = Pipeline(replace(tiny, decode=overflowing(3e38))).generate(WORDS, seed=0)[0]
    assert np.abs(expected.pixels.astype(int) - retried.pixels).max() <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_of_nan_is_an_error(tiny: Model, bad: float) -> None:
    with pytest.raises(BadCheckpoint, match="NaN"):
        Pipeline(replace(tiny, decode=lambda x: x * 0 + bad)).generate(WORDS, seed=0)


def test_a_network_that_overflows_in_half_precision_is_called_again_in_full(tiny: Model) -> None:
    class Narrow(torch.nn.Module):
        """0.1·x by way of numbers that half precision lacks."""

        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(6e4), requires_grad=False)

        def forward(self, x: torch.Tensor, clock: torch.Tensor, **words: torch.Tensor) -> torch.Tensor:
            return x * self.factor * 100 / (self.factor * 100) * 0.1

    wide = last_x(Pipeline(replace(tiny, network=Narrow())), Request(WORDS, seed=0))
    narrow = last_x(Pipeline(replace(tiny, network=Narrow().half())), Request(WORDS, seed=0))
    torch.testing.assert_close(wide, narrow, atol=1e-2, rtol=1e-2)


def test_damaged_weights_give_an_error_and_no_picture(tiny: Model) -> None:
    import copy

    broken = copy.deepcopy(tiny.network)
    next(broken.parameters()).data.fill_(float("nan"))
    with pytest.raises(BadCheckpoint, match="weights are damaged"):
        Pipeline(replace(tiny, network=broken)).generate(WORDS, seed=0)


def test_fresh_processes_make_the_same_bits(tiny: Model, tiny_file: Path, soak: bool) -> None:
    code = (
        "import sys, hashlib, sfumato\n"
        "for e in sfumato.load(sys.argv[1]).run(sfumato.Request('a red apple', seed=1, n=2, sampler='dpmpp-sde')):\n"
        "    x = getattr(e, 'x', None)\n"
        "    last = last if x is None else hashlib.sha256(x.numpy().tobytes()).hexdigest()\n"
        "print(last)"
    )
    x = last_x(Pipeline(tiny), Request(WORDS, seed=1, n=2, sampler="dpmpp-sde"))
    threads = torch.get_num_threads()
    for _ in range(10 if soak else 1):
        env: Any = {"OMP_NUM_THREADS": str(threads), "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code, tiny_file], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == hashlib.sha256(x.numpy().tobytes()).hexdigest(), done.stderr


def test_upscale_enlarges_the_finished_picture_by_four(tiny: Model) -> None:
    from sfumato.families.upscaler import load_upscaler

    pipe = Pipeline(tiny)
    (small,), large = pipe.generate(WORDS, seed=3), pipe.generate(WORDS, seed=3, n=2, upscale=4)
    x = torch.from_numpy(small.pixels).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        expected = (load_upscaler()(x)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(large[0].pixels, expected)
    assert large[1].pixels.shape == (64, 64, 3)
    assert large[0].request.size == (16, 16)
    by_default = Pipeline(replace(tiny, defaults=replace(tiny.defaults, upscale=4)))
    assert np.array_equal(by_default.generate(WORDS, seed=3)[0].pixels, expected)
    assert np.array_equal(by_default.generate(WORDS, seed=3, upscale=1)[0].pixels, small.pixels)
