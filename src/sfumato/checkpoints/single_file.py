"""Models as single safetensors files in their original layout, as CompVis and Stability AI published them.

The file says nothing of its configuration: what can be read from names and shapes is, the rest is what the published
files have in common, and ``why`` tells which is which. Files that ``sfumato convert`` wrote carry the configuration of
the folder they came from, in one entry of their metadata.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints import keymaps
from sfumato.checkpoints.formats import placeholders, weights_header
from sfumato.checkpoints.formats import weights as read_weights
from sfumato.checkpoints.keymaps import Place, prefixed, to_ours, to_theirs
from sfumato.checkpoints.published import Json, Published
from sfumato.errors import BadCheckpoint, NoResources

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "published-folder"  # the metadata's key
Shapes = Mapping[str, tuple[int, ...]]
Table = Callable[[Json], Iterator[Place]]

# Tensors that published files carry and that no network needs.
_IGNORED = re.compile(
    r"model_ema\..*|betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|scale_factor|loss\..*"
    r"|denoiser\..*|v_pred|ztsnr|.*\.position_ids|.*\.logit_scale|.*\.attn_mask|.*\.visual\..*|lvlb_weights"
    r"|cond_stage_model\.(model\.|transformer\.)?text_projection(\.weight)?|first_stage_model\.loss\..*"
    r"|.*\.encoder\.embed_tokens\.weight|text_encoders\.clip_l\.transformer\.text_projection\.weight"
)


# Of floats of eight bits that are to be multiplied by numbers of their own, as ComfyUI writes them.
_SCALES = re.compile(r".*\.(scale_weight|weight_scale(_2)?)|(.*\.)?scaled_fp8")
H_LAYERS_USED = 23  # of OpenCLIP H's 24


def ignored(name: str) -> bool:
    """Whether a tensor is one that published files carry and that no network needs."""
    return _IGNORED.fullmatch(name) is not None


@dataclass(frozen=True)
class Part:
    """One component in a layout: where its names begin, by which table they are ours, how its shapes are read."""

    component: str
    prefix: str
    table: Table
    describe: Callable[[Shapes], dict[str, Any]]
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """A form of single files.

    Args:
        sign: a name that such files have and others do not; of several layouts that fit, the first counts.
        index: the whole model's configuration, for the folder.
        latents: scale and shift of the autoencoder's latents.
    """

    family: str
    sign: str
    parts: tuple[Part, ...]
    index: Json
    scheduler: Json
    latents: Json


def single_file_layout(names: Mapping[str, Any] | set[str]) -> Layout | None:
    """Tell by its tensors' names which layout a file has; None if none."""
    return next((layout for layout in LAYOUTS if layout.sign in names), None)


