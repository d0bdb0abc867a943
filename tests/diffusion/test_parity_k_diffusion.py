"""Equality with k-diffusion's samplers: same levels, same random network, same noise, fp32."""

import importlib.util
import math
import sys
import types

import pytest
import torch
from random_network import SHAPE, denoise, start

from sfumato.diffusion import SAMPLERS, SCHEDULES, SPACINGS, Path
from sfumato.diffusion.samplers import middle, renewal


@pytest.fixture(scope="module")
def k():
    """k_diffusion/sampling.py alone: the package's own start imports much that sampling does not need."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("k-diffusion is not installed (pip install --no-deps k-diffusion==0.1.1.post1)")
    folder = spec.submodule_search_locations[0]
    stand_ins = {
        name: types.ModuleType(name) for name in ("k_diffusion", "k_diffusion.utils", "torchdiffeq", "torchsde")
    }
    stand_ins["k_diffusion"].__path__ = [folder]
    stand_ins["k_diffusion.utils"].append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    stand_ins["k_diffusion"].utils = stand_ins["k_diffusion.utils"]
    stand_ins["torchdiffeq"].odeint = None
    saved = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location("k_diffusion.sampling", f"{folder}/sampling.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        for name, old in saved.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old


PATH = SPACINGS["karras"](SCHEDULES["exploding"](0.03, 15.0), 12)
SIGMAS = torch.tensor([q.sigma for q in PATH])


def model(x, sigma):
    level = PATH.schedule(float(sigma[0]))
    return denoise(x, level).x0


def numbers(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(SHAPE, generator=generator)


def compare(theirs, name, noise=None, **settings):
    *_, last = SAMPLERS[name](denoise, start() * PATH[0].sigma, PATH, noise or numbers(), **settings)
    assert last.x.dtype == theirs.dtype == torch.float32
    assert float((last.x - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "function"),
    [("euler", "euler"), ("heun", "heun"), ("dpm-2", "dpm_2"), ("dpmpp-2m", "dpmpp_2m")],
)
def test_deterministic(k, name, function):
    theirs = getattr(k, f"sample_{function}")(model, start() * PATH[0].sigma, SIGMAS, disable=True)
    compare(theirs, name)


@pytest.mark.parametrize("eta", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("euler-ancestral", "euler_ancestral"),
        ("dpm-2-ancestral", "dpm_2_ancestral"),
        ("dpmpp-2s-ancestral", "dpmpp_2s_ancestral"),
        ("dpmpp-2m-sde", "dpmpp_2m_sde"),
    ],
)
def test_stochastic(k, name, function, eta):
    sample = getattr(k, f"sample_{function}")
    theirs = sample(model, start() * PATH[0].sigma, SIGMAS, eta=eta, noise_sampler=numbers(), disable=True)
    compare(theirs, name, eta=eta)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_dpmpp_sde(k, eta):
    """Given the same two noises per step; ours makes the second one share the first one's Brownian path."""
    draws, middles = numbers(), []

    def noise_sampler(sigma, sigma_next):
        if not middles or middles[-1][0] != float(sigma):
            middles.append((float(sigma), draws()))
            return middles[-1][1]
        p, q = PATH.schedule(float(sigma)), PATH.schedule(float(sigma_next))
        m = middle(PATH, p, q)
        share = renewal(p, m) * math.sqrt(1 - renewal(m, q) ** 2) / renewal(p, q)
        return share * middles[-1][1] + math.sqrt(1 - share**2) * draws()

    theirs = k.sample_dpmpp_sde(
        model, start() * PATH[0].sigma, SIGMAS, eta=eta, noise_sampler=noise_sampler, disable=True
    )
    compare(theirs, "dpmpp-sde", eta=eta)


@pytest.mark.parametrize("settings", [{"s_churn": 3.0}, {"s_churn": 30.0, "s_noise": 1.007}])
def test_churn(k, settings):
    torch.manual_seed(3)
    theirs = k.sample_heun(model, start() * PATH[0].sigma, SIGMAS, disable=True, **settings)
    torch.manual_seed(3)
    # A plain list: k-diffusion lifts the first level beyond the schedule's end, which a schedule would not allow.
    *_, last = SAMPLERS["heun"](denoise, start() * PATH[0].sigma, list(PATH), torch.randn_like, **settings)
    assert float((last.x - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_the_same_on_a_vp_path(k):
    """Coordinates do not matter: a VP path of the same σ/α gives k-diffusion's result, too."""
    vp = SCHEDULES["linear"]()
    path = Path([*(vp.at_log_snr(p.log_snr) for p in PATH[:-1]), vp.clean], vp)
    theirs = k.sample_dpmpp_2m(model, start() * PATH[0].sigma, SIGMAS, disable=True)
    *_, last = SAMPLERS["dpmpp-2m"](denoise, start() * PATH[0].sigma * path[0].alpha, path, None)
    assert float((last.x - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_levels(k, spacing):
    want = getattr(k, f"get_sigmas_{spacing}")(12, 0.03, 15.0)
    path = SPACINGS[spacing](PATH.schedule, 12)
    assert torch.allclose(torch.tensor([q.sigma for q in path]), want, rtol=1e-5)
