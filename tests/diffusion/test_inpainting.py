"""Inpainting: what is kept stays at q(x_t | known) at every level, what is repainted is the denoiser's alone."""

import numpy as np
import pytest
from mixtures import MIXTURE, smooth_path

from sfumato.diffusion import SAMPLERS, NoiseLevel, Path, q_sample, repaint

KNOWN, EPS = np.random.default_rng(0).standard_normal((2, 6, 2))
MASK = np.array([0.0, 1.0])  # the first number of each picture is kept
LEVEL = NoiseLevel(0.5, 0.6, 0.8)


def test_the_mask_chooses_between_the_denoiser_and_the_truth():
    x = np.random.default_rng(1).standard_normal((6, 2))
    free, kept = MIXTURE(x, LEVEL), repaint(MIXTURE, KNOWN, MASK)(x, LEVEL)
    np.testing.assert_array_equal(kept.x0, np.stack([KNOWN[:, 0], free.x0[:, 1]], 1))
    np.testing.assert_allclose(kept.eps, np.stack([((x - 0.6 * KNOWN) / 0.8)[:, 0], free.eps[:, 1]], 1))
    half = repaint(MIXTURE, KNOWN, 0.25)(x, LEVEL)
    np.testing.assert_allclose(half.x0, 0.25 * free.x0 + 0.75 * KNOWN)
    np.testing.assert_allclose(half.at(LEVEL), x)  # a mix of two splits of x is one


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS.values() if s.name != "ddim-inversion"], ids=lambda s: s.name)
def test_the_kept_part_is_on_its_way_at_every_level_and_exact_at_the_end(sampler):
    path = Path([*smooth_path("vp", 12)[:-1], NoiseLevel(-1.0, 1.0, 0.0)])
    rng = np.random.default_rng(2)
    for step in sampler(
        repaint(MIXTURE, KNOWN, MASK), q_sample(KNOWN, EPS, path[0]), path, lambda x: rng.standard_normal(x.shape)
    ):
        if not sampler.stochastic:
            np.testing.assert_allclose(step.x[:, 0], q_sample(KNOWN, EPS, step.level)[:, 0], atol=1e-9)
    np.testing.assert_allclose(step.x[:, 0], KNOWN[:, 0], atol=1e-12)
    assert np.abs(step.x[:, 1] - KNOWN[:, 1]).max() > 0.1
