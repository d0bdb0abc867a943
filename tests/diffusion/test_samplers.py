"""Samplers: ends of the path, laws of their results, inversion, re-entrancy, kinds of arrays, names and settings."""

import itertools
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from mixtures import CURVES, MIXTURE, pictures, smooth_path
from PIL import Image, ImageDraw, ImageFont

from sfumato.diffusion import (
    PARAMETERIZATIONS,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    NoiseLevel,
    Pair,
    Path,
    Prediction,
    find_sampler,
    q_sample,
)
from sfumato.diffusion.samplers import LIMITS
from sfumato.errors import BadRequest

EVERY = {name: make() for name, make in SCHEDULES.items()}
EVERY |= {f"{name}, zero SNR": SCHEDULES[name](zero_snr=True) for name in ("linear", "scaled-linear", "cosine")}
STOCHASTIC = [s for s in SAMPLERS.values() if s.stochastic and s.order]
DOWNWARDS = [s for s in SAMPLERS.values() if s.name != "ddim-inversion"]


def fresh(seed=0):
    rng = np.random.default_rng(seed)
    return lambda x: rng.standard_normal(x.shape).astype(x.dtype)


def network(x):
    return x / (1 + x * x)  # operators only: NumPy and torch


def through(parameterization):
    row = PARAMETERIZATIONS[parameterization]

    def denoise(x, level):
        assert level.sigma > 0
        return row(x, level, network(x))

    return denoise


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", EVERY)
def test_no_nan_anywhere(schedule, spacing):
    paths = [SPACINGS[spacing](EVERY[schedule], steps) for steps in (1, 2, 6)]
    for path, sampler, name in itertools.product(paths, SAMPLERS.values(), PARAMETERIZATIONS):
        upwards = sampler.name == "ddim-inversion"
        x = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3) * (1.0 if upwards else path[0].sigma)
        run = sampler(through(name), x, path, fresh())
        if name == "eps" and path[0].alpha == 0:
            with pytest.raises(BadRequest, match="cannot start from pure noise"):
                list(run)
            continue
        steps = list(run)
        assert [step.level for step in steps] == (path[-2::-1] if upwards else path[1:])
        for step in steps:
            assert step.x.shape == step.preview.shape == x.shape
            assert step.x.dtype == step.preview.dtype == np.float32
            assert np.isfinite(step.x).all(), (sampler.name, name)
            assert np.isfinite(step.preview).all(), (sampler.name, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda s: s.name)
@pytest.mark.parametrize("schedule", ["linear", "exploding", "flow"])
def test_tensors_and_arrays_agree(schedule, sampler, dtype):
    path = SPACINGS["karras"](EVERY[schedule], 8)
    x = np.linspace(-2, 2, 24).reshape(2, 3, 2, 2) * path[0].sigma
    draws = list(np.random.default_rng(0).standard_normal((20, *x.shape)))
    for_arrays, for_tensors = iter(draws), iter(draws)
    arrays = sampler(through("v"), x, path, lambda _: next(for_arrays))
    tensors = sampler(through("v"), torch.tensor(x, dtype=dtype), path, lambda y: y.new_tensor(next(for_tensors)))
    for a, b in zip(arrays, tensors, strict=True):
        assert b.x.dtype == b.preview.dtype == dtype
        scale = max(1.0, float(np.abs(a.x).max()))
        assert np.abs(a.x - b.x.double().numpy()).max() < (1e-11 if dtype == torch.float64 else 2e-5) * scale


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda s: s.name)
def test_two_interleaved_runs_equal_two_in_turn(sampler):
    def run(seed, spacing):
        path = SPACINGS[spacing](EVERY["linear"], 7)
        x = np.random.default_rng(seed + 10).standard_normal((2, 3))
        return sampler(through("v"), x, path, fresh(seed))

    want = [[step.x for step in run(1, "karras")], [step.x for step in run(2, "trailing")]]
    both = zip(run(1, "karras"), run(2, "trailing"), strict=True)
    for i, steps in enumerate(both):
        for k, step in enumerate(steps):
            assert np.array_equal(step.x, want[k][i])


