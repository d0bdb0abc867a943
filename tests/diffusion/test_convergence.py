"""Observed order of convergence of every sampler, on closed-form data in float64, for VP, VE and flow."""

import math

import numpy as np
import pytest
from mixtures import CURVES, GAUSSIAN, MIXTURE, exact, moments, smooth_path

from sfumato.diffusion import SAMPLERS, NoiseLevel, Path, Prediction

DETERMINISTIC = [s for s in SAMPLERS.values() if not s.stochastic and s.name != "ddim-inversion"]
STOCHASTIC = [s for s in SAMPLERS.values() if s.stochastic and s.order]


HIGH = 0.8  # σ/α at which paths start where the error of a first-order first step is to be seen


def draw(noise):  # a deterministic sampler has no business to draw noise
    raise AssertionError("drew noise")


def start(level, n=8):
    rng = np.random.default_rng(1)
    return level.alpha * MIXTURE.draw(n, rng) + level.sigma * rng.standard_normal((n, 2))


def observed(errors):
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=lambda s: s.name)
def test_order_on_the_ode(sampler, curve):
    ends = smooth_path(curve, 1)
    x = start(ends[0])
    want = exact(MIXTURE, x, ends[0], ends[-1])
    errors = []
    for steps in (192, 384):
        *_, last = sampler(MIXTURE, x, smooth_path(curve, steps), draw)
        errors.append(np.sqrt(np.mean((last.x - want) ** 2)))
    assert observed(errors) == pytest.approx(sampler.order, abs=0.1 if sampler.order == 1 else 0.15)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_gains_an_order_by_its_corrector(order, curve):
    """Order 4 would need a better start than one step of UniC-1, whose error is of third order.

    The path starts at little noise, where that first step matters.
    """
    ends = smooth_path(curve, 1, high=HIGH)
    x = start(ends[0])
    want = exact(MIXTURE, x, ends[0], ends[-1])
    errors = []
    for steps in (256, 512):
        *_, last = SAMPLERS["unipc"](MIXTURE, x, smooth_path(curve, steps, high=HIGH), draw, order=order)
        errors.append(np.sqrt(np.mean((last.x - want) ** 2)))
    assert observed(errors) == pytest.approx(min(order + 1, 3), abs=0.15)


def test_plms_is_of_third_order_where_sigma_over_alpha_falls_evenly():
    """There it is Adams–Bashforth itself, and the improved-Euler start leaves one error of third order."""
    errors = []
    for steps in (256, 512):
        path = Path([NoiseLevel(r, 1.0, r) for r in np.linspace(1, 0.1, steps + 1).tolist()])
        x = start(path[0])
        *_, last = SAMPLERS["plms"](MIXTURE, x, path, draw)
        errors.append(np.sqrt(np.mean((last.x - exact(MIXTURE, x, path[0], path[-1])) ** 2)))
    assert observed(errors) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("curve", CURVES)
def test_inversion_is_of_first_order_upwards(curve):
    ends = smooth_path(curve, 1)
    x = ends[-1].alpha * start(NoiseLevel(0.0, 1.0, 0.1))
    want = exact(MIXTURE, x, ends[-1], ends[0])
    errors = []
    for steps in (192, 384):
        *_, last = SAMPLERS["ddim-inversion"](MIXTURE, x, smooth_path(curve, steps), draw)
        assert last.level == ends[0]
        errors.append(np.sqrt(np.mean((last.x - want) ** 2)))
    assert observed(errors) == pytest.approx(SAMPLERS["ddim-inversion"].order, abs=0.1)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("sampler", STOCHASTIC, ids=lambda s: s.name)
