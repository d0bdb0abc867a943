"""Equality with diffusers' schedulers: same levels, same random network, same noise, fp32, at every step."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from random_network import SHAPE, denoise, network, start

from sfumato.diffusion import SAMPLERS, SPACINGS, NoiseLevel, Path
from sfumato.diffusion.schedules import Discrete, Flow

diffusers = pytest.importorskip("diffusers", reason="diffusers is a development-only oracle")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 12


@pytest.fixture(scope="module")
def schedule():
    """Their own fp32 cumulative product as levels, so that only the samplers are compared."""
    return Discrete(diffusers.DDIMScheduler(**SD).alphas_cumprod.double().numpy())


@pytest.fixture(scope="module")
def path(schedule):
    return SPACINGS["leading"](schedule, STEPS)


def ratio(level):
    return level.sigma / level.alpha if level.alpha else math.inf


def numbers(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(SHAPE, generator=generator)


def ours(name, path, x, noise=None, **settings):
    steps = list(SAMPLERS[name](denoise, x, path, noise, **settings))
    assert len(steps) == len(path) - 1
    return steps


def same(a, b, tolerance=1e-5):
    assert a.dtype == b.dtype == torch.float32
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def epsilon(x, level):
    """What their pipelines give to ``step``: ε of a picture in VP coordinates."""
    return network(x, math.log(ratio(level)))


def ve(levels):
    """The same σ/α in the coordinates that their sigma-based schedulers keep."""
    return Path([NoiseLevel(q.t, 1.0, q.sigma / q.alpha) for q in levels])


def inject(scheduler, levels):
    """Give a sigma-based scheduler our levels."""
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.tensor([ratio(q) for q in levels], dtype=torch.float32)
    return scheduler


def test_ddim(path):
    for eta in (0.0, 0.7, 1.0):
        scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
        scheduler.set_timesteps(STEPS)
        assert scheduler.timesteps.tolist() == [q.t for q in path[:-1]]
        x, draws = start(), numbers()
        for step, t, p in zip(ours("ddim", path, x, numbers(), eta=eta), scheduler.timesteps, path, strict=False):
            noise = {"variance_noise": draws(x)} if eta else {}
            x = scheduler.step(epsilon(x, p), t, x, eta=eta, **noise).prev_sample
            same(step.x, x)


def test_ddpm(path):
    scheduler = diffusers.DDPMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    x, generator = start(), torch.Generator().manual_seed(7)
    for step, t, p in zip(ours("ddpm", path, x, numbers()), scheduler.timesteps, path, strict=False):
        x = scheduler.step(epsilon(x, p), t, x, generator=generator).prev_sample
        same(step.x, x)


@pytest.mark.parametrize("name", ["euler", "euler-ancestral"])
def test_euler(path, name):
    kind = {"euler": diffusers.EulerDiscreteScheduler, "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler}[
        name
    ]
    scheduler = kind(**SD, timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == [q.t for q in path[:-1]]
    x, generator = start() / path[0].alpha, torch.Generator().manual_seed(7)
    for step, t, p, q in zip(ours(name, path, start(), numbers()), scheduler.timesteps, path, path[1:], strict=False):
        x = scheduler.step(epsilon(scheduler.scale_model_input(x, t), p), t, x, generator=generator).prev_sample
        same(step.x, q.alpha * x)


def test_heun(path):
    scheduler = diffusers.HeunDiscreteScheduler(**SD, timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    levels = ve(path)  # Heun's rule depends on the coordinates
    x = start() * levels[0].sigma
    steps = iter(ours("heun", levels, x))
    calls = [level for p, q in pairwise(path) for level in ((p, q) if q.sigma else (p,))]
    for i, (t, level) in enumerate(zip(scheduler.timesteps, calls, strict=True)):
        x = scheduler.step(epsilon(scheduler.scale_model_input(x, t), level), t, x).prev_sample
        if i % 2 or level is path[-2]:
            same(next(steps).x, x)
    assert next(steps, None) is None


@pytest.mark.parametrize("name", ["dpm-2", "dpm-2-ancestral"])
def test_dpm_2(path, name):
    kind = {"dpm-2": diffusers.KDPM2DiscreteScheduler, "dpm-2-ancestral": diffusers.KDPM2AncestralDiscreteScheduler}[
        name
    ]
    scheduler = kind(**SD, timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    x, generator, i = start() / path[0].alpha, torch.Generator().manual_seed(7), 0
    middles = scheduler.sigmas_interpol[0 if name == "dpm-2-ancestral" else 1 :: 2]
    for step, p, q in zip(ours(name, path, start(), numbers()), path, path[1:], strict=False):
        for log_ratio in [math.log(ratio(p)), *([math.log(middles[i // 2])] if q.sigma else [])]:
            t = scheduler.timesteps[i]
            extra = {"generator": generator} if name == "dpm-2-ancestral" else {}
            out = network(scheduler.scale_model_input(x, t), log_ratio)
            x = scheduler.step(out, t, x, **extra).prev_sample
            i += 1
        same(step.x, q.alpha * x)


def test_plms(path):
    scheduler = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=True)
    scheduler.set_timesteps(STEPS)
    x, results = start(), []
    for t in scheduler.timesteps:  # the second level comes twice: the improved-Euler start
        level = path[[q.t for q in path].index(float(t))]
        x = scheduler.step(epsilon(x, level), t, x).prev_sample
        results.append(x)
    for step, x in zip(ours("plms", path, start()), results[1:], strict=True):
        same(step.x, x)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpmpp-1", {"solver_order": 1}),
        ("dpmpp-2m", {"solver_order": 2}),
        ("dpmpp-3m", {"solver_order": 3, "lower_order_final": False}),
        ("dpmpp-2m-sde", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_dpm_solver_multistep(path, name, settings):
    scheduler = inject(diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type="zero", **settings), path)
    x, generator = start(), torch.Generator().manual_seed(7)
    for step, t, p in zip(ours(name, path, x, numbers()), scheduler.timesteps, path, strict=False):
        x = scheduler.step(epsilon(x, p), t, x, generator=generator).prev_sample
        same(step.x, x)


def test_dpm_solver_singlestep(path):
    """Theirs takes the middle level from its path, ours between two levels of it."""
    levels = []
    for p, q in pairwise(path[:-1]):
        levels += [p, path.between(p, q, (p.log_snr + q.log_snr) / 2)]
    levels += path[-2:]
    scheduler = diffusers.DPMSolverSinglestepScheduler(**SD, solver_order=2, final_sigmas_type="zero")
    inject(scheduler, levels)
    assert scheduler.order_list == [1, 2] * (STEPS - 1) + [1]
    x, results = start(), []
    for t, p in zip(scheduler.timesteps, levels, strict=False):
        x = scheduler.step(epsilon(x, p), t, x).prev_sample
        results.append(x)
    for step, x in zip(ours("dpmpp-2s", path, start()), [*results[1::2], results[-1]], strict=True):
        same(step.x, x)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(path, order):
    scheduler = inject(
        diffusers.UniPCMultistepScheduler(**SD, solver_order=order, solver_type="bh2", final_sigmas_type="zero"), path
    )
    x, steps = start(), ours("unipc", path, start(), order=order)
    for i, (t, p) in enumerate(zip(scheduler.timesteps, path, strict=False)):
        x = scheduler.step(epsilon(x, p), t, x).prev_sample
        if order < 3 or i < STEPS - 2:  # order 3: theirs goes to 2 one step before the end, ours only at σ = 0
            same(steps[i].x, x)


def test_lcm(schedule):
    times = [999, 759, 499, 259]
    levels = [*(schedule(t) for t in times), schedule.clean]
    scheduler = diffusers.LCMScheduler(**SD, timestep_scaling=1e6)  # c_skip = 0: the boundary is the network's matter
    scheduler.set_timesteps(timesteps=times)
    x, generator = start(), torch.Generator().manual_seed(7)
    for step, t, p in zip(ours("lcm", levels, x, numbers()), scheduler.timesteps, levels, strict=False):
        x = scheduler.step(epsilon(x, p), t, x, generator=generator).prev_sample
        same(step.x, x)


@pytest.mark.parametrize("name", ["flow-euler", "flow-heun"])
def test_flow(name):
    path = SPACINGS["shift"](Flow(t_max=0.98), STEPS)
    kind = {
        "flow-euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "flow-heun": diffusers.FlowMatchHeunDiscreteScheduler,
    }
    scheduler = kind[name]()
    levels = [path[0]]
    if name == "flow-euler":
        scheduler.set_timesteps(sigmas=np.array([q.sigma for q in path[:-1]]))
        calls = list(path[:-1])
    else:
        scheduler.set_timesteps(STEPS)
        levels = [path[0], *(q for q in path[1:-1] for _ in range(2)), path[-1]]
        scheduler.sigmas = torch.tensor([q.sigma for q in levels], dtype=torch.float32)
        calls = [level for p, q in pairwise(path) for level in ((p, q) if q.sigma else (p,))]
    steps = iter(ours(name, path, start()))
    x = start()
    for i, (t, p) in enumerate(zip(scheduler.timesteps, calls, strict=True)):
        out = denoise(x, p)
        x = scheduler.step(out.eps - out.x0, t, x).prev_sample
        if name == "flow-euler" or i % 2 or p is path[-2]:
            same(next(steps).x, x)
    assert next(steps, None) is None
