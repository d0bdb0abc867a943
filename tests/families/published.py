"""Small models of published families, as diffusers and transformers make and save them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato.pipeline.noise import start
from sfumato.text.tokenizer import clip_vocabulary, packaged_merges


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    merges = [tuple(line.split(" ")) for line in packaged_merges().splitlines()]
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(merges)))
    (folder / "merges.txt").write_text("#version: 0.2\n" + packaged_merges())
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def shaken(module: torch.nn.Module, amount: float = 0.05) -> Any:
    """Random values in place of ones and zeros, so that nothing passes by being neutral."""
    for p in module.parameters():
        p.data.add_(amount * torch.randn_like(p))
    return module.eval()


def text_config(r: random.Random, projection: int = 16, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=r.choice([48, 80]),
        num_hidden_layers=r.choice([2, 3]),
        num_attention_heads=1,
        projection_dim=projection,
        **{"bos_token_id": 49406, "eos_token_id": 49407, **more},
    )


def vae(r: random.Random, **more: Any) -> AutoencoderKL:
    levels = r.choice([2, 3])
    return shaken(
        AutoencoderKL(
            block_out_channels=[32 * r.choice([1, 2]) for _ in range(levels)],
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            layers_per_block=r.choice([1, 2]),
            **more,
        ),
        0.02,
    )


def unet(r: random.Random, context: int, **more: Any) -> UNet2DConditionModel:
    cross = r.choice([[True, False], [False, True], [True, True]])
    return shaken(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=[64 * r.choice([1, 2]) for _ in cross],
            layers_per_block=r.choice([1, 2]),
            down_block_types=["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
            up_block_types=["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
            cross_attention_dim=context,
            **more,
        )
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def heads(widths: list[int]) -> list[int]:
    """Of 64 each, as a single file's are read."""
    return [w // 64 for w in widths]


def make(family: str, seed: int, folder: Path) -> DiffusionPipeline:
    """Build a small random pipeline of diffusers for a family."""
    r = random.Random(f"{family} {seed}")
    torch.manual_seed(seed)
    if family == "sdxl":
        widths = [64 * r.choice([1, 2]) for _ in range(2)]
        second = text_config(r, projection=32, hidden_act="gelu")
        network = shaken(
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=widths,
                layers_per_block=r.choice([1, 2]),
                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
                cross_attention_dim=128,
                attention_head_dim=heads(widths),
                transformer_layers_per_block=[1, r.choice([1, 2, 3])],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=32 + 6 * 8,
            )
        )
        return StableDiffusionXLPipeline(
            vae=vae(r, scaling_factor=0.13025),
            text_encoder=shaken(CLIPTextModel(text_config(r))),
            text_encoder_2=shaken(CLIPTextModelWithProjection(second)),
            tokenizer=clip_tokenizer(folder / "words"),
            tokenizer_2=clip_tokenizer(folder / "words", pad="!"),
            unet=network,
            scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=True,
        )
    if family == "sd2":
        widths = [64 * r.choice([1, 2]) for _ in range(2)]
        network = shaken(
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=widths,
                layers_per_block=r.choice([1, 2]),
                down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
                cross_attention_dim=64,
                attention_head_dim=heads(widths),
                use_linear_projection=True,
            )
        )
        meaning = {"prediction_type": "v_prediction" if seed % 2 == 0 else "epsilon"}
        text, words = text_config(r, hidden_act="gelu"), clip_tokenizer(folder / "words", pad="!")
    else:
        network, meaning = unet(r, 64), {}
        text, words = text_config(r), clip_tokenizer(folder / "words")
    return StableDiffusionPipeline(
        vae=vae(r),
        text_encoder=shaken(CLIPTextModel(text)),
        tokenizer=words,
        unet=network,
        scheduler=DDIMScheduler(**BETAS, **meaning, steps_offset=1, set_alpha_to_one=True, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def their_picture(pipe: DiffusionPipeline, seed: int, channels: int, side: int, factor: int, **settings: Any) -> Any:
    """The picture of diffusers' pipeline from our noise, as uint8 (H, W, 3)."""
    latents = torch.from_numpy(start([seed], (channels, side // factor, side // factor)))
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        picture = pipe(latents=latents, height=side, width=side, output_type="np", **settings).images[0]
    return np.round(picture * 255).astype(np.uint8)