def read_single_file(
    path: Path, *, weights: bool = True, allow_pickle: bool = False, partial: bool = False
) -> Published:
    """Read a single file; tensors are mapped, not copied, and without ``weights`` have no numbers.

    Raises BadCheckpoint for a damaged file, an unknown layout, a part that is missing or a tensor that has no place.
    """
    header = weights_header(path, allow_pickle=allow_pickle)
    shapes = {_todays(name): info.shape for name, info in header.tensors.items()}
    layout = single_file_layout(set(shapes))
    if layout is None:
        raise BadCheckpoint(f"{path}: {describe_foreign(shapes)}")
    check_form(path, shapes)
    why = {"family": f"{layout.family}: it holds {layout.sign}"}
    tokenizers: Mapping[str, Mapping[str, str]] = {}
    if METADATA in header.metadata:
        configs, tokenizers = _stated(path, header.metadata[METADATA])
        why["configuration"] = "stated in the file's metadata"
    else:
        configs = _described(path, layout, shapes)
        configs["scheduler"] = _scheduler(layout, shapes, header.metadata, why)
        why["configuration"] = "read from the shapes; number of heads and groups as published"

    raw = (read_weights if weights else placeholders)(path, allow_pickle=allow_pickle)
    raw = {_todays(name): t for name, t in raw.items()}
    tensors: dict[str, dict[str, Tensor]] = {}
    used: set[str] = set()
    for part in layout.parts:
        if part.component not in configs and part.optional:
            continue
        if part.component not in configs:
            raise BadCheckpoint(f"{path}: its metadata say nothing of its {part.component}")
        try:
            places = list(prefixed(part.prefix, part.table(configs[part.component])))
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise BadCheckpoint(f"{path}: the {part.component}'s configuration is damaged: {e}") from None
        tensors[part.component] = placed(path, raw, places)
        used |= {p.theirs for p in places}
    left = sorted(name for name in raw if name not in used and not ignored(name))
    if layout.family == "sd2":  # the last layer, whose output this family does not use
        layers = configs["text_encoder"].get("num_hidden_layers", 12)
        left = [name for name in left if f".transformer.resblocks.{layers}." not in name]
    if left and partial:
        why["left out"] = f"{len(left)} tensors without a place: {', '.join(left[:5])}{', …' if len(left) > 5 else ''}"
    elif left:
        raise BadCheckpoint(
            f"{path}: {len(left)} tensors have no place in a {layout.family} model: {', '.join(left[:5])}"
            f"{', …' if len(left) > 5 else ''} (--partial lets them pass)"
        )
    return Published(path, "single file", configs, tensors, tokenizers, why, (path,))


def check_form(path: Path, names: Iterable[str]) -> None:
    """Raise BadCheckpoint for weights that mean something else than they say: they would give noise."""
    for name in names:
        if name.startswith("edm_"):
            raise BadCheckpoint(f"{path}: holds {name}, the mark of a network in EDM's form: not supported")
        if _SCALES.fullmatch(name):
            raise BadCheckpoint(
                f"{path}: holds {name}: floats of eight bits with scales of their own are not supported, and --partial "
                "would not help: take the same model in fp16, bf16 or plain fp8, or as GGUF"
            )


def placed(path: Path, raw: Mapping[str, Tensor], places: Iterable[Place]) -> dict[str, Tensor]:
    """``to_ours``; BadCheckpoint for a tensor whose shape its place cannot take."""
    try:
        return to_ours(raw, places)
    except (RuntimeError, ValueError, IndexError) as e:
        raise BadCheckpoint(f"{path}: a tensor cannot be cut as its place wants: {str(e).splitlines()[0]}") from None


def _todays(name: str) -> str:
    """A tensor's name as transformers of today spell it: the oldest files leave out a part."""
    old = re.match(r"cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)", name)
    return f"{old[0]}text_model.{name[old.end() :]}" if old else name