@pytest.mark.parametrize("schedule", ["linear", "exploding", "flow", "linear, zero SNR"])
@pytest.mark.parametrize("sampler", STOCHASTIC, ids=lambda s: s.name)
def test_law_of_the_result(sampler, schedule):
    """Mean and covariance of 4000 results against the mixture's, from pure noise to σ = 0."""
    path = SPACINGS["karras"](EVERY[schedule], 160 if sampler.order == 1 else 60)
    n, noise = 4000, fresh(3)
    x = path[0].sigma * noise(np.empty((n, 2)))
    if path[0].alpha > 0:
        x = x + path[0].alpha * MIXTURE.draw(n, np.random.default_rng(4))
    *_, last = sampler(MIXTURE, x, path, noise)
    want = MIXTURE.covariance()
    assert np.abs(last.x.mean(0) - MIXTURE.mean()).max() < 4 * math.sqrt(want.max() / n)
    assert np.abs(np.cov(last.x.T) - want).max() < 0.08  # about 2.5 standard errors of an entry


def test_churn_keeps_the_law():
    path = SPACINGS["karras"](EVERY["exploding"], 40)
    n, noise = 4000, fresh(5)
    x = MIXTURE.draw(n, np.random.default_rng(6)) + path[0].sigma * noise(np.empty((n, 2)))
    for settings in ({"s_churn": 20.0}, {"s_churn": 10.0, "s_tmin": 0.05, "s_tmax": 5.0}):
        calls = []
        *_, last = SAMPLERS["heun"](MIXTURE, x, path, lambda y, c=calls: c.append(1) or noise(y), **settings)
        assert len(calls) == sum(settings.get("s_tmin", 0) <= p.sigma <= settings.get("s_tmax", 99) for p in path[:-1])
        assert np.abs(np.cov(last.x.T) - MIXTURE.covariance()).max() < 0.1


def test_churn_is_for_levels_from_s_tmin_to_s_tmax_both_included():
    """Of σ/α, in coordinates that change from level to level; all numbers are exact in binary."""
    path = [NoiseLevel(r, a, a * r) for r, a in [(8, 0.125), (4, 0.25), (2, 0.5), (1, 2.0), (0.5, 1.0)]]
    path.append(NoiseLevel(0.0, 1.0, 0.0))
    for low, high, churned in [(1.0, 4.0, [4, 2, 1]), (1.01, 3.99, [2]), (0.0, 0.5, [0.5]), (8.0, math.inf, [8])]:
        at, noisy = [None], []

        def noise(x, at=at, noisy=noisy):
            noisy.append(at[0])
            return np.zeros_like(x)

        for p, q in itertools.pairwise(path):
            at[0] = p.t
            list(SAMPLERS["heun"](MIXTURE, np.ones((1, 2)), [p, q], noise, s_churn=1.0, s_tmin=low, s_tmax=high))
        assert noisy == churned


def test_churn_never_leaves_the_schedule():
    for name in ("exploding", "flow", "linear"):
        path = SPACINGS["karras"](EVERY[name], 6)
        seen = []

        def denoise(x, level, seen=seen):
            seen.append(level)
            return through("v")(x, level)

        list(SAMPLERS["heun"](denoise, np.ones((1, 2)), path, fresh(), s_churn=50.0))
        assert min(level.log_snr for level in seen) >= path[0].log_snr - 1e-9
        assert seen[2].log_snr < path[1].log_snr  # but it did lift the second step


def test_churn_lifts_each_step_by_its_share():
    """EDM, algorithm 2, line 5: γ = S_churn/N, of N steps."""
    path, seen = SPACINGS["karras"](EVERY["exploding"], 6), []
    list(SAMPLERS["heun"](lambda x, p: seen.append(p) or MIXTURE(x, p), np.ones((1, 2)), path, fresh(), s_churn=0.6))
    assert seen[2].sigma == pytest.approx(path[1].sigma * (1 + 0.6 / 6), rel=1e-9)


@pytest.mark.parametrize("curve", CURVES)
def test_churn_adds_what_the_lift_needs(curve):
    """EDM, algorithm 2, lines 5 and 6, for x/α and σ/α whatever the coordinates."""
    path, seen = smooth_path(curve, 4), []
    x, z = np.array([[0.3, -0.7]]), np.array([[1.0, -2.0]])
    run = SAMPLERS["heun"](
        lambda x, p: seen.append((x, p)) or MIXTURE(x, p), x, path, lambda _: z, s_churn=0.4, s_noise=1.5
    )
    next(run)
    lifted, level = seen[0]
    low, high = path[0].sigma / path[0].alpha, level.sigma / level.alpha
    assert high == pytest.approx(1.1 * low)
    np.testing.assert_allclose(
        lifted / level.alpha, x / path[0].alpha + 1.5 * math.sqrt(high**2 - low**2) * z, rtol=1e-9
    )


