"""Captured attention is what the layers computed, and capturing changes no picture."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.families.model import Model
from sfumato.inside.attention import Layer, Recorder, attends, heads_of, maps, watch, weights
from sfumato.inside.path import Frame, trajectory
from sfumato.networks.blocks import Attention, CrossAttention
from sfumato.networks.modulated import JointAttention
from sfumato.networks.stored import twin
from sfumato.networks.worded import WordedAttention
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request
from sfumato.text.spelling import Word

WORDS = "a red apple"


def cells(module: nn.Module, *args: Any) -> torch.Tensor:
    """The layer's output for the cells."""
    out = module(*args)
    return out[0] if isinstance(out, tuple) else out


def rotation(m: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(m, d // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


LAYERS = {
    "native": lambda: (Attention(12, 3, 8), (torch.randn(1, 20, 12), torch.randn(1, 5, 8)), 5),
    "native, masked": lambda: (
        Attention(12, 3, 8),
        (torch.randn(1, 20, 12), torch.randn(1, 5, 8), torch.tensor([[True, True, True, False, False]])),
        5,
    ),
    "worded": lambda: (
        WordedAttention(12, 3, 4, 8),
        (torch.randn(1, 20, 12), torch.randn(1, 5, 8), torch.tensor([[True, True, True, False, False]])),
        5,
    ),
    "stable diffusion": lambda: (CrossAttention(12, 3, 8), (torch.randn(1, 20, 12), torch.randn(1, 5, 8)), 5),
    "sd3": lambda: (
        JointAttention(12, 3, 4, words=True, normalized=True),
        (torch.randn(1, 20, 12), torch.randn(1, 5, 12)),
        5,
    ),
    "flux, two streams": lambda: (
        JointAttention(12, 3, 4, words=True, normalized=True),
        (torch.randn(1, 20, 12), torch.randn(1, 5, 12), rotation(25, 4)),
        5,
    ),
    "flux, one stream": lambda: (
        JointAttention(12, 3, 4, normalized=True, projected=False),
        (torch.randn(1, 25, 12), None, rotation(25, 4)),
        5,
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@torch.inference_mode()
def test_weights_reproduce_the_layers_own_output(kind: str) -> None:
    """With one head at a time, softmax(qkᵀ)·v through the output's projection is what the layer returns."""
    torch.manual_seed(0)
    module, args, columns = LAYERS[kind]()
    expected = cells(module, *args)
    heads = heads_of(module, args, {}, columns)
    assert heads is not None
    v = module.project(*args[:2])[2] if not isinstance(module, CrossAttention) else None
    if isinstance(module, JointAttention):
        v = module.project(*args)[2]
    if v is None:
        v = module.to_v(args[1]).unflatten(-1, (module.heads, -1)).transpose(1, 2)
    parts = []
    for a in range(module.heads):
        one = weights(heads._replace(q=heads.q[:, a : a + 1], k=heads.k[:, a : a + 1]))  # (N, L)
        torch.testing.assert_close(one.sum(-1), torch.ones(len(one)))
        parts.append(one @ v[0, a])
    y = torch.cat(parts, dim=-1)
    if isinstance(module, WordedAttention):
        nn.init.normal_(module.to_out.weight)
        expected = module(*args)
    if isinstance(module, (Attention, WordedAttention)):
        y = module.to_out(y)
    elif isinstance(module, CrossAttention) or module.projected:
        y = module.to_out[0](y)
    n = len(y)
    torch.testing.assert_close(y, expected[0, -n:], rtol=1e-5, atol=1e-6)


def test_self_attention_is_not_taken_for_words() -> None:
    x = torch.randn(1, 20, 12)
    for module in (Attention(12, 3), CrossAttention(12, 3), JointAttention(12, 3, 4), WordedAttention(12, 3, 4)):
        assert attends(module)
        assert heads_of(module, (x,), {}, 5) is None


def test_the_share_of_joint_attention_that_went_to_words() -> None:
    """Keys alike share attention evenly: 5 words of 25 keys get a fifth, and each a fifth of that."""
    module = JointAttention(12, 3, 4, words=True)
    for p in module.parameters():
        nn.init.zeros_(p)
    heads = heads_of(module, (torch.randn(1, 20, 12), torch.randn(1, 5, 12)), {}, 5)
    assert heads is not None
    recorder = Recorder()
    recorder.begin(torch.zeros(1, 3, 4, 5), None)
    recorder.add(heads)
    call = recorder.take()
    assert call is not None
    (layer,) = call.layers
    assert layer.share == pytest.approx(0.2)
    torch.testing.assert_close(layer.columns, torch.full((20, 5), 0.2))
    assert recorder.take() is None


def test_a_twin_shares_weights_and_no_hooks(tiny: Model) -> None:
    other = twin(tiny.network)
    assert all(a is b for a, b in zip(tiny.network.parameters(), other.parameters(), strict=True))
    assert not {id(m) for m in tiny.network.modules()} & {id(m) for m in other.modules()}
    watch(tiny)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.network.modules())


def test_maps_of_each_step_sum_to_one_over_words_and_the_picture_stays_the_same(tiny: Model) -> None:
    pipe, request = Pipeline(tiny), Request(WORDS, seed=3, steps=3, negative="blue")
    (plain,) = [e for e in pipe.run(request) if isinstance(e, Picture)]
    *frames, last, picture = list(trajectory(pipe, request))
    assert isinstance(picture, Picture)
    assert np.array_equal(picture.pixels, plain.pixels), "bitwise the same with capture on"
    assert isinstance(last, Frame)
    assert last.predicted is None
    assert np.array_equal(last.noisy, plain.pixels), "the path ends in the picture"
    assert len(frames) == 3
    path, noise = pipe.path(request), pipe.initial_noise(request)
    assert [f.level for f in (*frames, last)] == path
    assert np.array_equal(frames[0].noisy, pipe.pixels(noise)[0]), "the path begins in the noise"
    for frame in frames:
        assert isinstance(frame, Frame)
        assert frame.attention is not None
        assert frame.attention.maps.shape == (len(WORDS.split()) + 1, 8, 8), "the finest layer's cells"
        np.testing.assert_allclose(frame.attention.maps.sum(0), 1, atol=1e-5)
        assert frame.attention.share == pytest.approx(1)
    *without, _ = list(trajectory(pipe, request, attention=False))
    for a, b in zip([*frames, last], without, strict=True):
        assert isinstance(a, Frame)
        assert isinstance(b, Frame)
        assert np.array_equal(a.noisy, b.noisy)
        assert b.attention is None


def test_watching_meets_no_other_request(tiny: Model) -> None:
    """Two threads watch different prompts while a third draws: each sees its own words, and all pictures agree."""
    pipe = Pipeline(tiny)
    prompts = ["a red apple", "a blue house in the rain"]
    alone = [list(trajectory(pipe, Request(p, seed=1, steps=3))) for p in prompts]
    barrier = threading.Barrier(3)

    def watched(prompt: str) -> list[Any]:
        barrier.wait()
        return list(trajectory(pipe, Request(prompt, seed=1, steps=3)))

    def drawn() -> list[Any]:
        barrier.wait()
        return [e for e in pipe.run(Request(prompts[0], seed=1, steps=3)) if isinstance(e, Picture)]

    with ThreadPoolExecutor(3) as pool:
        together = [pool.submit(watched, p) for p in prompts]
        (picture,) = pool.submit(drawn).result()
        for before, future in zip(alone, together, strict=True):
            for a, b in zip(before[:-2], future.result()[:-2], strict=True):
                assert np.array_equal(a.attention.maps, b.attention.maps)
    assert np.array_equal(picture.pixels, alone[0][-1].pixels)


def test_layers_of_all_sizes_and_proportions_meet_on_one_grid() -> None:
    """A word that one corner looked at is in that corner, whatever the layer's stride."""
    words = [Word("left", (0,)), Word("right", (1, 2))]

    def layer(h: int, w: int) -> Layer:
        right = (torch.arange(w) >= w // 2).float().expand(h, w).flatten()
        zero = torch.zeros_like(right)
        return Layer(torch.stack([1 - right, right * 0.25, right * 0.75, zero], dim=1), 1.0)

    seen = maps([layer(4, 8), layer(2, 4), layer(8, 16)], (16, 32), words)
    assert seen is not None
    assert seen.maps.shape == (3, 8, 16)
    np.testing.assert_allclose(seen.maps.sum(0), 1, atol=1e-6)
    assert (seen.maps[0, :, :6] > 0.99).all()
    assert (seen.maps[1, :, 10:] > 0.99).all()
    assert not seen.maps[2].any()
    assert maps([], (16, 32), words) is None
