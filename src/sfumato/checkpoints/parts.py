"""One network alone, to go with a model: a ControlNet, an autoencoder, a denoiser, an IP-Adapter, from folder or file.

| network          | folder, and its names in files | files under their makers' names                                 |
|------------------|--------------------------------|-----------------------------------------------------------------|
| ControlNet       | ControlNetModel                | Zhang's, ``control_model.*`` or without the prefix              |
| KL autoencoder   | AutoencoderKL                  | latent diffusion's, ``encoder.down.*``                          |
| tiny autoencoder | AutoencoderTiny                | TAESD's ``1.weight`` …, the decoder alone or both with prefixes |
| denoiser         |                                | those of single files, with their prefix or without             |
| IP-Adapter       |                                | ``image_proj.*`` and ``ip_adapter.*``                           |
| image encoder    | CLIPVisionModelWithProjection  |                                                                 |

A file's names and shapes tell which it is; its name does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints import keymaps
from sfumato.checkpoints.folder import tidy, weight_files
from sfumato.checkpoints.formats import weights, weights_header
from sfumato.checkpoints.keymaps import Place
from sfumato.checkpoints.published import Json, read_json
from sfumato.checkpoints.single_file import (
    DENOISERS,
    FLUX_TIMES,
    Shapes,
    check_form,
    count,
    describe_autoencoder,
    describe_foreign,
    describe_kl,
    describe_unet,
    ignored,
    not_whole,
    placed,
    prediction_marks,
)
from sfumato.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PartOfModel:
    """A network's configuration, its tensors under the folders' names, and the files that hold them.

    Args:
        scheduler: what it changes of the model's scheduler, and ``why`` that is known.
    """

    config: Json
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    scheduler: Json = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)


def read_controlnet(path: Path, *, allow_pickle: bool = False) -> PartOfModel:
    """Read a ControlNet; BadCheckpoint, naming the file, for what is none."""
    if path.is_dir():
        return _folder(path, "ControlNetModel", allow_pickle)
    tensors = weights(path, allow_pickle=allow_pickle)
    raw = {k.removeprefix("control_model."): t for k, t in tensors.items() if _is_control(k)}
    shapes = {k: tuple(t.shape) for k, t in raw.items()}
    try:
        if "controlnet_cond_embedding.conv_in.weight" in raw:
            return PartOfModel(_describe_controlnet(shapes), raw, (path,))
        if "input_hint_block.0.weight" in raw:
            config = _describe_original_controlnet(shapes)
            return _renamed(path, "a ControlNet", config, raw, list(keymaps.controlnet(config)))
    except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError) as e:
        raise not_whole(f"{path}: the ControlNet", e) from None
    raise BadCheckpoint(f"{path}: no ControlNet: {describe_foreign(shapes)}")


def read_autoencoder(path: Path, *, allow_pickle: bool = False) -> PartOfModel:
    """Read an autoencoder, the KL one or the tiny one, whole or the decoder alone; BadCheckpoint for what is none."""
    if path.is_dir():
        return _folder(path, "AutoencoderKL or AutoencoderTiny", allow_pickle)
    raw = weights(path, allow_pickle=allow_pickle)
    prefix = "first_stage_model." if any(k.startswith("first_stage_model.") for k in raw) else ""
    raw = {k.removeprefix(prefix): t for k, t in raw.items() if k.startswith(prefix)}
    raw = {k: t for k, t in raw.items() if not re.match(r"loss\.|model_ema\.", k)}
    shapes = {k: tuple(t.shape) for k, t in raw.items()}
    try:
        if "encoder.down.0.block.0.conv1.weight" in raw:
            config = describe_autoencoder(shapes)
            return _renamed(path, "an autoencoder", config, raw, list(keymaps.autoencoder(config)))
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in raw:
            raw = tidy("vae", raw)
            named = describe_kl(
                {k: tuple(t.shape) for k, t in raw.items()},
                "encoder.down_blocks", "resnets", "encoder.mid_block.attentions.0.to_q.weight",
            )  # fmt: skip
            return PartOfModel(named, raw, (path,))
        if (tiny := _tiny(raw)) is not None:
            shapes = {k: tuple(t.shape) for k, t in tiny.items()}
            return PartOfModel(_describe_tiny(shapes), tiny, (path,))
    except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError) as e:
        raise not_whole(f"{path}: the autoencoder", e) from None
    raise BadCheckpoint(f"{path}: no autoencoder: {describe_foreign(shapes)}")


def read_ip_adapter(path: Path, *, allow_pickle: bool = False) -> PartOfModel:
    """Read an IP-Adapter; BadCheckpoint, naming the file, for what is none, or of a kind that cannot be followed."""
    if path.is_dir():
        raise BadCheckpoint(f"{path}: a folder; name the IP-Adapter's own file in it")
    raw = weights(path, allow_pickle=allow_pickle)
    shapes = {k: tuple(t.shape) for k, t in raw.items()}
    if not any(re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", k) for k in raw):
        raise BadCheckpoint(f"{path}: no IP-Adapter: {describe_foreign(shapes)}")
    if any("_lora." in k or k.startswith("image_proj.perceiver_resampler.") for k in raw) or (
        "image_proj.norm.weight" in raw and "image_proj.proj.weight" not in raw
    ):
        raise BadCheckpoint(f"{path}: an IP-Adapter for what a recognizer of faces says (FaceID): not supported")
    try:
        return PartOfModel(_describe_ip_adapter(shapes), raw, (path,))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as e:
        raise not_whole(f"{path}: the IP-Adapter", e) from None


def read_image_encoder(path: Path, *, allow_pickle: bool = False) -> PartOfModel:
    """Read CLIP's tower for pictures from its folder, or from that of a whole CLIP; BadCheckpoint for what is none."""
    if not path.is_dir():
        raise BadCheckpoint(f"{path}: an image encoder is a folder with its config.json, which tells its heads")
    config = read_json(path / "config.json")
    kind = str((config.get("architectures") or [config.get("model_type")])[0])
    if kind == "CLIPModel" and isinstance(config.get("vision_config"), dict):
        config = {"projection_dim": config.get("projection_dim", 512), **config["vision_config"]}
    elif kind not in ("CLIPVisionModelWithProjection", "clip_vision_model"):
        raise BadCheckpoint(
            f"{path}: its config.json is of {kind[:60]!r}, not of CLIPVisionModelWithProjection or CLIPModel"
        )
    files = weight_files(path, allow_pickle=allow_pickle)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= weights(file, allow_pickle=allow_pickle)
    own = ("vision_model.", "visual_projection.")
    kept = {k: t for k, t in tensors.items() if k.startswith(own) and not k.endswith(".position_ids")}
    return PartOfModel(config, kept, tuple(files))