def test_ddim_without_eta_draws_no_noise_and_ddpm_does():
    def never(x):
        raise AssertionError("drew noise")

    path = SPACINGS["trailing"](EVERY["cosine"], 5)
    for sampler in DOWNWARDS:
        run = sampler(through("v"), np.ones((1, 2)), path, never)
        if sampler.stochastic:
            with pytest.raises(AssertionError, match="drew noise"):
                list(run)
        else:
            list(run)


def test_calls_of_the_denoiser_are_as_stated():
    path = SPACINGS["karras"](EVERY["flow"], 12)
    for sampler in SAMPLERS.values():
        calls = []
        list(
            sampler(lambda x, level, c=calls: c.append(level) or through("v")(x, level), np.ones((1, 2)), path, fresh())
        )
        assert sampler.count(path) == len(calls), sampler.name
        assert abs(len(calls) - sampler.calls * 12) <= 2, sampler.name  # but for the ends
        assert all(level.sigma > 0 for level in calls)
    assert SAMPLERS["ddim-inversion"].count(path, refine=2) == 12 * 3 - 1


def glyphs():
    """Ten real pictures: the digits as a font draws them, (10, 1, 12, 12) in [−1, 1]."""
    pages = []
    for digit in "0123456789":
        page = Image.new("L", (12, 12))
        ImageDraw.Draw(page).text((3, 0), digit, font=ImageFont.load_default(size=11), fill=255)
        pages.append(np.asarray(page, dtype=np.float64) / 127.5 - 1)
    return np.stack(pages)[:, None]


@pytest.mark.parametrize("schedule", ["scaled-linear, zero SNR", "exploding", "flow"])
@pytest.mark.parametrize("sampler", DOWNWARDS, ids=lambda s: s.name)
def test_ideal_denoiser_of_real_pictures_ends_at_the_pictures(sampler, schedule):
    data = glyphs()
    assert len(np.unique(data, axis=0)) == 10
    path = SPACINGS["karras"](EVERY[schedule], 50)
    x = path[0].sigma * np.random.default_rng(0).standard_normal((60, 1, 12, 12))
    *_, last = sampler(pictures(data), x, path, fresh(1))
    distance = np.abs(last.x[:, None] - data[None]).max((2, 3, 4))  # (60, 10)
    assert distance.min(1).max() < 0.02
    if sampler.order:
        assert len(set(distance.argmin(1))) >= 8  # of 60 draws from 10


@pytest.mark.parametrize("schedule", ["linear", "cosine, zero SNR", "exploding", "flow"])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_ddim_makes_an_inverted_picture_again(schedule, spacing):
    path = SPACINGS[spacing](EVERY[schedule], 20)
    picture = MIXTURE.draw(16, np.random.default_rng(0))
    hard = (schedule, spacing) == ("exploding", "trailing")  # a first step from σ = 0 to 4, where little tells x0
    *_, top = SAMPLERS["ddim-inversion"](MIXTURE, picture, path, fresh(), refine=1000 if hard else 200)
    assert top.level == path[0]
    *_, back = SAMPLERS["ddim"](MIXTURE, top.x, path, fresh())
    assert np.abs(back.x - picture).max() < 1e-4
    low, high = path[-3], path[-2]
    [explicit] = SAMPLERS["ddim-inversion"](MIXTURE, picture, [high, low], fresh(), refine=0)
    np.testing.assert_array_equal(explicit.x, MIXTURE(picture, low).at(high))
    [first] = SAMPLERS["ddim-inversion"](MIXTURE, picture, path[-2:], fresh(), refine=0)  # no network knows σ = 0
    np.testing.assert_array_equal(first.x, path[-2].alpha * picture)
    *_, top = SAMPLERS["ddim-inversion"](MIXTURE, picture, path, fresh(), refine=1)
    *_, rough = SAMPLERS["ddim"](MIXTURE, top.x, path, fresh())
    assert np.abs(rough.x - picture).max() > 10 * np.abs(back.x - picture).max()


