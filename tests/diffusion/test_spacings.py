"""Spacings: equality with diffusers' timesteps and sigmas, and sound paths on every schedule."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.diffusion import SCHEDULES, SPACINGS, NoiseLevel, Path, find_spacing
from sfumato.errors import BadRequest

EVERY = {name: make() for name, make in SCHEDULES.items()}
EVERY |= {f"{name}, zero SNR": SCHEDULES[name](zero_snr=True) for name in ("linear", "scaled-linear", "cosine")}
SD = SCHEDULES["scaled-linear"]()


def times(path):
    return [level.t for level in path[:-1]]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", EVERY)
@given(steps=st.one_of(st.integers(1, 60), st.sampled_from([250, 333, 999, 1000])))
@settings(max_examples=12, deadline=None)
def test_every_path_falls_strictly_to_the_picture(spacing, schedule, steps):
    schedule = EVERY[schedule]
    path = SPACINGS[spacing](schedule, steps)
    assert len(path) == steps + 1
    assert path[-1] == schedule.clean
    assert path.schedule is schedule
    assert all(p.log_snr < q.log_snr for p, q in pairwise(path))
    assert all(type(number) is float for level in path for number in level)
    if spacing != "leading":
        assert path[0] == schedule(schedule.t_max)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_times_equal_diffusers(spacing, offset):
    from diffusers import DDIMScheduler

    for steps in (1, 2, 3, 7, 10, 20, 28, 30, 50, 64, 99, 300, 999):
        if (spacing, steps) == ("linspace", 1):
            continue  # one step from t = 0: theirs starts at the clean end
        theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        theirs.set_timesteps(steps)
        extra = {"offset": offset} if spacing == "leading" else {}
        assert times(SPACINGS[spacing](SD, steps, **extra)) == theirs.timesteps.tolist(), steps


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_ratios_equal_diffusers(spacing):
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **{f"use_{spacing}_sigmas": True}
    )
    for steps in (2, 5, 20, 50):
        theirs.set_timesteps(steps)
        path = SPACINGS[spacing](SD, steps)
        np.testing.assert_allclose([q.sigma / q.alpha for q in path], theirs.sigmas.numpy(), rtol=2e-5)
        np.testing.assert_allclose(times(path), theirs.timesteps.numpy(), atol=0.02)


def test_karras_is_edms_formula():
    schedule = SCHEDULES["exploding"]()
    rho, n = 7, 18
    want = [(80 ** (1 / rho) + k / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for k in range(n)]
    assert [q.sigma for q in SPACINGS["karras"](schedule, n)] == pytest.approx([*want, 0.0], rel=1e-9)


def test_pure_noise_is_taken_for_edms_greatest_sigma():
    schedule = EVERY["scaled-linear, zero SNR"]
    low = schedule(0.0).sigma / schedule(0.0).alpha
    evenly = (np.linspace(80 ** (1 / 7), low ** (1 / 7), 6) ** 7, np.geomspace(80, low, 6))
    for spacing, want in zip(("karras", "exponential"), evenly, strict=True):
        path = SPACINGS[spacing](schedule, 6)
        assert path[0] == schedule(999.0)
        assert path[0].alpha == 0
        assert [q.sigma / q.alpha for q in path[1:-1]] == pytest.approx(want[1:], rel=1e-6)


def test_shift_is_the_formula_of_sd3():
    flow = SCHEDULES["flow"]()
    for s in (3.0, 1.0, math.e**1.15):
        tau = np.arange(8, 0, -1) / 8
        assert times(SPACINGS["shift"](flow, 8, s=s)) == pytest.approx(s * tau / (1 + (s - 1) * tau))
    for schedule in (flow, SD):
        assert times(SPACINGS["shift"](schedule, 5, s=1.0)) == pytest.approx(times(SPACINGS["trailing"](schedule, 5)))


def test_flow_trailing_equals_diffusers_flow_match():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    assert [q.sigma for q in SPACINGS["shift"](SCHEDULES["flow"](), 12)] == pytest.approx(
        theirs.sigmas.tolist(), abs=1e-6
    )


def test_beta_gives_quantiles():
    from scipy.stats import beta

    tau = np.arange(10, 0, -1) / 10
    assert times(SPACINGS["beta"](SD, 10)) == pytest.approx(999 * beta.ppf(tau, 0.6, 0.6))
    assert times(SPACINGS["beta"](SD, 10, alpha=1, beta=1)) == pytest.approx(999 * tau)


@pytest.mark.parametrize("steps", [0, -3, 1.5, "20", True, None, 1001])
def test_impossible_steps_are_refused(steps):
    for spacing in SPACINGS.values():
        with pytest.raises(BadRequest, match="steps"):
            spacing(SD, steps)


def test_settings_are_never_ignored():
    with pytest.raises(BadRequest, match="did you mean 'rho'"):
        SPACINGS["karras"](SD, 10, roh=5)
    with pytest.raises(BadRequest, match="it takes none"):
        SPACINGS["trailing"](SD, 10, offset=1)
    with pytest.raises(BadRequest, match="it takes alpha, beta"):
        SPACINGS["beta"](SD, 10, gamma=1)
    for name, bad in [
        ("karras", {"rho": 0}),
        ("shift", {"s": -1.0}),
        ("beta", {"alpha": math.nan}),
        ("shift", {"s": "3"}),
        ("shift", {"s": math.inf}),
    ]:
        with pytest.raises(BadRequest, match="positive"):
            SPACINGS[name](SD, 10, **bad)
    for offset in (-1, math.nan, math.inf, "1"):
        with pytest.raises(BadRequest, match="offset must be a number"):
            SPACINGS["leading"](SD, 10, offset=offset)
    assert times(SPACINGS["leading"](SD, 2, offset=0.5)) == [500.5, 0.5]
    with pytest.raises(BadRequest, match="distinct levels"):
        SPACINGS["leading"](SD, 1000, offset=1)  # the last index is 999
    with pytest.raises(BadRequest, match="distinct levels"):
        SPACINGS["shift"](SD, 1000, s=0.01)  # below the first index
    with pytest.raises(BadRequest, match="distinct levels"):
        SPACINGS["shift"](SCHEDULES["flow"](), 8, s=1e18)  # all at pure noise
    with pytest.raises(BadRequest, match=r"distinct levels .* with offset=150; take fewer steps"):
        SPACINGS["leading"](SD, 10, offset=150)  # beyond the noisiest time


def test_names_of_other_programs():
    for alias, name in [
        ("Karras", "karras"),
        ("sgm_uniform", "trailing"),
        ("SGM Uniform", "trailing"),
        ("Normal", "linspace"),
    ]:
        assert find_spacing(alias).name == name
    with pytest.raises(BadRequest, match="did you mean 'karras'"):
        find_spacing("karas")


@pytest.mark.parametrize("name", EVERY)
def test_between_lies_on_the_schedule_and_on_the_plain_list_s_curve(name):
    path = SPACINGS["exponential"](EVERY[name], 8)
    plain = Path(list(path))
    for p, q in list(pairwise(path))[1:-1]:  # finite ends
        want = (p.log_snr + q.log_snr) / 2
        for curve in (path, plain):
            level = curve.between(p, q, want)
            assert level.log_snr == pytest.approx(want)
            assert min(p.t, q.t) < level.t < max(p.t, q.t)
        assert plain.between(p, q, want)[1:] == pytest.approx(path.between(p, q, want)[1:])
        assert path.between(p, q, want) == EVERY[name].at_log_snr(want)  # its time, too


def test_between_levels_of_no_curve_time_and_size_go_evenly_with_log_snr():
    p, q = (
        NoiseLevel(3.0, 1.0, 4.0),
        NoiseLevel(2.0, 2.0, 4.0),
    )  # nearest to VP: √17 and √20, of α 1 and 2, α + σ 5 and 6
    level = Path([p, q]).between(p, q, 0.75 * p.log_snr + 0.25 * q.log_snr)
    assert level.log_snr == pytest.approx(0.75 * p.log_snr + 0.25 * q.log_snr)
    assert level.t == pytest.approx(2.75)
    assert math.hypot(level.alpha, level.sigma) == pytest.approx(0.75 * math.sqrt(17) + 0.25 * math.sqrt(20))


def test_between_below_the_schedule_s_range_follows_its_curve():
    path = SPACINGS["trailing"](SCHEDULES["flow"](t_min=0.3), 10)
    p, q = path[-3], path[-2]
    level = path.between(p, q, (p.log_snr + q.log_snr) / 2)
    assert level.alpha + level.sigma == pytest.approx(1)
    assert p.log_snr < level.log_snr < q.log_snr


def test_a_path_needs_two_levels_and_keeps_its_schedule():
    with pytest.raises(BadRequest):
        Path([NoiseLevel(0.0, 1.0, 0.0)])
    path = SPACINGS["karras"](SD, 10)
    assert path.tail(4).schedule is SD
    assert path.tail(4) == path[4:]
    assert torch.tensor([q.sigma for q in path.tail(9)]).tolist()[-1] == 0


def test_the_last_share_of_a_path_starts_that_far_along_it():
    """Trailing's times on the straight path are the shares themselves, so σ at the start is the share."""
    flow = SCHEDULES["flow"]()
    path = SPACINGS["trailing"](flow, 8)
    for share, steps in [(1.0, 8), (0.75, 6), (0.7, 6), (0.51, 5), (0.5, 4), (0.125, 1), (0.1, 1)]:
        last = path.last(share)
        assert last[0].sigma == pytest.approx(share)
        assert last[1:] == path[-steps:]
        assert last.schedule is flow
    for share in (1e-4, 1e-9):
        assert path.last(share)[0] == flow(flow.t_min)  # no network knows less noise
    low = SPACINGS["trailing"](SCHEDULES["flow"](t_min=0.3), 10)  # whose own last levels lie below the range
    assert low.last(0.15)[0].t == low[-3].t == pytest.approx(0.2)
    assert Path(list(path)).last(0.7) == path[2:]  # no curve to start between two levels on
