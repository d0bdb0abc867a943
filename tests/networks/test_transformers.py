"""DiT, MMDiT and FLUX against diffusers, on configurations chosen by the seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel

from sfumato.families.configs import dit_config, flux_config, mmdit_config
from sfumato.networks.dit import DiT
from sfumato.networks.flux import Flux
from sfumato.networks.mmdit import MMDiT

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def with_weights_of(theirs: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    for p in theirs.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_dit_equals_diffusers(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    channels, patch = r.choice([3, 4]), r.choice([1, 2, 4])
    theirs = DiTTransformer2DModel(
        num_attention_heads=r.choice([2, 3]),
        attention_head_dim=r.choice([8, 12]),
        in_channels=channels,
        out_channels=r.choice([channels, 2 * channels]),
        num_layers=r.choice([1, 2, 3]),
        attention_bias=r.random() < 0.5,
        sample_size=8,
        patch_size=patch,
        num_embeds_ada_norm=r.choice([5, 10]),
        norm_eps=r.choice([1e-5, 1e-3]),
    ).eval()
    ours = with_weights_of(theirs, DiT(dit_config(dict(theirs.config))))
    for side in (8, 16):
        x = torch.randn(2, channels, side, side)
        clock, classes = torch.tensor([999, 4]), torch.tensor([4, theirs.config.num_embeds_ada_norm])
        torch.testing.assert_close(ours(x, clock, classes), theirs(x, clock, classes).sample, **CLOSE)


def test_dit_takes_pictures_that_are_not_square() -> None:
    ours = DiT(
        dit_config({"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8})
    ).eval()
    assert ours(torch.randn(1, 4, 8, 12), torch.tensor([3.0]), torch.tensor([1])).shape == (1, 4, 8, 12)


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_mmdit_equals_diffusers(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    heads, head_dim, layers = r.choice([2, 3]), r.choice([8, 16]), r.choice([1, 2, 3])
    theirs = SD3Transformer2DModel(
        sample_size=8,
        patch_size=r.choice([1, 2]),
        in_channels=r.choice([4, 16]),
        out_channels=r.choice([4, 16]),
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=20,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=r.choice([10, 14]),
        pos_embed_max_size=r.choice([12, 17]),
        dual_attention_layers=tuple(i for i in range(layers) if r.random() < 0.5) if seed % 3 else (),
        qk_norm="rms_norm" if seed % 2 else None,
    ).eval()
    c = theirs.config
    ours = with_weights_of(theirs, MMDiT(mmdit_config(dict(c))))
    x, clock = torch.randn(2, c.in_channels, 8, 12), torch.tensor([1000.0, 17.3])
    context, pooled = torch.randn(2, 7, 20), torch.randn(2, c.pooled_projection_dim)
    expected = theirs(x, context, pooled, clock).sample
    torch.testing.assert_close(ours(x, clock, context, pooled), expected, **CLOSE)
    with pytest.raises(ValueError, match="table"):
        ours(torch.randn(1, c.in_channels, 40, 8), clock[:1], context[:1], pooled[:1])


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_flux_equals_diffusers(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    axes = r.choice([(4, 6, 6), (2, 4, 4), (4, 8, 4)])
    channels = r.choice([4, 16])
    theirs = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=r.choice([1, 2]),
        num_single_layers=r.choice([1, 2]),
        attention_head_dim=sum(axes),
        num_attention_heads=r.choice([2, 3]),
        joint_attention_dim=20,
        pooled_projection_dim=10,
        guidance_embeds=bool(seed % 2),
        axes_dims_rope=axes,
    ).eval()
    ours = with_weights_of(theirs, Flux(flux_config(dict(theirs.config))))
    x, clock = torch.randn(2, channels, 6, 10), torch.tensor([1.0, 0.173])
    context, pooled = torch.randn(2, 7, 20), torch.randn(2, 10)
    guidance = torch.tensor([3.5, 1.0]) if seed % 2 else None
    packed = x.reshape(2, channels, 3, 2, 5, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 15, 4 * channels)
    places = torch.stack([torch.zeros(15), torch.arange(15) // 5, torch.arange(15) % 5], dim=1)
    out = theirs(packed, context, pooled, clock, places, torch.zeros(7, 3), guidance).sample
    expected = out.reshape(2, 3, 5, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, channels, 6, 10)
    torch.testing.assert_close(ours(x, clock, context, pooled, guidance), expected, **CLOSE)
