"""Noise levels and predictions: the mix, its inverse, and the parameterizations' table."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES, SPACINGS, NoiseLevel, Prediction, q_sample
from sfumato.diffusion.level import q_renoise
from sfumato.diffusion.parameterizations import edm
from sfumato.errors import BadRequest

finite = st.floats(-5, 5)
angles = st.floats(0.01, math.pi / 2 - 0.01)
sizes = st.floats(0.05, 20.0)


@st.composite
def levels(draw):
    angle, size = draw(angles), draw(sizes)
    return NoiseLevel(1.0, size * math.cos(angle), size * math.sin(angle))


def test_import_needs_neither_torch_nor_scipy():
    code = "import sys, sfumato.diffusion; print([m for m in ('torch', 'scipy', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@given(level=levels(), x0=finite, eps=finite)
def test_rows_invert(name, level, x0, eps):
    row = PARAMETERIZATIONS[name]
    x = q_sample(x0, eps, level)
    got = row(x, level, row.target(x0, eps, level))
    assert got.x0 == pytest.approx(x0, abs=1e-8)
    assert got.eps == pytest.approx(eps, abs=1e-8)
    assert got.at(level) == pytest.approx(x, abs=1e-8)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@given(level=levels(), x=finite, out=finite, other=finite)
def test_error_of_out_is_loss_scale_times_error_of_x0(name, level, x, out, other):
    assume(abs(out - other) > 1e-3)
    row = PARAMETERIZATIONS[name]
    difference = row(x, level, out).x0 - row(x, level, other).x0
    assert (out - other) ** 2 == pytest.approx(row.loss_scale(level) * difference**2, rel=1e-6)


def test_published_determinants():
    level = NoiseLevel(0.3, 0.6, 0.5)
    want = {"eps": 0.6, "x0": -0.5, "v": 0.61, "flow": 1.1, "edm": -math.sqrt(0.5**2 + 0.3**2) / 0.5}
    assert {name: row.det(level) for name, row in PARAMETERIZATIONS.items()} == pytest.approx(want)


@pytest.mark.parametrize("schedule", ["flow", "linear", "cosine", "exploding"])
@pytest.mark.parametrize("kind", [float, partial(torch.tensor, dtype=torch.float64)])
def test_noise_is_added_up_to_exactly_the_level(schedule, kind):
    """α_τ·x0 + σ_τ·ε in mean and variance, from any level on the way down, the clean one too."""
    path = [NoiseLevel(*map(kind, map(float, level))) for level in SPACINGS["trailing"](SCHEDULES[schedule](), 9)]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for k, level in list(enumerate(path))[1:]:
        for noisier in path[: k + 1]:
            torch.testing.assert_close(q_renoise(level.alpha * one, zero, level, noisier), noisier.alpha * one)
            old, new = q_renoise(level.sigma * one, zero, level, noisier), q_renoise(zero, one, level, noisier)
            torch.testing.assert_close(old**2 + new**2, noisier.sigma**2 * one)


@given(sigma=st.floats(0.01, 50), x=finite, out=finite)
def test_edm_row_is_the_published_preconditioning(sigma, x, out):
    data = 0.5  # Karras et al., table 1: c_skip, c_out, c_in, c_noise
    level = NoiseLevel(sigma, 1.0, sigma)
    skip, gain = data**2 / (sigma**2 + data**2), 1 / math.sqrt(sigma**2 + data**2)
    row = edm(data)
    assert row(x, level, out).x0 == pytest.approx(skip * x + sigma * data * gain * out, abs=1e-9)
    assert row.gain(level) == pytest.approx(gain)
    assert row.clock(level) == pytest.approx(math.log(sigma) / 4)
    assert row.clock(NoiseLevel(0.0, 0.5, 0.5 * sigma)) == pytest.approx(math.log(sigma) / 4)  # of σ/α


@given(level=levels(), t=st.floats(0, 1000))
def test_all_other_networks_see_x_and_the_time_as_they_are(level, t):
    for name in PARAMETERIZATIONS.keys() - {"edm"}:
        assert PARAMETERIZATIONS[name].gain(level._replace(t=t)) == 1
        assert PARAMETERIZATIONS[name].clock(level._replace(t=t)) == t


def test_eps_and_edm_networks_cannot_start_from_pure_noise():
    noise = NoiseLevel(999.0, 0.0, 1.0)
    with pytest.raises(BadRequest, match="cannot start from pure noise"):
        PARAMETERIZATIONS["eps"](np.ones(2), noise, np.ones(2))
    with pytest.raises(BadRequest, match="cannot start from pure noise"):
        Prediction.from_eps(np.ones(2), noise, np.ones(2))
    with pytest.raises(BadRequest, match="cannot start from pure noise"):
        PARAMETERIZATIONS["edm"].clock(noise)
    with pytest.raises(BadRequest, match="cannot start from pure noise"):
        PARAMETERIZATIONS["edm"].clock(NoiseLevel(999, 0, 1))  # whole numbers are numbers, too
    with pytest.raises(BadRequest, match="sigma = 0"):
        PARAMETERIZATIONS["x0"](np.ones(2), NoiseLevel(-1.0, 1.0, 0.0), np.ones(2))


def test_log_snr_at_both_ends():
    assert NoiseLevel(0.0, 0.0, 1.0).log_snr == -math.inf
    assert NoiseLevel(0.0, 1.0, 0.0).log_snr == math.inf
    assert NoiseLevel(0.0, 0.8, 0.6).log_snr == pytest.approx(2 * math.log(0.8 / 0.6))
    both = NoiseLevel(0.0, np.array([0.0, 0.8]), np.array([1.0, 0.6])).log_snr
    assert both[0] == -math.inf
    assert torch.allclose(
        NoiseLevel(0, torch.tensor([0.0, 0.8]), torch.tensor([1.0, 0.6])).log_snr[1], torch.tensor(both[1]).float()
    )


@given(level=levels(), x=finite, x0=finite, eps=finite)
def test_completing_a_prediction_keeps_to_x(level, x, x0, eps):
    assert Prediction.from_x0(x, level, x0).at(level) == pytest.approx(x, abs=1e-8)
    assert Prediction.from_eps(x, level, eps).at(level) == pytest.approx(x, abs=1e-8)


def test_at_sigma_zero_noise_does_not_count():
    clean = NoiseLevel(-1.0, 1.0, 0.0)
    assert Prediction(np.ones(2), np.full(2, np.nan)).at(clean).tolist() == [1, 1]
    assert Prediction.from_x0(np.ones(2), clean, np.zeros(2)).eps.tolist() == [0, 0]
    for alpha in (0.5, 2.0):
        mixed = Prediction(np.array([3.0, -2.0]), np.full(2, np.nan)).at(NoiseLevel(0.0, alpha, 0.0))
        assert mixed.tolist() == [3 * alpha, -2 * alpha]
    whole = NoiseLevel(0, 1, 0)  # whole numbers are numbers, too
    assert Prediction.from_x0(np.ones(2), whole, np.zeros(2)).at(whole).tolist() == [0, 0]


def test_renewed_noise_keeps_its_variance():
    rng = np.random.default_rng(0)
    old, fresh = rng.standard_normal((2, 200_000))
    for fraction in (0.0, 0.3, 1.0):
        eps = Prediction(old, old).renew(fraction, lambda x: fresh).eps
        assert eps.var() == pytest.approx(1, abs=0.01)
        assert np.corrcoef(eps, old)[0, 1] == pytest.approx(math.sqrt(1 - fraction**2), abs=0.01)


def test_lerp_goes_beyond_its_end():
    a, b = Prediction(1.0, 2.0), Prediction(3.0, 1.0)
    assert a.lerp(b, 0) == a
    assert a.lerp(b, 1) == b
    assert a.lerp(b, 3) == Prediction(7.0, -1.0)


def test_one_batch_may_hold_many_levels():
    alpha, sigma = torch.tensor([1.0, 0.6, 0.0]).reshape(3, 1), torch.tensor([0.1, 0.8, 1.0]).reshape(3, 1)
    x0, eps = torch.randn(2, 3, 4).double()
    x = q_sample(x0, eps, NoiseLevel(0, alpha.double(), sigma.double()))
    for i in range(3):
        assert torch.allclose(x[i], float(alpha[i]) * x0[i] + float(sigma[i]) * eps[i])
    got = PARAMETERIZATIONS["v"](x, NoiseLevel(0, alpha, sigma), alpha * eps - sigma * x0)
    assert torch.allclose(got.x0, x0, atol=1e-5)


@given(level=levels(), other=levels(), x0=finite, eps=finite)
def test_two_points_of_a_line_tell_its_data_and_noise(level, other, x0, eps):
    det = level.alpha * other.sigma - other.alpha * level.sigma
    assume(abs(det) > 1e-3)
    true = Prediction(x0, eps)
    found = Prediction.through(true.at(level), level, true.at(other), other)
    assert found == pytest.approx(true, abs=1e-6)
    clean = NoiseLevel(0.0, 1.0, 0.0)
    assume(level.sigma > 1e-3)
    assert Prediction.through(true.at(level), level, x0, clean) == pytest.approx(true, abs=1e-6)
