"""From the JSON configurations of published folders to the networks' own configurations.

A setting that would change the network, and that the network cannot follow, is refused; others are of no concern.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from sfumato.errors import BadCheckpoint
from sfumato.networks.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from sfumato.networks.clip import CLIPVisionConfig
from sfumato.networks.controlnet import ControlNetConfig
from sfumato.networks.dit import DiTConfig
from sfumato.networks.flux import FluxConfig
from sfumato.networks.ip_adapter import IPAdapterConfig
from sfumato.networks.mmdit import MMDiTConfig
from sfumato.networks.sd_unet import SDUNetConfig
from sfumato.text.clip import CLIPConfig
from sfumato.text.t5 import T5Config

Json = Mapping[str, Any]
P = ParamSpec("P")
T = TypeVar("T")


def _reader(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a reader of configurations refuse by BadCheckpoint whatever it stumbles over, saying of what it was."""

    def decorate(read: Callable[P, T]) -> Callable[P, T]:
        @wraps(read)
        def reader(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return read(*args, **kwargs)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as e:
                reason = f"{type(e).__name__}: {e}"
                raise BadCheckpoint(f"the {what}'s configuration cannot be followed: {reason}") from None

        return reader

    return decorate


def _only(raw: Json, **allowed: Any) -> None:
    """Refuse settings of which only these values are known; an absent one is fine."""
    for key, known in allowed.items():
        known = known if isinstance(known, tuple) else (known,)
        if key in raw and raw[key] not in known:
            raise ValueError(f"{key} {raw[key]!r} is not supported, only {', '.join(map(repr, known))}")


def _each(value: Any, n: int) -> tuple[Any, ...]:
    """One entry per resolution, whether given as one for all or as a list."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * n


def _depths(types: Any, attentive: str, plain: str, layers: tuple[Any, ...]) -> tuple[int | tuple[int, ...], ...]:
    for t in types:
        _only({"block type": t}, **{"block type": (attentive, plain)})
    numbers = (tuple(map(int, n)) if isinstance(n, (list, tuple)) else int(n) for n in layers)
    return tuple(depth if t == attentive else 0 for t, depth in zip(types, numbers, strict=True))


@_reader("U-Net")
def sd_unet_config(c: Json) -> SDUNetConfig:
    """The U-Net of Stable Diffusion, from a ``UNet2DConditionModel``'s configuration."""
    _only(
        c, act_fn=("silu", "swish"), center_input_sample=False, class_embed_type=None, dual_cross_attention=False,
        encoder_hid_dim_type=None, encoder_hid_dim=None, resnet_time_scale_shift="default",
        resnet_skip_time_act=False, resnet_out_scale_factor=(1, None), time_embedding_type="positional",
        time_embedding_dim=None, time_embedding_act_fn=None, timestep_post_act=None, conv_in_kernel=3,
        conv_out_kernel=3, attention_type="default", class_embeddings_concat=False, cross_attention_norm=None,
        downsample_padding=1, mid_block_scale_factor=1, addition_embed_type=(None, "text_time"),
        mid_block_type=(None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), num_attention_heads=None,
        _class_name=("UNet2DConditionModel", "ControlNetModel"),
    )  # fmt: skip
    widths = tuple(c.get("block_out_channels", (320, 640, 1280, 1280)))
    n = len(widths)
    types = c.get("down_block_types", ("CrossAttnDownBlock2D",) * (n - 1) + ("DownBlock2D",))
    types_up = c.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (n - 1))
    layers = _each(c.get("transformer_layers_per_block", 1), n)
    layers_up = c.get("reverse_transformer_layers_per_block") or layers[::-1]
    deepest = layers[-1][0] if isinstance(layers[-1], (list, tuple)) else layers[-1]
    cross_only = _each(c.get("only_cross_attention", False), n)
    middle = c.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    sized = c.get("addition_embed_type") == "text_time"
    return SDUNetConfig(
        in_channels=c.get("in_channels", 4),
        out_channels=c.get("out_channels", 4),
        widths=widths,
        blocks=_each(c.get("layers_per_block", 2), n),
        depth=_depths(types, "CrossAttnDownBlock2D", "DownBlock2D", layers),
        depth_up=_depths(types_up, "CrossAttnUpBlock2D", "UpBlock2D", tuple(layers_up)),
        depth_middle=deepest if middle == "UNetMidBlock2DCrossAttn" else 0,
        middle=middle is not None,
        heads=_each(c.get("attention_head_dim", 8), n),  # the published name says otherwise, but it is their number
        context_dim=_each(c.get("cross_attention_dim", 1280), n),
        self_attention=tuple(not x for x in cross_only),
        linear=c.get("use_linear_projection", False),
        size_dim=c["addition_time_embed_dim"] if sized else 0,
        vector=c["projection_class_embeddings_input_dim"] if sized else 0,
        classes=c.get("num_class_embeds") or 0,
        guidance_dim=c.get("time_cond_proj_dim") or 0,
        groups=c.get("norm_num_groups", 32),
        eps=c.get("norm_eps", 1e-5),
        sines_first=not c.get("flip_sin_to_cos", True),
        frequency_shift=c.get("freq_shift", 0),
    )


