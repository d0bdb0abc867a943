"""Convolutions in strips of rows: the numbers of the layer at once, whatever it is, in the memory of a strip."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato.networks import blocks, statistics, strips
from sfumato.networks.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.networks.blocks import ProjectedFeedForward
from sfumato.networks.strips import convolve


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time, and how many convolutions ran."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.convolutions = 0, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.convolutions += func is torch.ops.aten.convolution.default
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            if storage.data_ptr() in self.known | given or not storage.nbytes():
                continue
            self.known.add(storage.data_ptr())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return result

    def _freed(self, where: int, size: int) -> None:
        self.known.discard(where)
        self.now -= size


@pytest.mark.parametrize("seed", range(40))
def test_a_layer_in_strips_is_the_layer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any kernel, stride, padding, enlargement, with a norm or without, onto something or over its own input."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    groups = rng.choice([1, 2, 4])
    channels, out = (groups * rng.randint(1, 3) for _ in range(2))
    kernel, stride, up = rng.choice([1, 3, 5]), rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2).double()
    norm = rng.choice([None, nn.GroupNorm(groups, channels).double()])
    if norm is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    edges: Any = rng.choice([None, (0, 1, 2, 1)]) if kernel > 1 else None
    x = 3 + torch.randn(rng.randint(1, 2), channels, rng.randint(8, 40), rng.randint(5, 20), dtype=torch.float64)
    with torch.no_grad():
        whole = convolve(x, conv, norm, up=up, edges=edges)
        base = torch.randn_like(whole)
        monkeypatch.setattr(strips, "STRIP", x[0].numel() // rng.randint(2, 6))
        with Live() as live:
            parts = convolve(x, conv, norm, up=up, edges=edges)
        assert live.convolutions > 1
        onto = convolve(x, conv, norm, up=up, edges=edges, onto=base.clone())
        over = convolve(x.clone(), conv, norm, up=up, edges=edges, over=True)
    torch.testing.assert_close(parts, whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(onto, base + whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(over, whole, atol=1e-11, rtol=0)


def test_statistics_hold_for_numbers_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean a thousand times the deviation, which a sum of squares would lose in float32."""
    torch.manual_seed(0)
    norm, conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
    x = 1000 + torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        exact = conv.double()(nn.functional.silu(norm.double()(x.double())))
        monkeypatch.setattr(strips, "STRIP", 4096)
        monkeypatch.setattr(statistics, "AT_ONCE", 4096)
        got = convolve(x, conv.float(), norm.float())
    assert (got - exact).abs().max() < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_an_autoencoder_in_strips_is_the_autoencoder(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group norms and attention see the whole picture, so there is no seam: both ways are equal to rounding."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    widths = tuple(4 * rng.randint(1, 4) for _ in range(rng.randint(2, 4)))
    config = AutoencoderConfig(widths=widths, blocks=rng.randint(1, 2), groups=4, latent_channels=rng.choice([4, 16]))
    vae = Autoencoder(config).eval()
    x = torch.randn(1, config.latent_channels, rng.randint(9, 17), rng.randint(9, 17))
    pictures = torch.randn(1, 3, x.shape[-2] * config.factor, x.shape[-1] * config.factor)
    with torch.inference_mode():
        decoded, encoded = vae.decode(x), vae.encode(pictures)
        monkeypatch.setattr(strips, "STRIP", 500)
        torch.testing.assert_close(vae.decode(x), decoded, atol=1e-5 * float(decoded.abs().max()), rtol=0)
        torch.testing.assert_close(vae.encode(pictures), encoded, atol=1e-5 * float(encoded.abs().max()), rtol=0)


def test_memory_is_for_a_layers_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig(widths=(8, 16), blocks=1, groups=4, middle_attention=False)).eval()
    x = torch.randn(1, 4, 64, 64)
    layer = 4 * 8 * 128 * 128  # bytes of 8 channels of the picture
    with torch.inference_mode():
        with Live() as whole:
            vae.decode(x)
        monkeypatch.setattr(strips, "STRIP", 1 << 12)
        monkeypatch.setattr(statistics, "AT_ONCE", 1 << 12)
        with Live() as live:
            vae.decode(x)
    assert whole.peak > 6 * layer
    assert live.peak < 3.5 * layer, "16 channels in, 8 out, and strips"


def test_what_learns_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP", 16)
    conv, norm = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    before = x.detach().clone()
    convolve(x, conv, norm, over=True).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is not None
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(("b", "n"), [(1, 50), (3, 50), (9, 5), (2, 16)])
def test_a_feed_forward_of_some_tokens_at_a_time_is_that_of_all(
    b: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ff, x = ProjectedFeedForward(32), torch.randn(b, n, 32)
    with torch.inference_mode():
        with Live() as whole:
            expected = ff(x)
        monkeypatch.setattr(blocks, "STRIP", 0)
        monkeypatch.setattr(blocks, "TOKENS", 16)
        with Live() as live:
            parts = ff(x)
    torch.testing.assert_close(parts, expected, atol=1e-6, rtol=0)
    assert live.peak < parts.nbytes + 17 / (b * n) * whole.peak