def write_single_file(model: Published, path: Path, layout: Layout) -> None:
    """Write a published model as a single file; BadCheckpoint if the path is taken or a tensor has no place."""
    if path.exists():
        raise BadCheckpoint(f"{path} exists already; name a file that does not")
    tensors: dict[str, Tensor] = {}
    for part in layout.parts:
        if part.component not in model.tensors and part.optional:
            continue
        if part.component not in model.tensors:
            raise BadCheckpoint(f"{model.path}: has no {part.component}, which a single file of {layout.family} needs")
        config = model.configs[part.component]
        if config.get("_class_name") == "AutoencoderTiny":
            raise BadCheckpoint(f"{model.path}: its autoencoder is a tiny one, and single files hold the KL one alone")
        try:
            tensors |= to_theirs(model.tensors[part.component], prefixed(part.prefix, part.table(config)))
        except KeyError as e:
            raise BadCheckpoint(f"{model.path}: {part.component}: {e} has no place in a single file") from None
        except (TypeError, ValueError, IndexError) as e:
            raise BadCheckpoint(f"{model.path}: the {part.component}'s configuration is damaged: {e}") from None
    write_tensors(tensors, path, {METADATA: json.dumps({"configs": model.configs, "tokenizers": model.tokenizers})})


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that is there whole or not at all; BadCheckpoint if the path is taken."""
    import os

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.exists():
        raise BadCheckpoint(f"{path} exists already; name a file that does not")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, dict(metadata or {"format": "pt"}))
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        raise NoResources(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _stated(path: Path, text: str) -> tuple[dict[str, Json], dict[str, dict[str, str]]]:
    try:
        value = json.loads(text)
        configs, tokenizers = value["configs"], value["tokenizers"]
        if not all(isinstance(c, dict) for c in configs.values()):
            raise TypeError
        if not all(isinstance(t, str) for texts in tokenizers.values() for t in texts.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadCheckpoint(f"{path}: the configuration in its metadata is damaged") from None
    return configs, tokenizers


def _described(path: Path, layout: Layout, shapes: Shapes) -> dict[str, Any]:
    configs: dict[str, Any] = {"": dict(layout.index)}
    for part in layout.parts:
        own = {k.removeprefix(part.prefix): s for k, s in shapes.items() if k.startswith(part.prefix)}
        if not own and part.optional:
            for absent in (part.component, part.component.replace("text_encoder", "tokenizer")):
                configs[""].pop(absent, None)
            continue
        if not own:
            raise BadCheckpoint(
                f"{path}: a {layout.family} file, but without its {part.component} ({part.prefix}*): take a file that "
                "holds the whole model, or a whole model and this file beside it (--denoiser FILE)"
            )
        try:
            configs[part.component] = part.describe(own)
        except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError) as e:
            raise not_whole(f"{path}: its {part.component}", e) from None
    configs["vae"] |= layout.latents
    if layout.family == "sd1" and configs["text_encoder"]["hidden_size"] == 1024:
        raise BadCheckpoint(
            f"{path}: Stable Diffusion 2's text tower under CLIP L's names, as stable-diffusion.cpp writes it: not "
            "supported: take the safetensors of the same model"
        )
    if layout.family == "sdxl":
        u, text = configs["unet"], configs["text_encoder_2"]
        sizes = 5 if layout.index.get("requires_aesthetics_score") else 6
        u["addition_time_embed_dim"] = (u["projection_class_embeddings_input_dim"] - text["projection_dim"]) // sizes
    return configs


def not_whole(what: str, error: Exception) -> BadCheckpoint:
    """What to raise where a tensor that tells a network's shape is not there, or not as it should be."""
    lost = f"{error} is missing" if isinstance(error, KeyError) else f"a tensor is missing or misshaped ({error})"
    return BadCheckpoint(
        f"{what} is not whole: {lost}; its shape is read from such tensors, so that --partial is no help: take a file "
        "that has them, or a folder with its config.json"
    )


def _scheduler(layout: Layout, shapes: Shapes, metadata: Mapping[str, str], why: dict[str, str]) -> dict[str, Any]:
    scheduler = dict(layout.scheduler)
    if any(name.endswith("guidance_in.in_layer.weight") for name in shapes):
        scheduler |= FLUX_TIMES[True]
    return scheduler | prediction_marks(shapes, metadata, why)


