"""Guidance: its identities, and its independence of the parameterization and of the kind of array."""

import numpy as np
import pytest
import torch
from mixtures import GAUSSIAN, MIXTURE

from sfumato.diffusion import GUIDANCE, PARAMETERIZATIONS, SAMPLERS, SCHEDULES, SPACINGS, NoiseLevel, Pair, Prediction

cfg, apg, rescale, interval = (GUIDANCE[name] for name in ("cfg", "apg", "rescale", "interval"))
PAIR = Pair(MIXTURE, GAUSSIAN)
LEVELS = [NoiseLevel(0.5, 0.6, 0.8), NoiseLevel(2.0, 1.0, 2.0), NoiseLevel(0.3, 0.7, 0.3), NoiseLevel(1.0, 0.0, 1.0)]
X = np.random.default_rng(0).standard_normal((4, 2))
EVERY = {
    "cfg": cfg(3.0),
    "apg": apg(3.0, eta=0.2, norm=0.5),
    "rescale": rescale(cfg(3.0), 0.7),
    "interval": interval(cfg(3.0), 0.1, 10.0),
    "autoguidance": GUIDANCE["autoguidance"](2.0),
}


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a.x0, b.x0, rtol=0, atol=tolerance)
    np.testing.assert_allclose(a.eps, b.eps, rtol=0, atol=tolerance)


def outputs(name):
    """Two networks that put out ``name``'s row for the same underlying pictures."""
    row = PARAMETERIZATIONS[name]

    def network(mixture):
        def denoise(x, level):
            ideal = mixture(x, level)
            return row(x, level, row.target(ideal.x0, ideal.eps, level))

        return denoise

    return Pair(network(MIXTURE), network(GAUSSIAN))


def test_every_name_is_tested():
    assert EVERY.keys() == GUIDANCE.keys()


@pytest.mark.parametrize("level", LEVELS)
def test_scale_one_is_the_strong_and_zero_the_weak(level):
    strong, weak = PAIR(X, level)
    close(cfg(1.0)(PAIR)(X, level), strong)
    close(apg(1.0)(PAIR)(X, level), strong)
    close(cfg(0.0)(PAIR)(X, level), weak)
    close(rescale(cfg(1.0))(PAIR)(X, level), strong)


