"""Small models of published families, as diffusers and transformers make and save them."""

from __future__ import annotations

import atexit
import base64
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import pixel_unshuffle
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sfumato.pipeline.noise import start
from sfumato.text.tokenizer import clip_vocabulary, packaged_merges, packaged_pairs, packaged_pieces


@cache
def _vocabulary() -> Path:
    """A folder with CLIP's vocabulary, made once."""
    folder = Path(tempfile.mkdtemp(prefix="clip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(packaged_pairs())))
    (folder / "merges.txt").write_text("#version: 0.2\n" + packaged_merges())
    return folder


@cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(_vocabulary(), pad_token=pad, model_max_length=77)


def shaken(module: torch.nn.Module, amount: float = 0.05) -> Any:
    """Random values in place of ones and zeros, so that nothing passes by being neutral."""
    for p in module.parameters():
        p.data.add_(amount * torch.randn_like(p))
    return module.eval()


def text_config(r: random.Random, projection: int = 16, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        intermediate_size=r.choice([48, 80]),
        num_hidden_layers=r.choice([2, 3]),
        num_attention_heads=1,
        projection_dim=projection,
        **{"hidden_size": 64, "bos_token_id": 49406, "eos_token_id": 49407, **more},
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


def make(family: str, seed: int) -> DiffusionPipeline:
    """Build a small random pipeline of diffusers for a family."""
    r = random.Random(f"{family} {seed}")
    torch.manual_seed(seed)
    if family == "sd3":
        return make_sd3(r, with_t5=seed % 2 == 1)
    if family == "flux":
        return make_flux(r, guided=seed % 2 == 1)
    if family == "dit":
        return make_dit(r)
    if family == "sdxl-refiner":
        return make_refiner(r)
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
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer("!"),
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
        text, words = text_config(r, hidden_act="gelu"), clip_tokenizer("!")
    else:
        network, meaning = unet(r, 64), {}
        text, words = text_config(r), clip_tokenizer()
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


def make_refiner(r: random.Random) -> StableDiffusionXLImg2ImgPipeline:
    widths = [64 * r.choice([1, 2]) for _ in range(3)]
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=64,
        attention_head_dim=heads(widths),
        transformer_layers_per_block=r.choice([1, 2]),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 5 * 8,
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae(r, scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=shaken(CLIPTextModelWithProjection(text_config(r, projection=32, hidden_act="gelu"))),
        tokenizer=None,
        tokenizer_2=clip_tokenizer("!"),
        unet=shaken(network),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def t5_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A small tokenizer of T5's kind."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((c, -3.0) for c in "▁abcdefghijklmnopqrstuvwxyz,")]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁an", -1.0), ("ing", -1.5)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


@cache
def t5s_own_tokenizer() -> T5TokenizerFast:
    """transformers' tokenizer of T5 from the packaged pieces, scores and table."""
    packaged = json.loads(packaged_pieces())
    pieces = [(piece, score) for piece, score in packaged["model"]["vocab"]]
    table = base64.b64decode(packaged["normalizer"]["precompiled_charsmap"])
    return T5TokenizerFast(vocab=pieces, _spm_precompiled_charsmap=table, model_max_length=512)


def t5_encoder(r: random.Random, dim: int, vocabulary: int = 40) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=dim, d_kv=8, d_ff=48, num_layers=2, num_heads=r.choice([2, 3]),
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return shaken(T5EncoderModel(config))


def make_sd3(r: random.Random, with_t5: bool) -> StableDiffusion3Pipeline:
    heads, layers, context = r.choice([1, 2]), r.choice([1, 2]), r.choice([128, 136])
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=context,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=48,
        pos_embed_max_size=12,
        dual_attention_layers=(0,) if with_t5 else (),
        qk_norm="rms_norm" if with_t5 else None,
    )
    second = text_config(r, projection=32, hidden_act="gelu")
    return StableDiffusion3Pipeline(
        transformer=shaken(transformer),
        vae=vae(r, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                use_post_quant_conv=False),
        text_encoder=shaken(CLIPTextModelWithProjection(text_config(r, projection=16))),
        text_encoder_2=shaken(CLIPTextModelWithProjection(second)),
        text_encoder_3=t5_encoder(r, context) if with_t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        tokenizer_3=t5_tokenizer(256) if with_t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def make_flux(r: random.Random, guided: bool, axes: tuple[int, int, int] = (2, 6, 8)) -> FluxPipeline:
    heads, head_dim, context = r.choice([1, 2]), 16, r.choice([24, 32])
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=r.choice([1, 2]),
        num_single_layers=r.choice([1, 2]),
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=context,
        pooled_projection_dim=64,
        guidance_embeds=guided,
        axes_dims_rope=axes,
    )
    return FluxPipeline(
        transformer=shaken(transformer),
        vae=vae(r, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                use_post_quant_conv=False),
        text_encoder=shaken(CLIPTextModel(text_config(r))),
        text_encoder_2=t5_encoder(r, context),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(512),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided, shift=3.0 if guided else 1.0),
    )  # fmt: skip


def make_dit(r: random.Random) -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=r.choice([2, 3]),
        attention_head_dim=r.choice([8, 12]),
        in_channels=4,
        out_channels=r.choice([4, 8]),
        num_layers=r.choice([1, 2]),
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(
        transformer=shaken(transformer, 0.1),
        vae=vae(r),
        scheduler=DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False),
    )


def their_picture(pipe: DiffusionPipeline, seed: int, channels: int, side: int, factor: int, **settings: Any) -> Any:
    """The picture of diffusers' pipeline from our noise, as uint8 (H, W, 3)."""
    latents = torch.from_numpy(start([seed], (channels, side // factor, side // factor)))
    if isinstance(pipe, FluxPipeline):  # takes its tokens
        latents = pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        picture = pipe(latents=latents, height=side, width=side, output_type="np", **settings).images[0]
    return np.round(picture * 255).astype(np.uint8)