def _describe_ip_adapter(s: Shapes) -> dict[str, Any]:
    numbers = sorted(int(m[1]) for k in s if (m := re.fullmatch(r"ip_adapter\.(\d+)\.to_k_ip\.weight", k)))
    if numbers != list(range(1, 2 * len(numbers), 2)):
        raise ValueError(f"one of the layers 1 to {numbers[-1]}")
    keys = [s[f"ip_adapter.{i}.to_k_ip.weight"] for i in numbers]
    common = {"attention": [[context, dim] for dim, context in keys]}
    if "image_proj.proj.weight" in s:
        (out, features), (dim,) = s["image_proj.proj.weight"], s["image_proj.norm.weight"]
        return {**common, "kind": "plain", "features": features, "dim": dim, "tokens": out // dim}
    if "image_proj.proj.3.weight" in s:
        (inner, features), (dim,) = s["image_proj.proj.0.weight"], s["image_proj.proj.3.weight"]
        return {**common, "kind": "full", "features": features, "dim": dim, "tokens": 0, "inner": inner}
    _, tokens, inner = s["image_proj.latents"]
    queries = s["image_proj.layers.0.0.to_q.weight"][0]
    heads = max(1, queries // 64)  # of 64, as all that are published
    return {
        **common,
        "kind": "plus",
        "features": s["image_proj.proj_in.weight"][1],
        "dim": s["image_proj.proj_out.weight"][0],
        "tokens": tokens,
        "inner": inner,
        "layers": count(s, r"image_proj\.layers\.(\d+)\."),
        "heads": heads,
        "head_dim": queries // heads,
        "expanded": s["image_proj.layers.0.1.1.weight"][0],
    }


def _folder(path: Path, what: str, allow_pickle: bool) -> PartOfModel:
    config = read_json(path / "config.json")
    if config.get("_class_name") not in what.split(" or "):
        raise BadCheckpoint(f"{path}: its config.json is of {str(config.get('_class_name'))[:60]!r}, not of {what}")
    files = weight_files(path, allow_pickle=allow_pickle)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= weights(file, allow_pickle=allow_pickle)
    return PartOfModel(config, tidy("vae", tensors) if "Autoencoder" in what else tensors, tuple(files))


def _renamed(
    path: Path, what: str, config: dict[str, Any], raw: Mapping[str, Tensor], places: list[Place]
) -> PartOfModel:
    """A part whose tensors have their makers' names; BadCheckpoint if some have no place in it."""
    if left := raw.keys() - {p.theirs for p in places}:
        raise BadCheckpoint(f"{path}: {len(left)} tensors have no place in {what}: {min(left)}")
    return PartOfModel(config, placed(path, raw, places), (path,))


def _is_control(name: str) -> bool:
    """Published ControlNets of the first days carry the model they were trained on as well."""
    return not name.startswith(("model.", "first_stage_model.", "cond_stage_model.", "model_ema")) and name not in (
        "logvar", "lora_controlnet",
    )  # fmt: skip


def _describe_original_controlnet(s: Shapes) -> dict[str, Any]:
    hints = sorted(int(m[1]) for k in s if (m := re.fullmatch(r"input_hint_block\.(\d+)\.weight", k)))
    widths = [s[f"input_hint_block.{i}.weight"][0] for i in hints[:-1]]
    unet = describe_unet({**s, "out.2.weight": s["input_blocks.0.0.weight"]})
    return _control(unet, widths[0::2], s["input_hint_block.0.weight"][1])


def _describe_controlnet(s: Shapes) -> dict[str, Any]:
    """A configuration from the folders' names, for files that left theirs behind."""
    n = count(s, r"down_blocks\.(\d+)\.")
    widths = [s[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(n)]
    blocks = [count(s, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in range(n)]
    depths = [count(s, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.") for i in range(n)]
    middle = count(s, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    hints = count(s, r"controlnet_cond_embedding\.blocks\.(\d+)\.") // 2
    hint_widths = [s["controlnet_cond_embedding.conv_in.weight"][0]]
    hint_widths += [s[f"controlnet_cond_embedding.blocks.{2 * i + 1}.weight"][0] for i in range(hints)]
    linear = len(s["mid_block.attentions.0.proj_in.weight"]) == 2
    vector = s["add_embedding.linear_1.weight"][1] if "add_embedding.linear_1.weight" in s else 0
    layers = [*depths[:-1], middle or depths[-1]]
    unet = {
        "in_channels": s["conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "transformer_layers_per_block": [d or 1 for d in layers],
        "cross_attention_dim": s["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, w // 64) for w in widths] if linear else 8,
        "norm_num_groups": math.gcd(32, *widths),
        "addition_embed_type": "text_time" if vector else None,
        "addition_time_embed_dim": 256 if vector else None,
        "projection_class_embeddings_input_dim": vector or None,
    }
    return _control(unet, hint_widths, s["controlnet_cond_embedding.conv_in.weight"][1])


UP = "reverse_transformer_layers_per_block"


def _control(unet: Mapping[str, Any], widths: list[int], channels: int) -> dict[str, Any]:
    kept = {k: v for k, v in unet.items() if k not in ("up_block_types", "out_channels", "sample_size", UP)}
    return {
        **kept,
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": widths,
        "conditioning_channels": channels,
        "read from shapes": True,
    }


def _tiny(raw: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tiny autoencoder's tensors under the folder's names; None if it is none.

    Its makers number a decoder's layers from the clamp before the first.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        m = re.fullmatch(r"(?:(?:taesd_)?(encoder|decoder)\.)?(layers\.)?(\d+)\.(.+)", name)
        if not m:
            return None
        half = m[1] or ("decoder" if "1.weight" in raw else "encoder")
        shifted = half == "decoder" and not m[2]
        result[f"{half}.layers.{int(m[3]) - shifted}.{m[4]}"] = tensor
    return result or None


def _describe_tiny(s: Shapes) -> dict[str, Any]:
    config: dict[str, Any] = {"_class_name": "AutoencoderTiny", "in_channels": 3, "out_channels": 3}
    for half in ("encoder", "decoder"):
        last = count(s, rf"{half}\.layers\.(\d+)\.") - 1
        if last < 0:
            continue
        blocks, widths = [0], [s[f"{half}.layers.0.weight"][0]]
        for i in range(1, last):
            if f"{half}.layers.{i}.conv.0.weight" in s:
                blocks[-1] += 1
            elif f"{half}.layers.{i}.weight" in s and f"{half}.layers.{i}.bias" not in s:
                blocks.append(0)
                widths.append(s[f"{half}.layers.{i}.weight"][0])
        config |= {f"num_{half}_blocks": blocks, f"{half}_block_out_channels": widths}
        first, final = s[f"{half}.layers.0.weight"], s[f"{half}.layers.{last}.weight"]
        config["latent_channels"] = final[0] if half == "encoder" else first[1]
    return config


UNTOLD = ("attention_head_dim", "num_attention_heads", "axes_dims_rope", "sample_size")  # by shapes


def read_denoiser(path: Path, base: Json, *, allow_pickle: bool = False) -> PartOfModel:
    """Read a denoiser alone, under the names of single files, as FLUX and SD 3 and GGUF files are published.

    Args:
        base: the configuration of the denoiser whose place it takes, for what shapes do not tell.

    Raises BadCheckpoint for what is none.
    """
    raw = weights(path, allow_pickle=allow_pickle)
    check_form(path, raw)
    for part, sign in DENOISERS.items():
        prefix = next((p for p in (part.prefix, "") if f"{p}{sign}" in raw), None)
        if prefix is None:
            continue
        own = {k.removeprefix(prefix): t for k, t in raw.items() if k.startswith(prefix)}
        try:
            described = part.describe({k: tuple(t.shape) for k, t in own.items()})
            places = list(part.table(described))
        except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError) as e:
            raise not_whole(f"{path}: the denoiser", e) from None
        theirs, ours = described["_class_name"], base.get("_class_name", described["_class_name"])
        dit = (
            theirs == "DiTTransformer2DModel" and base.get("norm_type") == "ada_norm_zero"
        )  # of old under another name
        if theirs != ours and not dit:
            raise BadCheckpoint(f"{path}: a denoiser for another family: {theirs}, not {ours}")
        if left := sorted(
            k for k in own.keys() - {p.theirs for p in places} if not (ignored(k) or (dit and k == "pos_embed"))
        ):
            raise BadCheckpoint(f"{path}: {len(left)} tensors have no place in a denoiser: {', '.join(left[:3])}")
        told = {**described, **base} if part.component == "unet" or dit else {**base, **described}
        told |= {k: base[k] for k in UNTOLD if k in base}
        if dit and "pos_embed" in own:
            told["sample_size"] = described["sample_size"]
        why: dict[str, str] = {}
        scheduler: Json = {}
        if part.component == "unet":
            metadata = weights_header(path, allow_pickle=allow_pickle).metadata
            scheduler = prediction_marks(raw, metadata, why)
        elif "guidance_embeds" in described and described["guidance_embeds"] != base.get("guidance_embeds", False):
            scheduler = FLUX_TIMES[described["guidance_embeds"]]
        return PartOfModel(told, placed(path, own, places), (path,), scheduler, why)
    raise BadCheckpoint(f"{path}: no denoiser: {describe_foreign({k: tuple(t.shape) for k, t in raw.items()})}")