@pytest.mark.parametrize("curve", ["linear", "exploding", "flow"])
def test_forward_then_backward_returns(curve):
    """Up the ODE and down again by a second-order sampler: x returns, and the top has the noisy data's spread."""
    schedule = EVERY[curve]
    levels = [schedule.at_log_snr(float(s)) for s in np.linspace(-4, 4, 161)]
    x = q_sample(MIXTURE.draw(400, np.random.default_rng(0)), fresh(1)(np.empty((400, 2))), levels[-1])
    *_, up = SAMPLERS["heun"](MIXTURE, x, Path(levels[::-1]), fresh())
    *_, down = SAMPLERS["heun"](MIXTURE, up.x, Path(levels), fresh())
    assert np.abs(down.x - x).max() < 2e-3
    want = levels[0].alpha ** 2 * MIXTURE.covariance() + levels[0].sigma ** 2 * np.eye(2)
    assert np.abs(np.cov(up.x.T) - want).max() < 0.2 * want.max()


def test_the_same_loop_is_the_same_function():
    assert SAMPLERS["euler"].run is SAMPLERS["ddim"].run is SAMPLERS["flow-euler"].run is SAMPLERS["dpmpp-1"].run
    assert SAMPLERS["heun"].run is SAMPLERS["flow-heun"].run
    path = SPACINGS["karras"](EVERY["linear"], 6)
    x = np.ones((1, 3))
    for a, b, settings in [
        ("ddim", "ddpm", {"eta": 1.0}),
        ("dpmpp-2m", "dpmpp-2m-sde", {"eta": 1.0}),
        ("dpmpp-2s", "dpmpp-2s-ancestral", {"eta": 1.0}),
    ]:
        ours = [s.x for s in SAMPLERS[a](through("v"), x, path, fresh(), **settings)]
        theirs = [s.x for s in SAMPLERS[b](through("v"), x, path, fresh())]
        assert np.array_equal(ours, theirs)


def test_multistep_starts_with_first_order_steps_at_pure_noise():
    """From α = 0 the second step of 2M has weight h/∞ = 0, so it is DDIM's."""
    path = SPACINGS["trailing"](EVERY["flow"], 6)
    assert path[0].alpha == 0
    ours = list(SAMPLERS["dpmpp-2m"](through("flow"), np.ones((1, 3)), path, fresh()))
    ddim = list(SAMPLERS["ddim"](through("flow"), np.ones((1, 3)), path, fresh()))
    np.testing.assert_allclose([s.x for s in ours[:2]], [s.x for s in ddim[:2]], rtol=1e-12)
    assert np.abs(ours[2].x - ddim[2].x).max() > 1e-4


def test_every_setting_has_limits():
    assert {key for sampler in SAMPLERS.values() for key in sampler.settings} == LIMITS.keys()
    assert SAMPLERS["ddpm"].settings == {"eta": 1.0}
    assert SAMPLERS["unipc"].settings == {"order": 2}


@pytest.mark.parametrize(
    "settled",
    [SAMPLERS["ddim"], SPACINGS["karras"], PARAMETERIZATIONS["v"], Pair(MIXTURE, MIXTURE), *EVERY.values()],
    ids=lambda s: type(s).__name__,
)
def test_what_many_runs_share_cannot_be_changed(settled):
    for field in fields(settled):
        with pytest.raises(FrozenInstanceError):
            setattr(settled, field.name, getattr(settled, field.name))


def test_unknown_settings_are_refused_with_the_nearest():
    path = SPACINGS["karras"](EVERY["linear"], 4)
    with pytest.raises(BadRequest, match="did you mean 's_churn'"):
        SAMPLERS["heun"](MIXTURE, np.ones((1, 2)), path, fresh(), churn=1.0)
    with pytest.raises(BadRequest, match="has no setting 'eta'"):
        SAMPLERS["plms"](MIXTURE, np.ones((1, 2)), path, fresh(), eta=0.5)
    for name, bad in [
        ("ddim", {"eta": 1.5}),
        ("ddim", {"eta": "1"}),
        ("ddim", {"eta": math.nan}),
        ("unipc", {"order": 0}),
    ]:
        with pytest.raises(BadRequest, match=next(iter(bad))):
            SAMPLERS[name](MIXTURE, np.ones((1, 2)), path, fresh(), **bad)
    with pytest.raises(BadRequest, match="two noise levels"):
        SAMPLERS["ddim"](MIXTURE, np.ones((1, 2)), path[:1], fresh())