def test_order_of_the_law(sampler, eta, curve):
    p, q = smooth_path(curve, 1, high=HIGH)
    mean, variance = GAUSSIAN.means[0], GAUSSIAN.variances[0]
    deviation = np.sqrt(p.alpha**2 * variance + p.sigma**2)
    errors = []
    for steps in (160, 320):
        got, spread = moments(sampler, smooth_path(curve, steps, high=HIGH), p.alpha * mean, deviation, eta=eta)
        assert got == pytest.approx(q.alpha * mean, abs=1e-9)
        errors.append(np.abs(spread - (q.alpha**2 * variance + q.sigma**2)).max())
    assert observed(errors) == pytest.approx(sampler.order, abs=0.1 if sampler.order == 1 else 0.15)


@pytest.mark.parametrize("name", ["ddpm", "euler-ancestral", "dpmpp-sde", "dpmpp-2m-sde"])
def test_order_of_the_reverse_process(name):
    """From one given x, the result must have the law q(x_low | x_high) of DDPM's forward process read backwards."""
    p, q = smooth_path("ve", 1, high=HIGH)
    mean, variance = GAUSSIAN.means[0], GAUSSIAN.variances[0]
    x = np.array([5.0, -9.0])
    gain = (variance + q.sigma**2) / (variance + p.sigma**2)
    errors = []
    for steps in (160, 320):
        got, spread = moments(SAMPLERS[name], smooth_path("ve", steps, high=HIGH), x, 0.0)
        assert got == pytest.approx(mean + gain * (x - mean), abs=1e-9)
        errors.append(np.abs(spread - (variance + q.sigma**2) * (1 - gain)).max())
    assert observed(errors) == pytest.approx(SAMPLERS[name].order, abs=0.15)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda s: s.name)
def test_coordinates_do_not_matter(sampler):
    """VP, VE and flow paths of the same σ/α are the same method, whatever the scale of x; Heun's rule is not."""
    ratios = np.geomspace(20, 0.05, 13).tolist()
    results = []
    for path in (
        [NoiseLevel(0.0, 1.0, r) for r in ratios] + [NoiseLevel(0.0, 1.0, 0.0)],
        [NoiseLevel(0.0, 1 / math.hypot(1, r), r / math.hypot(1, r)) for r in ratios] + [NoiseLevel(0.0, 1.0, 0.0)],
        [NoiseLevel(0.0, 1 / (1 + r), r / (1 + r)) for r in ratios] + [NoiseLevel(0.0, 1.0, 0.0)],
    ):
        rng = np.random.default_rng(0)
        upwards = sampler.name == "ddim-inversion"
        x = path[0].alpha * start(NoiseLevel(0.0, 1.0, 20.0)) if not upwards else start(NoiseLevel(0.0, 1.0, 0.1))
        *_, last = sampler(MIXTURE, x, path, lambda y, rng=rng: rng.standard_normal(y.shape))
        results.append(last.x / last.level.alpha)
    for other in results[1:]:
        same = np.allclose(results[0], other, rtol=0, atol=1e-9)
        assert same == (sampler.name not in ("heun", "flow-heun"))


def test_a_consistency_function_is_exact_in_any_number_of_steps():
    """LCM's limit is another one: with the ODE's own solution as denoiser, the law is right after each step."""
    mean, variance = GAUSSIAN.means[0], GAUSSIAN.variances[0]

    def solution(x, level):
        deviation = np.sqrt(level.alpha**2 * variance + level.sigma**2)
        return Prediction.from_x0(x, level, mean + np.sqrt(variance) * (x - level.alpha * mean) / deviation)

    for steps in (1, 2, 5):
        path = Path([*smooth_path("vp", steps)[:-1], NoiseLevel(-1.0, 1.0, 0.0)])
        p = path[0]
        x = np.tile(p.alpha * mean, (len(path) + 2, 1))
        x[1] += np.sqrt(p.alpha**2 * variance + p.sigma**2)
        draws = iter(range(2, len(x)))

        def noise(y, draws=draws):
            z = np.zeros_like(y)
            z[next(draws)] = 1
            return z

        *_, last = SAMPLERS["lcm"](solution, x, path, noise)
        assert last.x[0] == pytest.approx(mean)
        assert ((last.x[1:] - last.x[0]) ** 2).sum(0) == pytest.approx(variance)
