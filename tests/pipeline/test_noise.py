"""Noise by a counter: the distribution, independence of seeds and draws, and bits that never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.pipeline.noise import FreshNoise, normal, start

FROZEN = [
    [-2.7457597255706787, -1.6854462623596191, -0.36155080795288086],
    [-1.176225185394287, -0.025201817974448204, 2.063509702682495],
]
FROZEN_HASH = "208fc9e526b2f55d0cba9ce726dff7b1429aa116a5e5a9fb2f0f4f0c103e282b"


def test_the_bits_are_frozen() -> None:
    """Pictures are replayed from their seeds: this must hold for ever, on every machine and NumPy."""
    assert normal(0, 0, (2, 3)).tolist() == FROZEN
    assert hashlib.sha256(normal(123, 4, (3, 32, 32)).tobytes()).hexdigest() == FROZEN_HASH


def test_it_is_standard_normal() -> None:
    z = np.stack([normal(seed, draw, (3, 32, 32)) for seed in range(8) for draw in range(8)])
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    assert stats.kstest(z.ravel(), "norm").pvalue > 0.01
    flat = z.reshape(64, -1)
    correlation = np.corrcoef(flat) - np.eye(64)
    assert np.abs(correlation).max() < 5 / np.sqrt(flat.shape[1])


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 5, 7), (4, 8, 8)])
def test_any_shape_is_filled(shape: tuple[int, ...]) -> None:
    assert normal(2**53 - 1, 0, shape).shape == shape


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    assert not np.array_equal(normal(1, 0, (9,)), normal(2, 0, (9,)))
    assert not np.array_equal(normal(1, 0, (9,)), normal(1, 1, (9,)))
    together = FreshNoise([5, 6, 7])
    x = np.zeros((3, 2, 4, 4))
    draws = [together(x) for _ in range(3)]
    for i, seed in enumerate([5, 6, 7]):
        alone = FreshNoise([seed])
        for draw in draws:
            assert np.array_equal(alone(x[:1])[0], draw[i])
    assert not np.array_equal(draws[0], start([5, 6, 7], (2, 4, 4)))


def test_fresh_noise_is_of_the_picture_s_kind() -> None:
    z = FreshNoise([1])(np.zeros((1, 2, 2), np.float64))
    assert z.dtype == np.float64
    for dtype in (torch.float32, torch.float64):
        t = FreshNoise([1])(torch.zeros(1, 2, 2, dtype=dtype))
        assert t.dtype == dtype
        np.testing.assert_array_equal(t.numpy(), z)