@pytest.mark.parametrize("level", LEVELS)
def test_cfg_is_the_formula_in_eps_and_keeps_to_x(level):
    strong, weak = PAIR(X, level)
    guided = cfg(4.0)(PAIR)(X, level)
    np.testing.assert_allclose(guided.eps, weak.eps + 4 * (strong.eps - weak.eps), atol=1e-12)
    for guidance in EVERY.values():
        np.testing.assert_allclose(guidance(PAIR)(X, level).at(level), X, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("level", LEVELS[:3])
def test_the_parameterization_does_not_matter(name, level):
    want = EVERY[name](PAIR)(X, level)
    for parameterization in PARAMETERIZATIONS:
        close(EVERY[name](outputs(parameterization))(X, level), want, 1e-9)


def test_cfg_of_outputs_is_cfg_of_predictions():
    """Guiding the network's raw output, as others do, gives the same for every row."""
    level = LEVELS[0]
    strong, weak = PAIR(X, level)
    for row in PARAMETERIZATIONS.values():
        a, b = (row.target(p.x0, p.eps, level) for p in (strong, weak))
        close(row(X, level, b + 5.0 * (a - b)), cfg(5.0)(PAIR)(X, level), 1e-10)


def test_defaults_are_as_stated():
    level = LEVELS[0]
    close(cfg()(PAIR)(X, level), cfg(5.0)(PAIR)(X, level))
    close(apg()(PAIR)(X, level), apg(5.0, eta=0.0, norm=1e9)(PAIR)(X, level))
    close(rescale(cfg(3.0))(PAIR)(X, level), rescale(cfg(3.0), 0.7)(PAIR)(X, level))  # 2305.08891, section 3.4
    for ratio in (1e-6, 0.5, 0.9, 1e6):
        level = NoiseLevel(ratio, 1.0, ratio)
        close(interval(cfg(3.0))(PAIR)(X, level), cfg(3.0)(PAIR)(X, level), 1e-9)


def test_interval_reads_the_level_and_spares_the_weak_call():
    calls = []
    pair = Pair(MIXTURE, lambda x, level: calls.append(level) or GAUSSIAN(x, level))
    guided = interval(cfg(3.0), low=0.5, high=2.0)(pair)
    for ratio, on in [(0.4, False), (0.5, False), (0.51, True), (2.0, True), (2.01, False)]:
        for scale in (1.0, 0.5, 0.0625):  # VE, or any other coordinates; exact in binary, as the ends are tested
            level = NoiseLevel(ratio, scale, scale * ratio)
            calls.clear()
            got = guided(X, level)
            assert bool(calls) == on
            close(got, (cfg(3.0)(pair) if on else MIXTURE)(X, level))
    pure = LEVELS[-1]
    close(guided(X, pure), MIXTURE(X, pure))
    close(interval(cfg(3.0))(pair)(X, pure), cfg(3.0)(pair)(X, pure))


def test_one_doubled_batch_is_enough():
    calls = []

    def batch(x, level):
        calls.append(level)
        both = [PAIR.strong, PAIR.weak]
        return both[0](x, level), both[1](x, level)

    def never(x, level):
        raise AssertionError("called alone")

    for name, guidance in EVERY.items():
        calls.clear()
        close(guidance(Pair(never, never, batch))(X, LEVELS[0]), EVERY[name](PAIR)(X, LEVELS[0]))
        assert len(calls) == 1


@pytest.mark.parametrize("level", LEVELS)
def test_apg_with_all_of_the_difference_is_cfg(level):
    for scale in (0.0, 1.0, 1.5, 2.0, 3.0):
        close(apg(scale, eta=1.0)(PAIR)(X, level), cfg(scale)(PAIR)(X, level), 1e-11)


def test_at_scale_one_the_weak_is_not_called():
    def never(x, level):
        raise AssertionError("called the weak")

    for guidance in (cfg(1.0), cfg(1), apg(1.0, norm=0.5), GUIDANCE["autoguidance"](1.0)):
        close(guidance(Pair(MIXTURE, never))(X, LEVELS[0]), MIXTURE(X, LEVELS[0]))


def test_apg_projects_and_bounds_the_difference():
    level = LEVELS[0]
    strong, weak = PAIR(X, level)
    update = apg(3.0)(PAIR)(X, level).x0 - strong.x0
    np.testing.assert_allclose((update * strong.x0).sum(1), 0, atol=1e-12)  # at right angles to the picture
    np.testing.assert_allclose(((strong.x0 - weak.x0) * update).sum(1), (update**2).sum(1) / 2, atol=1e-12)
    update = apg(3.0, eta=1.0, norm=0.05)(PAIR)(X, level).x0 - strong.x0
    assert np.linalg.norm(update, axis=1).max() == pytest.approx(2 * 0.05)
    big = apg(3.0, eta=1.0, norm=1e9)(PAIR)(X, level)
    close(big, cfg(3.0)(PAIR)(X, level), 1e-11)
    same = Pair(MIXTURE, MIXTURE)  # no difference at all: no 0/0
    close(apg(3.0, norm=1.0)(same)(X, level), strong)


def test_rescale_gives_the_contrast_back():
    level, x = LEVELS[0], np.random.default_rng(1).standard_normal((3, 2, 4, 4))
    strong = Prediction.from_x0(x, level, np.random.default_rng(2).standard_normal(x.shape))
    weak = Prediction.from_x0(x, level, np.random.default_rng(3).standard_normal(x.shape))
    pair = Pair(lambda *_: strong, lambda *_: weak)
    axes = (1, 2, 3)
    plain, full = cfg(6.0)(pair)(x, level), rescale(cfg(6.0), 1.0)(pair)(x, level)
    assert plain.x0.std(axes) == pytest.approx(full.x0.std(axes) * plain.x0.std(axes) / strong.x0.std(axes))
    assert full.x0.std(axes) == pytest.approx(strong.x0.std(axes))
    close(rescale(cfg(6.0), 0.0)(pair)(x, level), plain)
    half = rescale(cfg(6.0), 0.5)(pair)(x, level)
    np.testing.assert_allclose(half.x0, (plain.x0 + full.x0) / 2)


@pytest.mark.parametrize("name", EVERY)
def test_arrays_and_tensors_agree_and_pictures_of_a_batch_do_not_mix(name):
    rng = np.random.default_rng(5)
    x, a, b = rng.standard_normal((3, 3, 2, 4, 4))

    def pair(kind, pick=slice(None)):
        parts = [(lambda x, level, d=d: Prediction.from_x0(x, level, kind(d[pick]))) for d in (a, b)]
        return Pair(*parts)

    level = LEVELS[0]
    want = EVERY[name](pair(np.asarray))(x, level)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = EVERY[name](pair(lambda d, t=dtype: torch.tensor(d, dtype=t)))(torch.tensor(x, dtype=dtype), level)
        assert got.x0.dtype == dtype
        close(Prediction(*(part.double().numpy() for part in got)), want, tolerance)
    for i in range(3):
        alone = EVERY[name](pair(np.asarray, slice(i, i + 1)))(x[i : i + 1], level)
        np.testing.assert_allclose(alone.x0, want.x0[i : i + 1], atol=1e-12)


def test_guided_gaussians_have_the_closed_form_s_mean():
    """Two Gaussians of one variance at means 0 and m: guidance of any scale w is a denoiser towards w·m."""
    from mixtures import Mixture

    def gaussian(mean):
        return Mixture(np.ones(1), np.array([[mean, -mean]]), np.full((1, 2), 0.3))

    path = SPACINGS["karras"](SCHEDULES["exploding"](), 40)
    x = path[0].sigma * np.random.default_rng(0).standard_normal((5, 2))
    *_, got = SAMPLERS["dpmpp-2m"](cfg(2.5)(Pair(gaussian(1.0), gaussian(0.0))), x, path, None)
    *_, want = SAMPLERS["dpmpp-2m"](gaussian(2.5), x, path, None)
    np.testing.assert_allclose(got.x, want.x, atol=1e-9)
