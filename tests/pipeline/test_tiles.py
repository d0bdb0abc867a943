"""An autoencoder by tiles: as at once for layers that see nearby, no seam for those that see all, memory for a tile."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadRequest
from sfumato.families.common import Way
from sfumato.families.model import Model
from sfumato.networks.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.tiles import mosaic, places, ramp, tiled

FACTOR = 4


def near_sighted(x: torch.Tensor) -> torch.Tensor:
    """A smooth decoder whose pixels depend on cells at most three away."""
    kernel = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)) - 0.4
    y = F.interpolate(F.conv2d(x, kernel, padding=2), scale_factor=FACTOR, mode="bilinear")
    return torch.tanh(F.avg_pool2d(y, 3, 1, 1))


def latents(h: int, w: int) -> torch.Tensor:
    return torch.randn(1, 4, h, w, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("h", "w"), [(16, 16), (40, 16), (17, 53), (100, 41)])
def test_tiles_give_what_one_piece_gives(h: int, w: int) -> None:
    shapes: list[Any] = []

    def decode(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape[-2:]))
        return near_sighted(x)

    x = latents(h, w)
    torch.testing.assert_close(tiled(decode, x, 40, 1, FACTOR), near_sighted(x), atol=1e-5, rtol=0)
    assert max(max(s) for s in shapes) <= 40, "no more than a tile at once"
    pictures = near_sighted(x)
    encoded = tiled(lambda p: F.avg_pool2d(p, FACTOR), pictures, 12, FACTOR, 1 / FACTOR)
    torch.testing.assert_close(encoded, F.avg_pool2d(pictures, FACTOR), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("length", "side"), itertools.product([1, 8, 9, 31, 64, 100], [8, 13, 64]))
def test_tiles_cover_all_and_fade_into_each_other(length: int, side: int) -> None:
    overlap, cell = max(1, side // 4), 4
    starts = places(length, side, overlap)
    assert starts[0] == 0
    assert all(b - a <= side - overlap for a, b in itertools.pairwise(starts))
    total = torch.zeros(length * cell)
    for start in starts:
        end = min(length, start + side)
        total[start * cell : end * cell] += ramp(start, end, length, overlap, cell)
    assert starts[-1] + side >= length
    assert total.min() >= 1 - 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_what_sees_the_whole_picture_leaves_no_seam(seed: int) -> None:
    """Group norms and attention differ from tile to tile; yet along the tiles' edges the picture is as smooth as at
    other places, where tiles laid side by side jump."""
    torch.manual_seed(seed)
    vae = Autoencoder(AutoencoderConfig(widths=(8, 16), blocks=1, groups=4, latent_channels=4)).eval()
    x = F.interpolate(torch.randn(1, 4, 6, 9), (48, 72), mode="bicubic")
    with torch.inference_mode():
        whole, faded = vae.decode(x), tiled(vae.decode, x, 32, 1, 2)
        beside = torch.cat([vae.decode(part) for part in x.split(24, -1)], -1)

    def jump(picture: torch.Tensor, edges: list[int]) -> float:
        steps = picture.diff(dim=-1).abs().mean((0, 1, 2))
        return float(steps[[2 * e - 1 for e in edges]].mean() / steps.mean())

    starts = places(72, 32, 8)
    edges = [*starts[1:], *(s + 32 for s in starts[:-1])]
    assert jump(beside, [24, 48]) > 2
    assert jump(faded, edges) < 1.3 * max(1.0, jump(whole, edges))
    assert (faded - whole).abs().mean() < 0.3 * whole.std()


@pytest.mark.parametrize("seed", range(2))
def test_group_norms_see_the_whole_picture(seed: int, tiny: Model) -> None:
    """Of a picture whose halves are unlike, and of one that is coarse and fine, both ways through the autoencoder."""
    torch.manual_seed(seed)
    config = AutoencoderConfig(widths=(8, 16), blocks=1, groups=4, latent_channels=4, middle_attention=False)
    vae = Autoencoder(config).eval()
    coarse, fine = (F.interpolate(torch.randn(1, 4, h, h), (72, 72), mode="bicubic") for h in (3, 36))
    bare = {"channels": 4, "factor": 2, "multiple": 8, "max_pixels": 1 << 22}
    shared = replace(tiny, decode=Way(vae, "decode"), encode_picture=Way(vae, "encode"), **bare)
    own = replace(tiny, decode=vae.decode, encode_picture=vae.encode, **bare)
    with torch.inference_mode():
        for x in (torch.cat([fine[..., :36], 2 + 0.2 * fine[..., 36:]], -1), coarse + 0.5 * fine):
            whole = vae.decode(x)
            alike, unlike = (Pipeline(model, tile=48)._decode(x) for model in (shared, own))
            assert (alike - whole).abs().mean() < 0.4 * (unlike - whole).abs().mean()
            pictures = whole.clamp(-1, 1)
            latents = vae.encode(pictures)
            alike, unlike = (Pipeline(model, tile=48)._encode(pictures) for model in (shared, own))
            assert (alike - latents).abs().mean() < 0.6 * (unlike - latents).abs().mean()
            assert torch.equal(vae.decode(x), whole), "the autoencoder itself is as it was"


def test_a_mosaic_is_of_pieces_from_everywhere() -> None:
    h, w = 100, 20
    x = torch.arange(h * w).view(1, 1, h, w)
    small = mosaic(x, 32, 1)
    assert small.shape == (1, 1, 32, 20), "an axis that fits is left whole"
    rows = (small[0, 0, :, 0] // w).tolist()
    assert rows[:4] == [0, 1, 2, 3]
    assert rows[-4:] == [96, 97, 98, 99]
    assert rows == sorted(set(rows))
    assert max(b - a for a, b in itertools.pairwise(rows)) <= 12, "no large part is missing"
    assert mosaic(x, 8, 2).shape == (1, 1, 16, 16), "in whole cells"


def test_a_pipeline_tiles_what_is_larger_than_asked_for(tiny: Model) -> None:
    shapes: list[tuple[int, ...]] = []

    def decode(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return near_sighted(torch.cat([x, x[:, :1]], 1))

    latent = replace(tiny, decode=decode, factor=FACTOR, multiple=8, max_pixels=1 << 22)
    x = latents(48, 48)[:, :3]
    whole = Pipeline(latent, tile=0).pixels(x)[0]
    assert shapes.pop() == (1, 3, 48, 48)
    assert np.array_equal(Pipeline(latent).pixels(x)[0], whole), "by default only large ones are tiled"
    shapes.clear()
    pieces = Pipeline(latent, tile=144).pixels(x)[0]
    assert set(shapes) == {(1, 3, 36, 36)}
    assert np.abs(pieces.astype(int) - whole).max() <= 1
    shapes.clear()
    Pipeline(latent).pixels(latents(513, 513)[:, :3])
    assert max(s[-1] for s in shapes) == 1024 // FACTOR
    with pytest.raises(BadRequest, match="tile must be"):
        Pipeline(latent, tile=8)


def test_pictures_are_decoded_one_by_one_in_any_batch(tiny: Model) -> None:
    """The memory of a batch is then that of one, and so are the bits."""
    seen: list[int] = []

    def decode(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return near_sighted(torch.cat([x, x[:, :1]], 1))

    latent = replace(tiny, decode=decode, factor=FACTOR, multiple=8, max_pixels=1 << 22)
    pipe = Pipeline(latent, batch=8)
    x = torch.randn(3, 3, 32, 32)
    together = pipe.pixels(x)
    assert seen == [1, 1, 1]
    assert all(np.array_equal(a, pipe.pixels(b[None])[0]) for a, b in zip(together, x, strict=True))