FLUX_TIMES: Mapping[bool, Json] = {  # of dev, which is told the guidance scale, and of schnell
    True: {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
    False: {"use_dynamic_shifting": False, "shift": 1.0},
}


def prediction_marks(names: Collection[str], metadata: Mapping[str, str], why: dict[str, str]) -> dict[str, Any]:
    """What a file's marks say of a U-Net's scheduler; ``why`` gets the reason."""
    scheduler: dict[str, Any] = {}
    stated = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in names:
        scheduler["prediction_type"], why["prediction"] = "v_prediction", "v: the file holds the mark v_pred"
    elif stated.startswith("v") or stated in ("epsilon", "eps"):
        scheduler["prediction_type"] = "v_prediction" if stated.startswith("v") else "epsilon"
        why["prediction"] = f"{stated}: stated in the file's metadata"
    if "ztsnr" in names:
        scheduler["rescale_betas_zero_snr"] = True
    return scheduler


def describe_foreign(shapes: Shapes) -> str:
    """Say what a file is that has no known layout."""
    names = " ".join(list(shapes)[:2000])
    for pattern, what in (
        (r"(^| )ip_adapter\.\d", "an IP-Adapter, which guides a model and is none (--ip-adapter FILE)"),
        (r"lora_(unet|te|down|A)|lora\.(down|up)|hada_w1|lokr_w1", "a LoRA, which is added to a model and is none"),
        (r"input_hint_block|controlnet_cond_embedding", "a ControlNet, which guides a model and is none"),
        (
            r"(^| )(model\.diffusion_model|double_blocks|joint_blocks|input_blocks)\.",
            "a denoiser without its text towers: take a file that holds the whole model, or a whole model and this "
            "file beside it (--denoiser FILE)",
        ),
        (
            r"(^| )(text_model\.|embeddings\.token_embedding|encoder\.block\.0|shared\.weight)",
            "a text tower alone: load the whole folder instead",
        ),
        (r"down_blocks\.|transformer_blocks\.", "one network of a folder: load the whole folder instead"),
        (r"(^| )emb_params|string_to_param|(^| )clip_[lg]( |$)", "a textual inversion, which is a word and no model"),
        (r"encoder\.down\.|decoder\.up\.", "an autoencoder alone, and no whole model"),
    ):
        if re.search(pattern, names):
            return f"it looks like {what}"
    return f"holds no model that this version knows (its first tensor is {min(shapes, default='none')[:60]!r})"


def count(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number that stands at the group of a pattern, 0 if there is none."""
    found = re.compile(pattern)
    return 1 + max((int(m[1]) for name in shapes if (m := found.match(name))), default=-1)


def describe_unet(s: Shapes) -> dict[str, Any]:
    """Latent diffusion's U-Net."""
    widths: list[int] = []
    blocks: list[int] = []
    depths: list[list[int]] = []  # of each residual block
    new, width = True, 0
    for k in range(1, count(s, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{k}.0.op.weight" in s:
            new = True
            continue
        width = s[f"input_blocks.{k}.0.in_layers.2.weight"][0]
        if new:
            widths, blocks, depths, new = [*widths, width], [*blocks, 0], [*depths, []], False
        blocks[-1] += 1
        depths[-1].append(count(s, rf"input_blocks\.{k}\.1\.transformer_blocks\.(\d+)\."))
    depths_up: list[list[int]] = []
    k = 0
    for n in reversed(blocks):
        own = range(k, k + n + 1)
        depths_up.append([count(s, rf"output_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in own])
        k += n + 1
    middle = count(s, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    words = "attn2.to_k.weight"
    attn = next((name for name in sorted(s) if name.endswith(words)), words)
    _, context = s[attn]
    linear = len(s[f"{attn.partition('.transformer_blocks.')[0]}.proj_in.weight"]) == 2
    vector = s["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in s else 0
    # A resolution without attention needs a number all the same.
    layers, layers_up = ([_one_for_all([d or 1 for d in level]) for level in levels] for levels in (depths, depths_up))
    if not any(depths[-1]):
        layers[-1] = middle or 1
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": s["input_blocks.0.0.weight"][1],
        "out_channels": s["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in depths_up],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "transformer_layers_per_block": layers,
        "reverse_transformer_layers_per_block": None if layers_up == layers[::-1] else layers_up,
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, w // 64) for w in widths] if linear else 8,
        "norm_num_groups": math.gcd(32, *widths),
        "addition_embed_type": "text_time" if vector else None,
        "addition_time_embed_dim": 256 if vector else None,
        "projection_class_embeddings_input_dim": vector or None,
        "num_class_embeds": s["label_emb.weight"][0] if "label_emb.weight" in s else None,
        "time_cond_proj_dim": s["time_embed.cond_proj.weight"][1] if "time_embed.cond_proj.weight" in s else None,
        "sample_size": 128 if vector else None if linear else 64,  # SD 2 is of 64 or 96, which no shape tells
    }


def _one_for_all(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers


def describe_autoencoder(s: Shapes) -> dict[str, Any]:
    """Latent diffusion's KL autoencoder, but for the scale of its latents."""
    return describe_kl(s, "encoder.down", "block", "encoder.mid.attn_1.q.weight")


def describe_kl(s: Shapes, levels: str, blocks: str, attention: str) -> dict[str, Any]:
    """The KL autoencoder's configuration, but for the scale of its latents.

    Args:
        levels, blocks: names of the encoder's resolutions, and of the residual blocks in each.
        attention: a name that there is with attention in the middle.
    """
    n = count(s, rf"{re.escape(levels)}\.(\d+)\.")
    widths = [s[f"{levels}.{i}.{blocks}.0.conv1.weight"][0] for i in range(n)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": s["encoder.conv_in.weight"][1],
        "out_channels": s["decoder.conv_out.weight"][0],
        "latent_channels": s["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "layers_per_block": count(s, rf"{re.escape(levels)}\.0\.{blocks}\.(\d+)\."),
        "norm_num_groups": math.gcd(32, *widths),
        "use_quant_conv": "quant_conv.weight" in s,
        "use_post_quant_conv": "post_quant_conv.weight" in s,
        "mid_block_add_attention": attention in s,
        "sample_size": 512,
    }


def _clip(dim: int, positions: int, vocabulary: int, layers: int, inner: int, projection: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, dim // 64),
        "max_position_embeddings": positions,
        "projection_dim": projection or dim,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def describe_clip(s: Shapes) -> dict[str, Any]:
    """CLIP's tower under transformers' names."""
    positions, dim = s["text_model.embeddings.position_embedding.weight"]
    return {
        **_clip(
            dim,
            positions,
            s["text_model.embeddings.token_embedding.weight"][0],
            count(s, r"text_model\.encoder\.layers\.(\d+)\."),
            s["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            s["text_projection.weight"][0] if "text_projection.weight" in s else 0,
        ),
        "hidden_act": "quick_gelu",
    }


def _plain_clip(config: Json) -> Iterator[Place]:
    """CLIP's tower without its projection, which FLUX files may hold and FLUX does not use."""
    return (place for place in keymaps.clip(config) if not place.theirs.startswith("text_projection"))


def _describe_plain_clip(s: Shapes) -> dict[str, Any]:
    return describe_clip({k: v for k, v in s.items() if k != "text_projection.weight"})


def describe_open_clip(s: Shapes, skipped: int = 0, projected: bool = True) -> dict[str, Any]:
    """CLIP's tower under OpenCLIP's names, without its last layers where a family does not use them."""
    positions, dim = s["positional_embedding"]
    return {
        **_clip(
            dim,
            positions,
            s["token_embedding.weight"][0],
            count(s, r"transformer\.resblocks\.(\d+)\.") - skipped,
            s["transformer.resblocks.0.mlp.c_fc.weight"][0],
            s["text_projection"][1] if projected else 0,
        ),
        "hidden_act": "gelu",
    }


def _describe_clip_g(s: Shapes) -> dict[str, Any]:
    return {**describe_clip(s), "hidden_act": "gelu"}


def _describe_sd2_text(s: Shapes) -> dict[str, Any]:
    """OpenCLIP H without its last layer, which some files leave out together with the projection after it."""
    whole = "text_projection" in s or count(s, r"transformer\.resblocks\.(\d+)\.") > H_LAYERS_USED
    return describe_open_clip(s, skipped=int(whole), projected=False)


def describe_t5(s: Shapes) -> dict[str, Any]:
    """T5's encoder."""
    vocabulary, dim = s["shared.weight"]
    heads = s["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][1]
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in s
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": s["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": s["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_layers": count(s, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def describe_mmdit(s: Shapes) -> dict[str, Any]:
    """Stable Diffusion 3's transformer; heads are of 64 where no norm of theirs tells."""
    dim, channels, patch, _ = s["x_embedder.proj.weight"]
    layers = count(s, r"joint_blocks\.(\d+)\.")
    normalized = "joint_blocks.0.x_block.attn.ln_q.weight" in s
    head_dim = s["joint_blocks.0.x_block.attn.ln_q.weight"][0] if normalized else 64
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": s["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": s["context_embedder.weight"][1],
        "caption_projection_dim": dim,
        "pooled_projection_dim": s["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(s["pos_embed"][1]),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in s],
        "qk_norm": "rms_norm" if normalized else None,
    }


def describe_flux(s: Shapes) -> dict[str, Any]:
    """FLUX's transformer; a head's numbers go to the positions in the published proportion."""
    dim, channels = s["img_in.weight"]
    head_dim = s["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    apart = (n for n in range(2, head_dim, 2) if (head_dim - n) % 4 == 0)  # every axis takes pairs of numbers
    first = min(apart, key=lambda n: abs(8 * n - head_dim))
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": s["final_layer.linear.weight"][0],
        "num_layers": count(s, r"double_blocks\.(\d+)\."),
        "num_single_layers": count(s, r"single_blocks\.(\d+)\."),
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": s["txt_in.weight"][1],
        "pooled_projection_dim": s["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in s,
        "axes_dims_rope": [first, (head_dim - first) // 2, (head_dim - first) // 2],
    }


def describe_dit(s: Shapes) -> dict[str, Any]:
    """DiT under its makers' names, but for its heads."""
    _, channels, patch, _ = s["x_embedder.proj.weight"]
    return {
        "_class_name": "DiTTransformer2DModel",
        "in_channels": channels,
        "out_channels": s["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": count(s, r"blocks\.(\d+)\."),
        "num_embeds_ada_norm": s["y_embedder.embedding_table.weight"][0] - 1,
        "norm_type": "ada_norm_zero",
        "sample_size": patch * math.isqrt(s["pos_embed"][1]) if "pos_embed" in s else 32,
    }


def _index(name: str, components: Mapping[str, str], **more: Any) -> dict[str, Any]:
    libraries = {k: "transformers" if k.startswith(("text", "token")) else "diffusers" for k in components}
    return {"_class_name": name, **{k: [libraries[k], v] for k, v in components.items()}, **more}


_UNET = Part("unet", "model.diffusion_model.", keymaps.unet, describe_unet)
_VAE = Part("vae", "first_stage_model.", keymaps.autoencoder, describe_autoencoder)
_DISCRETE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "_class_name": "DDIMScheduler",
}
_SD = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "scheduler": "DDIMScheduler",
    "safety_checker": None,
    "feature_extractor": None,
}
_SD_INDEX = {
    **_index("StableDiffusionPipeline", {k: v for k, v in _SD.items() if v}),
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "sdxl",
        "conditioner.embedders.1.model.positional_embedding",
        (
            _UNET,
            _VAE,
            Part("text_encoder", "conditioner.embedders.0.transformer.", keymaps.clip, describe_clip),
            Part("text_encoder_2", "conditioner.embedders.1.model.", keymaps.open_clip, describe_open_clip),
        ),
        _index(
            "StableDiffusionXLPipeline",
            {
                "unet": "UNet2DConditionModel",
                "vae": "AutoencoderKL",
                "text_encoder": "CLIPTextModel",
                "text_encoder_2": "CLIPTextModelWithProjection",
                "tokenizer": "CLIPTokenizer",
                "tokenizer_2": "CLIPTokenizer",
                "scheduler": "EulerDiscreteScheduler",
            },
            force_zeros_for_empty_prompt=True,
        ),
        {**_DISCRETE, "_class_name": "EulerDiscreteScheduler"},
        {"scaling_factor": 0.13025},
    ),
    Layout(  # the refiner
        "sdxl",
        "conditioner.embedders.0.model.positional_embedding",
        (_UNET, _VAE, Part("text_encoder_2", "conditioner.embedders.0.model.", keymaps.open_clip, describe_open_clip)),
        _index(
            "StableDiffusionXLImg2ImgPipeline",
            {
                "unet": "UNet2DConditionModel",
                "vae": "AutoencoderKL",
                "text_encoder_2": "CLIPTextModelWithProjection",
                "tokenizer_2": "CLIPTokenizer",
                "scheduler": "EulerDiscreteScheduler",
            },
            force_zeros_for_empty_prompt=False,
            requires_aesthetics_score=True,
            text_encoder=[None, None],
            tokenizer=[None, None],
        ),
        {**_DISCRETE, "_class_name": "EulerDiscreteScheduler"},
        {"scaling_factor": 0.13025},
    ),
    Layout(
        "sd2",
        "cond_stage_model.model.positional_embedding",
        (_UNET, _VAE, Part("text_encoder", "cond_stage_model.model.", keymaps.open_clip, _describe_sd2_text)),
        _SD_INDEX,
        _DISCRETE,
        {"scaling_factor": 0.18215},
    ),
    Layout(
        "sd1",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        (_UNET, _VAE, Part("text_encoder", "cond_stage_model.transformer.", keymaps.clip, describe_clip)),
        _SD_INDEX,
        _DISCRETE,
        {"scaling_factor": 0.18215},
    ),
    Layout(
        "sd3",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        (
            Part("transformer", "model.diffusion_model.", keymaps.mmdit, describe_mmdit),
            _VAE,
            Part("text_encoder", "text_encoders.clip_l.transformer.", keymaps.clip, describe_clip),
            Part("text_encoder_2", "text_encoders.clip_g.transformer.", keymaps.clip, _describe_clip_g),
            Part("text_encoder_3", "text_encoders.t5xxl.transformer.", keymaps.t5, describe_t5, optional=True),
        ),
        _index(
            "StableDiffusion3Pipeline",
            {
                "transformer": "SD3Transformer2DModel",
                "vae": "AutoencoderKL",
                "text_encoder": "CLIPTextModelWithProjection",
                "text_encoder_2": "CLIPTextModelWithProjection",
                "text_encoder_3": "T5EncoderModel",
                "tokenizer": "CLIPTokenizer",
                "tokenizer_2": "CLIPTokenizer",
                "tokenizer_3": "T5TokenizerFast",
                "scheduler": "FlowMatchEulerDiscreteScheduler",
            },
        ),
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
    *(
        Layout(
            "flux",
            f"{prefix}double_blocks.0.img_attn.qkv.weight",
            (
                Part("transformer", prefix, keymaps.flux, describe_flux),
                Part("vae", "vae.", keymaps.autoencoder, describe_autoencoder),
                Part("text_encoder", "text_encoders.clip_l.transformer.", _plain_clip, _describe_plain_clip),
                Part("text_encoder_2", "text_encoders.t5xxl.transformer.", keymaps.t5, describe_t5),
            ),
            _index(
                "FluxPipeline",
                {
                    "transformer": "FluxTransformer2DModel",
                    "vae": "AutoencoderKL",
                    "text_encoder": "CLIPTextModel",
                    "text_encoder_2": "T5EncoderModel",
                    "tokenizer": "CLIPTokenizer",
                    "tokenizer_2": "T5TokenizerFast",
                    "scheduler": "FlowMatchEulerDiscreteScheduler",
                },
            ),
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
            {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        )
        for prefix in ("model.diffusion_model.", "")
    ),
)

DENOISERS = {  # of each kind, a name that its files have; see ``parts``
    _UNET: "input_blocks.0.0.weight",
    Part(
        "transformer", "model.diffusion_model.", keymaps.mmdit, describe_mmdit
    ): "joint_blocks.0.x_block.attn.qkv.weight",
    Part("transformer", "model.diffusion_model.", keymaps.flux, describe_flux): "double_blocks.0.img_attn.qkv.weight",
    Part("transformer", "", keymaps.dit, describe_dit): "y_embedder.embedding_table.weight",
}