@_reader("ControlNet")
def controlnet_config(c: Json) -> ControlNetConfig:
    """A ControlNet, from a ``ControlNetModel``'s configuration."""
    _only(c, controlnet_conditioning_channel_order="rgb", global_pool_conditions=False)
    own = {k: v for k, v in c.items() if k not in ("out_channels", "up_block_types")}
    no_way_up = {"reverse_transformer_layers_per_block": [1] * len(c.get("block_out_channels", range(4)))}
    return ControlNetConfig(
        unet=sd_unet_config({**own, **no_way_up}),
        hint_channels=c.get("conditioning_channels", 3),
        hint_widths=tuple(c.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)),
    )


@_reader("IP-Adapter")
def ip_adapter_config(c: Json) -> IPAdapterConfig:
    """An IP-Adapter, from what its shapes tell."""
    return IPAdapterConfig(**{**c, "attention": tuple((context, dim) for context, dim in c["attention"])})


@_reader("image encoder")
def clip_vision_config(c: Json) -> CLIPVisionConfig:
    """CLIP's tower for pictures, from a ``CLIPVisionModelWithProjection``'s configuration."""
    return CLIPVisionConfig(
        dim=c.get("hidden_size", 768),
        inner=c.get("intermediate_size", 3072),
        layers=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", 12),
        channels=c.get("num_channels", 3),
        side=c.get("image_size", 224),
        patch=c.get("patch_size", 32),
        projection=c.get("projection_dim", 512),
        activation=c.get("hidden_act", "quick_gelu"),
        eps=c.get("layer_norm_eps", 1e-5),
    )


@_reader("autoencoder")
def autoencoder_config(c: Json) -> AutoencoderConfig:
    """The KL autoencoder, from an ``AutoencoderKL``'s configuration."""
    _only(c, act_fn=("silu", "swish"), _class_name="AutoencoderKL")
    for types, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        for t in c.get(types, ()):
            _only({types: t}, **{types: known})
    return AutoencoderConfig(
        in_channels=c.get("in_channels", 3),
        out_channels=c.get("out_channels", 3),
        latent_channels=c.get("latent_channels", 4),
        widths=tuple(c.get("block_out_channels", (64,))),
        blocks=c.get("layers_per_block", 1),
        groups=c.get("norm_num_groups", 32),
        quantized=c.get("use_quant_conv", True),
        post_quantized=c.get("use_post_quant_conv", True),
        middle_attention=c.get("mid_block_add_attention", True),
        scale=c.get("scaling_factor", 0.18215),
        shift=c.get("shift_factor") or 0.0,
        mean=tuple(c.get("latents_mean") or ()),
        deviation=tuple(c.get("latents_std") or ()),
    )


@_reader("tiny autoencoder")
def tiny_autoencoder_config(c: Json) -> TinyAutoencoderConfig:
    """The tiny autoencoder, from an ``AutoencoderTiny``'s configuration."""
    _only(c, act_fn="relu", upsample_fn="nearest", upsampling_scaling_factor=2)
    return TinyAutoencoderConfig(
        in_channels=c.get("in_channels", 3),
        out_channels=c.get("out_channels", 3),
        latent_channels=c.get("latent_channels", 4),
        encoder_widths=tuple(c.get("encoder_block_out_channels", (64,) * 4)),
        decoder_widths=tuple(c.get("decoder_block_out_channels", (64,) * 4)),
        encoder_blocks=tuple(c.get("num_encoder_blocks", (1, 3, 3, 3) if "num_decoder_blocks" not in c else ())),
        decoder_blocks=tuple(c.get("num_decoder_blocks", (3, 3, 3, 1))),
        scale=c.get("scaling_factor", 1.0),
        shift=c.get("shift_factor") or 0.0,
    )


