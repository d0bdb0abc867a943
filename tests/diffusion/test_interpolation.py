"""Interpolation: the arc's ends, length and angle, and the pictures between two noises."""

import math

import numpy as np
import pytest
import torch
from mixtures import MIXTURE

from sfumato.diffusion import SAMPLERS, SCHEDULES, SPACINGS, lerp, slerp

A, B = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8))


def angle(a, b):
    return math.acos((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def test_ends_and_middle():
    np.testing.assert_allclose(slerp(A, B, 0.0), A, atol=1e-12)
    np.testing.assert_allclose(slerp(A, B, 1.0), B, atol=1e-12)
    np.testing.assert_allclose(slerp(A, B, 0.3), slerp(B, A, 0.7), atol=1e-12)
    assert lerp(1.0, 3.0, 0.25) == 1.5


@pytest.mark.parametrize("w", [0.1, 0.5, 0.8])
def test_each_picture_keeps_length_and_even_angle(w):
    a, b = (x / np.sqrt((x * x).sum((1, 2, 3), keepdims=True)) for x in (A, B))
    c = slerp(a, b, w)
    for i in range(3):
        assert (c[i] ** 2).sum() == pytest.approx(1)
        assert angle(a[i], c[i]) == pytest.approx(w * angle(a[i], b[i]))
        np.testing.assert_allclose(slerp(a[i], b[i], w, batch_dims=0), c[i], atol=1e-12)
    assert (lerp(a, b, w)[0] ** 2).sum() < 0.9  # a straight mix has too little variance


def test_tokens_bend_each_alone():
    a, b = A.reshape(3, 4, 64), B.reshape(3, 4, 64)
    c = slerp(a, b, 0.4, batch_dims=2)
    for i, k in [(0, 0), (2, 3)]:
        np.testing.assert_allclose(c[i, k], slerp(a[i, k], b[i, k], 0.4, batch_dims=0), atol=1e-12)
    assert np.abs(c - slerp(a, b, 0.4)).max() > 1e-3


@pytest.mark.filterwarnings("error")
def test_parallel_opposite_and_empty_vectors_are_mixed_in_a_straight_line():
    for b in (A, 2 * A, -A, np.zeros_like(A)):
        np.testing.assert_allclose(slerp(A, b, 0.25), lerp(A, b, 0.25), rtol=1e-6, atol=1e-6) if b.any() else None
        assert np.isfinite(slerp(A, b, 0.25)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_tensors_agree(dtype):
    got = slerp(torch.tensor(A, dtype=dtype), torch.tensor(B, dtype=dtype), 0.3)
    assert got.dtype == dtype
    tolerance = {torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    np.testing.assert_allclose(got.double().numpy(), slerp(A, B, 0.3), atol=tolerance)
    assert slerp(A.astype(np.float32), B.astype(np.float32), 0.3).dtype == np.float32


def test_pictures_between_two_noises_change_smoothly():
    path = SPACINGS["karras"](SCHEDULES["flow"](), 30)
    a, b = np.random.default_rng(3).standard_normal((2, 1, 2))
    pictures = []
    for w in np.linspace(0, 1, 41):
        *_, last = SAMPLERS["dpmpp-2m"](MIXTURE, slerp(a, b, float(w)), path, None)
        pictures.append(last.x[0])
    steps = np.linalg.norm(np.diff(pictures, axis=0), axis=1)
    assert steps.max() < 0.35 * np.linalg.norm(np.ptp(pictures, axis=0))
