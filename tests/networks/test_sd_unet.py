"""The U-Net of Stable Diffusion against diffusers, on configurations chosen by the seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sfumato.families.configs import sd_unet_config
from sfumato.networks.sd_unet import SDUNet


def random_config(seed: int, kind: str) -> dict[str, Any]:
    """A small U-Net of the kind of SD 1, 2 or XL."""
    r = random.Random(seed)
    levels = r.choice([2, 3])
    groups = r.choice([2, 4])
    widths = [16 * r.choice([1, 2, 3]) for _ in range(levels)]
    cross = [True, *(r.random() < 0.7 for _ in range(levels - 1))]
    r.shuffle(cross)
    config: dict[str, Any] = {
        "in_channels": r.choice([4, 9]),
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": r.choice([1, 2]),
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        "cross_attention_dim": r.choice([12, 20]),
        "attention_head_dim": r.choice([2, 4]),
        "norm_num_groups": groups,
    }
    if kind != "1":
        config |= {"use_linear_projection": True, "attention_head_dim": [r.choice([1, 2, 4]) for _ in range(levels)]}
    if kind == "XL":
        config |= {
            "transformer_layers_per_block": [r.choice([1, 2, 3]) for _ in range(levels)],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 10,
        }
    return config


def same_weights(seed: int, config: dict[str, Any]) -> tuple[UNet2DConditionModel, SDUNet]:
    torch.manual_seed(seed)
    theirs = UNet2DConditionModel(**config).eval()
    for p in theirs.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ours = SDUNet(sd_unet_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("kind", ["1", "2", "XL"])
@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_equals_diffusers(seed: int, kind: str) -> None:
    config = random_config(seed, kind)
    theirs, ours = same_weights(seed, config)
    x = torch.randn(2, config["in_channels"], 8, 12 if seed % 2 else 11)
    clock = torch.tensor([999.0, 3.5])
    context = torch.randn(2, 7, config["cross_attention_dim"])
    pooled, sizes = torch.randn(2, 10), torch.tensor([[512.0, 640, 0, 7, 512, 640], [1024, 1024, 3, 0, 1024, 1024]])
    added = {"text_embeds": pooled, "time_ids": sizes} if kind == "XL" else None
    expected = theirs(x, clock, context, added_cond_kwargs=added).sample
    extra = {"pooled": pooled, "sizes": sizes} if kind == "XL" else {}
    torch.testing.assert_close(ours(x, clock, context, **extra), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "more",
    [
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {"only_cross_attention": [True, False]},
        {"transformer_layers_per_block": [1, 2], "reverse_transformer_layers_per_block": [2, 1]},
        {
            "reverse_transformer_layers_per_block": [[1, 2], [2, 1, 1]],
            "transformer_layers_per_block": [[1, 2], [2]],
            "layers_per_block": [2, 1],
        },
        {"cross_attention_dim": [12, 12], "layers_per_block": [1, 2]},
        {"num_class_embeds": 10},
        {"time_cond_proj_dim": 16},
        {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-3},
    ],
    ids=lambda more: next(iter(more)),
)
@torch.inference_mode()
def test_rarer_variants_equal_diffusers(more: dict[str, Any]) -> None:
    config = {
        "block_out_channels": [16, 32],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **more,
    }
    theirs, ours = same_weights(0, config)
    x, clock, context = torch.randn(2, 4, 8, 8), torch.tensor([801, 40]), torch.randn(2, 5, 12)
    given: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    if "num_class_embeds" in more:
        given["class_labels"] = asked["classes"] = torch.tensor([3, 9])
    if "time_cond_proj_dim" in more:
        given["timestep_cond"] = asked["guidance"] = torch.randn(2, 16)
    expected = theirs(x, clock, context, **given).sample
    torch.testing.assert_close(ours(x, clock, context, **asked), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_control_is_added_to_skips_and_middle() -> None:
    theirs, ours = same_weights(1, random_config(1, "1"))
    c = ours.config
    x, clock = torch.randn(1, c.in_channels, 8, 8), torch.tensor([500.0])
    context = torch.randn(1, 5, c.context_dim[0])
    shapes: list[tuple[int, ...]] = []
    h = torch.empty(1, c.widths[0], 8, 8)
    shapes.append(h.shape)
    side = 8
    for i, width in enumerate(c.widths):
        shapes += [(1, width, side, side)] * c.blocks[i]
        if i < len(c.widths) - 1:
            side //= 2
            shapes.append((1, width, side, side))
    control = [torch.randn(s) for s in [*shapes, shapes[-1]]]
    expected = theirs(
        x,
        clock,
        context,
        down_block_additional_residuals=tuple(control[:-1]),
        mid_block_additional_residual=control[-1],
    ).sample
    torch.testing.assert_close(ours(x, clock, context, control=control), expected, atol=1e-5, rtol=0)
