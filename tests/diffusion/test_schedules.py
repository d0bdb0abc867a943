"""Schedules: equality with diffusers', and the way from a time to a level and back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.diffusion import SCHEDULES
from sfumato.diffusion.schedules import Discrete, from_betas
from sfumato.errors import BadRequest

DIFFUSERS = {"linear": "linear", "scaled-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
EVERY = {name: make() for name, make in SCHEDULES.items()}
EVERY |= {f"{name}, zero SNR": SCHEDULES[name](zero_snr=True) for name in DIFFUSERS}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_equals_diffusers(name, zero_snr):
    from diffusers import DDIMScheduler

    ours = (
        SCHEDULES[name](beta_start=1e-4, beta_end=0.02, zero_snr=zero_snr)
        if name != "cosine"
        else SCHEDULES[name](zero_snr=zero_snr)
    )
    theirs = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule=DIFFUSERS[name], rescale_betas_zero_snr=zero_snr
    )
    np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-6)
    level = ours(500)
    assert level.alpha**2 == pytest.approx(float(theirs.alphas_cumprod[500]), abs=2e-6)


def test_defaults_are_the_published_ones():
    assert SCHEDULES["linear"]().alpha_bar[0] == pytest.approx(1 - 1e-4)
    assert SCHEDULES["linear"]().alpha_bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert all(SCHEDULES[name]()(999).alpha > 0 for name in DIFFUSERS)  # zero SNR is asked for
    assert from_betas(np.linspace(1e-4, 0.02, 10))(9).alpha > 0
    scaled = SCHEDULES["scaled-linear"](steps=1000)
    assert scaled(999).sigma / scaled(999).alpha == pytest.approx(14.6146, rel=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_signal_to_noise_rises_towards_the_picture(name):
    schedule = EVERY[name]
    times = np.linspace(schedule.t_max, schedule.t_min, 3001)
    log_snr = np.array([schedule(float(t)).log_snr for t in times])
    assert (np.diff(log_snr) > 0).all()
    assert schedule.clean.sigma == 0
    assert schedule.clean.alpha == 1
    assert schedule.clean.t < schedule.t_min


@pytest.mark.parametrize("name", EVERY)
@given(u=st.floats(0, 1))
def test_log_snr_leads_back_to_its_level(name, u):
    schedule = EVERY[name]
    t = schedule.t_min + u * (schedule.t_max - schedule.t_min)
    level = schedule(t)
    back = schedule.at_log_snr(level.log_snr)
    # Near pure noise a small step of time is a large one of log-SNR, so compare the level itself.
    assert back.alpha == pytest.approx(level.alpha, abs=1e-7)
    assert back.sigma == pytest.approx(level.sigma, rel=1e-7)


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name].steps])
def test_log_snr_leads_back_to_its_time_in_the_first_and_last_intervals(name):
    for t in (0.0, 0.25, 1.0, 996.75, 997.0, 997.25, 997.75, 998.0, 998.25, 998.75):
        assert EVERY[name].at_log_snr(EVERY[name](t).log_snr).t == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_levels_beyond_the_range_are_held_within(name):
    schedule = EVERY[name]
    assert schedule.at_log_snr(-math.inf) == pytest.approx(schedule(schedule.t_max), abs=1e-12)
    assert schedule.at_log_snr(math.inf) == pytest.approx(schedule(schedule.t_min), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine"])
def test_variance_is_preserved_and_zero_snr_is_pure_noise(name):
    for zero in (False, True):
        schedule = SCHEDULES[name](zero_snr=zero)
        for t in (0, 0.5, 500, 998.5, 999):
            assert math.hypot(*schedule(t)[1:]) == pytest.approx(1, abs=1e-12)
    assert schedule(999)[1:] == (0.0, 1.0)
    assert schedule(0).alpha == pytest.approx(SCHEDULES[name]()(0).alpha)  # the clean end stays


def test_float_array_and_tensor_agree_and_keep_their_kind():
    for schedule in EVERY.values():
        times = np.linspace(schedule.t_min, schedule.t_max, 7)
        array, tensor = schedule(times), schedule(torch.tensor(times, dtype=torch.float32).reshape(7, 1, 1, 1))
        assert tensor.alpha.shape == (7, 1, 1, 1)
        assert tensor.sigma.dtype == torch.float32
        for i, t in enumerate(times):
            level = schedule(float(t))
            assert type(level.alpha) is float
            assert (array.alpha[i], array.sigma[i]) == (level.alpha, level.sigma)
            assert float(tensor.sigma[i]) == pytest.approx(level.sigma, abs=2e-4 * level.sigma)
    assert SCHEDULES["linear"]()(torch.tensor([3])).alpha.dtype == torch.float32


@pytest.mark.parametrize(
    "alpha_bar",
    [[0.9], [0.5, 0.9], [0.9, 0.5, 0.6], [1.0, 0.5], [0.9, -0.1], [0.9, 0.5, -0.1], [0.9, 0.9], [0.9, math.nan]],
)
def test_impossible_schedules_are_refused(alpha_bar):
    with pytest.raises(BadRequest):
        Discrete(np.array(alpha_bar))


def test_the_least_schedule_has_two_steps():
    least = Discrete(np.array([0.9, 0.0]))
    assert (least.steps, least.t_max) == (2, 1.0)
    assert least(1.0)[1:] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "settled"),
    [("flow", "steps"), ("flow", "clean"), ("exploding", "steps"), ("exploding", "clean"), ("discrete", "t_min"),
     ("discrete", "clean")],
)  # fmt: skip
def test_what_follows_from_the_curve_is_no_setting(make, settled):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{settled}'"):
        SCHEDULES[make](**{settled: 5}) if make in SCHEDULES else Discrete(np.array([0.9, 0.5]), **{settled: 5})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flow", {"t_min": 0.0, "t_max": 1.0}), ("flow", {"t_min": 0.1, "t_max": 1.5}),
        ("flow", {"t_min": 0.5, "t_max": 0.5}), ("flow", {"t_min": 0.7, "t_max": 0.3}),
        ("exploding", {"sigma_min": 100.0, "sigma_max": 80.0}), ("exploding", {"sigma_min": 0.0, "sigma_max": 80.0}),
        ("exploding", {"sigma_min": 5.0, "sigma_max": 5.0}),
    ],
)  # fmt: skip
def test_impossible_ranges_are_refused(name, settings):
    low, high = settings.values()
    with pytest.raises(BadRequest, match=f"0 < .*_min < .*_max.* not {low} and {high}$"):
        SCHEDULES[name](**settings)


@pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine"])
def test_below_the_first_index_it_is_clean_and_zero_snr_is_reached_by_an_even_turn(name):
    for zero in (False, True):
        schedule = SCHEDULES[name](zero_snr=zero)
        assert schedule.clean == schedule(-1.0)
        assert schedule(-1e-6)[1:] == schedule.clean[1:] == (1.0, 0.0)
        assert schedule.clean.t == -1  # as far before the first index as indices are apart
    first, middle, last = (math.atan2(*schedule(t)[:0:-1]) for t in (998.0, 998.25, 999.0))
    assert last == math.pi / 2
    assert middle == pytest.approx(0.75 * first + 0.25 * last)