@_reader("text tower")
def clip_config(c: Json, projected: bool) -> CLIPConfig:
    """CLIP's text tower, from a ``CLIPTextModel``'s configuration, with its projection or without."""
    end = c.get("eos_token_id", 49407)
    return CLIPConfig(
        vocabulary=c.get("vocab_size", 49408),
        dim=c.get("hidden_size", 512),
        inner=c.get("intermediate_size", 2048),
        layers=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", 8),
        positions=c.get("max_position_embeddings", 77),
        projection=c.get("projection_dim", 512) if projected else 0,
        activation=c.get("hidden_act", "quick_gelu"),
        eps=c.get("layer_norm_eps", 1e-5),
        end=None if end in (2, None) else end,  # 2 is the mark of the first published files, and not the token's id
    )


@_reader("T5 encoder")
def t5_config(c: Json) -> T5Config:
    """T5's encoder, from a ``T5EncoderModel``'s configuration."""
    form = c.get("feed_forward_proj", "relu")
    gated, activation = form.startswith("gated-"), form.removeprefix("gated-")
    return T5Config(
        vocabulary=c.get("vocab_size", 32128),
        dim=c.get("d_model", 512),
        inner=c.get("d_ff", 2048),
        layers=c.get("num_layers", 6),
        heads=c.get("num_heads", 8),
        head_dim=c.get("d_kv", 64),
        gated=gated,
        activation="gelu_new" if form == "gated-gelu" else activation,  # the published files mean the tanh form
        buckets=c.get("relative_attention_num_buckets", 32),
        max_distance=c.get("relative_attention_max_distance", 128),
        eps=c.get("layer_norm_epsilon", 1e-6),
    )


@_reader("DiT")
def dit_config(c: Json) -> DiTConfig:
    """DiT, from a ``DiTTransformer2DModel``'s or a ``Transformer2DModel``'s configuration."""
    _only(c, _class_name=("DiTTransformer2DModel", "Transformer2DModel"))
    _only(c, norm_type="ada_norm_zero", norm_elementwise_affine=False, activation_fn=("gelu-approximate", "gelu"))
    channels = c.get("in_channels", 4)
    return DiTConfig(
        in_channels=channels,
        out_channels=c.get("out_channels") or channels,
        patch=c.get("patch_size", 2),
        size=c.get("sample_size", 32),
        layers=c.get("num_layers", 28),
        heads=c.get("num_attention_heads", 16),
        head_dim=c.get("attention_head_dim", 72),
        classes=c.get("num_embeds_ada_norm", 1000),
        bias=c.get("attention_bias", True),
        eps=c.get("norm_eps", 1e-5),
        activation="gelu" if c.get("activation_fn") == "gelu" else "gelu-tanh",
    )


@_reader("MMDiT")
def mmdit_config(c: Json) -> MMDiTConfig:
    """Stable Diffusion 3's transformer, from a ``SD3Transformer2DModel``'s configuration."""
    _only(c, qk_norm=(None, "rms_norm"), _class_name="SD3Transformer2DModel")
    heads, head_dim = c.get("num_attention_heads", 18), c.get("attention_head_dim", 64)
    _only({"caption_projection_dim": c.get("caption_projection_dim", 1152)}, caption_projection_dim=heads * head_dim)
    channels = c.get("in_channels", 16)
    return MMDiTConfig(
        in_channels=channels,
        out_channels=c.get("out_channels") or channels,
        patch=c.get("patch_size", 2),
        layers=c.get("num_layers", 18),
        heads=heads,
        head_dim=head_dim,
        context_dim=c.get("joint_attention_dim", 4096),
        pooled_dim=c.get("pooled_projection_dim", 2048),
        positions=c.get("pos_embed_max_size", 96),
        dual=tuple(c.get("dual_attention_layers") or ()),
        normalized=c.get("qk_norm") is not None,
    )


@_reader("FLUX transformer")
def flux_config(c: Json) -> FluxConfig:
    """FLUX's transformer, from a ``FluxTransformer2DModel``'s configuration."""
    _only(c, patch_size=1, _class_name="FluxTransformer2DModel")
    channels = c.get("in_channels", 64)
    return FluxConfig(
        in_channels=channels,
        out_channels=c.get("out_channels") or channels,
        layers=c.get("num_layers", 19),
        single_layers=c.get("num_single_layers", 38),
        heads=c.get("num_attention_heads", 24),
        head_dim=c.get("attention_head_dim", 128),
        context_dim=c.get("joint_attention_dim", 4096),
        pooled_dim=c.get("pooled_projection_dim", 768),
        guided=c.get("guidance_embeds", False),
        axes=tuple(c.get("axes_dims_rope", (16, 56, 56))),
    )