@pytest.mark.parametrize(
    ("name", "key", "good", "bad", "limits"),
    [
        ("ddim", "eta", [0, 1, 0.5], [-0.01, 1.01], "a number from 0 to 1"),
        ("unipc", "order", [1, 2, 3], [0, 4, 2.0], "a whole number from 1 to 3"),
        ("ddim-inversion", "refine", [0, 1000], [-1, 1001, 5.0], "a whole number from 0 to 1000"),
        ("heun", "s_churn", [0, 1, math.inf], [-0.01], "a number from 0 to inf"),
        ("heun", "s_tmin", [0, 1], [-0.01], "a number from 0 to inf"),
        ("heun", "s_tmax", [0, math.inf], [-0.01], "a number from 0 to inf"),
        ("heun", "s_noise", [0, 1.007], [-0.01], "a number from 0 to inf"),
    ],
)
def test_settings_are_taken_up_to_their_limits(name, key, good, bad, limits):
    path = SPACINGS["karras"](EVERY["linear"], 2)
    for value in good:
        assert len(list(SAMPLERS[name](MIXTURE, np.ones((1, 2)), path, fresh(), **{key: value}))) == 2
    for value in bad:
        with pytest.raises(BadRequest, match=f"{key} must be {limits}, not {value}$"):
            SAMPLERS[name](MIXTURE, np.ones((1, 2)), path, fresh(), **{key: value})


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("Euler a", "euler-ancestral"),
        ("DPM++ 2M", "dpmpp-2m"),
        ("dpm++ 2m sde", "dpmpp-2m-sde"),
        ("DPM++ SDE", "dpmpp-sde"),
        ("dpmpp_2m", "dpmpp-2m"),
        ("uni_pc", "unipc"),
        ("UniPC", "unipc"),
        ("PLMS", "plms"),
        ("DPM2 a", "dpm-2-ancestral"),
        ("PNDMScheduler", "plms"),
        ("FlowMatchEulerDiscreteScheduler", "flow-euler"),
    ],
)
def test_names_of_other_programs(alias, name):
    assert find_sampler(alias).name == name


def test_names_are_distinct_and_unknown_ones_get_the_nearest():
    names = [find_sampler(key).name for s in SAMPLERS.values() for key in (s.name, *s.aliases)]
    assert names == [s.name for s in SAMPLERS.values() for _ in (s.name, *s.aliases)]
    with pytest.raises(BadRequest, match="did you mean 'dpmpp-2m'"):
        find_sampler("dpmp-2m")


def test_levels_may_be_tensors_of_a_batch():
    """Two requests with their own levels in one batch equal each alone."""
    one, two = SPACINGS["trailing"](EVERY["cosine"], 4), SPACINGS["karras"](EVERY["cosine"], 4)
    joint = [
        NoiseLevel(*(torch.tensor([[a], [b]], dtype=torch.float64) for a, b in zip(p, q, strict=True)))
        for p, q in zip(one, two, strict=True)
    ]
    x = torch.ones(2, 3, dtype=torch.float64)
    for settings in ({}, {"eta": 1.0}):
        noise = lambda y: torch.ones_like(y)  # noqa: E731
        *_, both = SAMPLERS["ddim"](
            lambda y, level: PARAMETERIZATIONS["v"](y, level, network(y)), x, joint, noise, **settings
        )
        for i, path in enumerate((one, two)):
            *_, alone = SAMPLERS["ddim"](through("v"), x[i : i + 1], path, noise, **settings)
            assert torch.allclose(both.x[i], alone.x[0], atol=1e-12)


def test_previews_are_the_denoiser_s_pictures():
    path = SPACINGS["karras"](EVERY["linear"], 5)
    picture = Prediction(np.ones((1, 2)), np.zeros((1, 2)))
    for sampler in SAMPLERS.values():
        steps = list(
            sampler(lambda x, level: Prediction.from_x0(x, level, picture.x0), np.zeros((1, 2)), path, fresh())
        )
        assert all((step.preview == 1).all() for step in steps[sampler.name == "ddim-inversion" :])  # it starts at x
        if sampler in DOWNWARDS:
            assert steps[-1].x == pytest.approx(np.ones((1, 2)))


@pytest.mark.parametrize("curve", CURVES)
def test_one_step_to_the_end_is_the_denoiser_s_picture(curve):
    path = Path([smooth_path(curve, 1)[0], CURVES[curve].clean], CURVES[curve])
    x = np.array([[0.3, -0.7], [2.0, 1.0]])
    for sampler in DOWNWARDS:
        [step] = sampler(MIXTURE, x, path, fresh())
        np.testing.assert_allclose(step.x, MIXTURE(x, path[0]).x0, atol=1e-12, err_msg=sampler.name)
