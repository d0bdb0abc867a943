"""Small additions to published models: LoRA and its kin, and words learned by textual inversion.

    W' = W + weight · (alpha / rank) · ΔW

| kind  | ΔW                                      | source                             |
|-------|-----------------------------------------|------------------------------------|
| LoRA  | up · down, with a core between for some | Hu et al. 2106.09685               |
| LoHa  | (a₁·b₁) ⊙ (a₂·b₂)                       | Hyeon-Woo et al. 2108.06098        |
| LoKr  | w₁ ⊗ w₂, each whole or a product        | Edalati et al. 2212.10650, LyCORIS |
| diff  | itself                                  |                                    |
| DoRA  | m · (W + δ) / |W + δ| − W, δ of above   | Liu et al. 2402.09353              |

A model with additions is another model: its tensors are made anew where they change and shared where they do not, so
that leaving an addition out gives the first model to the last bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints import keymaps
from sfumato.checkpoints.formats import weights, weights_header
from sfumato.checkpoints.keymaps import Place, to_theirs
from sfumato.checkpoints.published import ADDED_WORDS, Json, Published, read_json
from sfumato.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

# The last part of a tensor's name, in the words of kohya, diffusers, PEFT and LyCORIS, and what it is.
PARTS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "core",
    "lora_A.weight": "down", "lora_B.weight": "up",
    "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "alpha": "alpha", "diff": "diff", "diff_b": "diff_b",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "dora_scale": "dora_scale", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_PART = re.compile(r"(.+)\.(" + "|".join(re.escape(p) for p in sorted(PARTS, key=len, reverse=True)) + ")")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")  # diffusers of old


@dataclass(frozen=True)
class Addition:
    """A LoRA file's content: for each module that it names, the parts of its ΔW."""

    path: Path
    modules: Mapping[str, Mapping[str, Tensor]]


def read_lora(path: Path, *, allow_pickle: bool = False) -> Addition:
    """Read a LoRA, LoHa or LoKr file; BadCheckpoint for what is none, or of a kind that cannot be followed."""
    modules: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    if path.is_dir() and (path / PEFT_FILE).is_file():
        path = path / PEFT_FILE
    for name, tensor in weights(path, allow_pickle=allow_pickle).items():
        if m := _PROCESSOR.fullmatch(name):
            target = f"{m[1]}.{m[2]}" + (".0" if m[2] == "to_out" else "")
            modules.setdefault(target, {})[m[3]] = tensor
        elif m := _PART.fullmatch(name):
            modules.setdefault(m[1], {})[PARTS[m[2]]] = tensor
        else:
            strange.append(name)
    if not modules:
        raise BadCheckpoint(f"{path}: holds no LoRA (its first tensor is {min(strange, default='none')[:60]!r})")
    if strange:
        raise BadCheckpoint(f"{path}: {len(strange)} tensors are no part of a LoRA: {', '.join(strange[:3])}")
    for prefix, settings in _settings(path, allow_pickle).items():
        for name, parts in modules.items():
            if name.startswith(prefix) and "down" in parts and "alpha" not in parts:
                parts["alpha"] = _alpha(path, name, settings, len(parts["down"]))
    return Addition(path, modules)


PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' key in a file's header


def _settings(path: Path, allow_pickle: bool) -> Mapping[str, Json]:
    """What diffusers and PEFT state beside the tensors, by the beginning of the modules' names to which it applies."""
    stated = weights_header(path, allow_pickle=allow_pickle).metadata.get(METADATA)
    if stated is None:
        beside = path.with_name(PEFT_SETTINGS)
        return {"": read_json(beside)} if path.name == PEFT_FILE and beside.is_file() else {}
    try:
        settings: dict[str, dict[str, Any]] = {}
        for name, value in json.loads(stated).items():
            prefix, _, key = name.partition(".")
            settings.setdefault(f"{prefix}.", {})[key] = value
    except (ValueError, AttributeError, RecursionError):
        raise BadCheckpoint(f"{path}: {METADATA} in its metadata is damaged") from None
    return settings


def _alpha(path: Path, name: str, settings: Json, rank: int) -> Tensor:
    """A module's alpha by PEFT's settings: of the first pattern that its name ends with, else the one for all."""
    import torch

    try:
        patterns = settings.get("alpha_pattern") or {}
        alpha = next((v for k, v in patterns.items() if f".{name}".endswith(f".{k}")), settings.get("lora_alpha", rank))
        return torch.tensor(float(alpha) * (rank**0.5 if settings.get("use_rslora") else 1.0))
    except (TypeError, ValueError, AttributeError):
        raise BadCheckpoint(f"{path}: the settings stated with it are damaged: no alpha for {name}") from None


def add_loras(model: Published, loras: Sequence[tuple[Addition, float]], *, partial: bool = False) -> Published:
    """The model with LoRAs, each with a weight; 0 changes nothing, negative ones take away.

    Raises BadCheckpoint for a LoRA that matches nothing, whose shapes are of another model or, unless ``partial``,
    some of whose modules have no place.
    """
    import torch

    if not loras:
        return model
    places = {name: (component, place) for component in model.tensors for name, place in _names(model, component)}
    sums: dict[tuple[str, str], Tensor] = {}
    notes: list[str] = []
    for lora, weight in loras:
        lost = [name for name in lora.modules if _key(name) not in places]
        if len(lost) == len(lora.modules):
            raise BadCheckpoint(f"{lora.path}: matches nothing in {model.path}; it is for another family ({lost[0]})")
        if lost and not partial:
            raise BadCheckpoint(
                f"{lora.path}: {len(lost)} of {len(lora.modules)} modules have no place in {model.path}: "
                f"{', '.join(lost[:3])}"
            )
        left = f" ({len(lost)} of {len(lora.modules)} modules without a place: {', '.join(lost[:3])})" if lost else ""
        notes.append(f"{lora.path.name} × {weight:g}{left}")
        for name, parts in lora.modules.items():
            if name in lost:
                continue
            component, place = places[_key(name)]
            own = model.tensors[component]
            try:
                for target, delta in _deltas(parts, place, own):
                    key = (component, target)
                    sums[key] = sums.get(key, own[target].float()) + weight * delta
                    if not torch.isfinite(sums[key]).all():
                        raise BadCheckpoint(f"{lora.path}: makes NaN of {component}.{target}: it is damaged")
            except (RuntimeError, KeyError, ValueError, IndexError, ZeroDivisionError) as e:
                reason = str(e).splitlines()[0][:120]
                raise BadCheckpoint(f"{lora.path}: {name} does not fit {model.path}: {reason}") from None
    tensors = {component: dict(own) for component, own in model.tensors.items()}
    for (component, target), tensor in sums.items():
        tensors[component][target] = tensor
    return replace(model, tensors=tensors, why={**model.why, "additions": ", ".join(notes)})


def _key(name: str) -> str:
    """The form in which names of modules are compared: kohya writes all dots as underscores."""
    name = name.removeprefix("base_model.model.")
    name = re.sub(r"^(diffusion_model|model\.diffusion_model)\.", "lora_unet_", name)
    name = re.sub(r"^(unet|transformer)\.", "lora_unet_", name)
    name = re.sub(r"^(lora_transformer|lycoris)_", "lora_unet_", name)
    name = re.sub(r"^text_encoder\.", "lora_te1_", name)
    name = re.sub(r"^text_encoder_(\d)\.", r"lora_te\1_", name)
    name = re.sub(r"^lora_te_", "lora_te1_", name)
    return name.replace(".", "_")


def _names(model: Published, component: str) -> Iterator[tuple[str, Place]]:
    """Every name that a LoRA may give to a module of a component, with the module's place, without ".weight"."""
    prefix = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_"}.get(component)
    prefix = prefix or (f"lora_te{component[-1]}_" if component.startswith("text_encoder_") else None)
    if prefix is None:
        return
    # kohya's trainer numbers T5 by its place in SD 3, in FLUX too.
    third = component == "text_encoder_2" and "d_model" in model.configs.get(component, {})
    for name in model.tensors[component]:
        if name.endswith(".weight"):
            own = name.removesuffix(".weight")
            yield _key(prefix + own), Place(own, (own,))
            if component in ("unet", "transformer"):  # PEFT's own files name no component
                yield _key(own), Place(own, (own,))
            if component.startswith("text_encoder"):
                yield _key(f"{prefix}text_model.{own}"), Place(own, (own,))
            if third:
                yield _key(f"lora_te3_{own}"), Place(own, (own,))
    for place in _originals(model.configs.get(component, {})):
        if place.theirs.endswith(".weight") and all(name in model.tensors[component] for name in place.ours):
            ours = tuple(name.removesuffix(".weight") for name in place.ours)
            yield _key(prefix + place.theirs.removesuffix(".weight")), replace(place, ours=ours)


def _originals(config: Json) -> Iterable[Place]:
    """The table of a network's names in single files, as LoRAs trained on those have them."""
    if "num_single_layers" in config:
        return keymaps.flux(config)
    if "pos_embed_max_size" in config:
        return keymaps.mmdit(config)
    return keymaps.unet(config) if "down_block_types" in config else ()


def _deltas(parts: Mapping[str, Tensor], place: Place, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The change of each of our tensors that a module's parts make, shaped like it."""
    if "diff_b" in parts:
        yield from _cut(parts["diff_b"].float(), place, own, "bias")
    if magnitudes := parts.keys() & {"dora_scale", "magnitude"}:
        whole = to_theirs({name: own[f"{name}.weight"].float() for name in place.ours}, [place])[place.theirs]
        kind = min(magnitudes)
        scale = parts[kind].float()
        # PEFT's are always of rows, though of a convolution they come as (1, out, 1, 1).
        rows = kind == "magnitude" or scale.ndim < 2 or len(scale) == len(whole)
        yield from _cut(_rescaled(whole, delta(parts), scale, rows) - whole, place, own, "weight")
    elif parts.keys() - {"alpha", "diff_b"}:
        yield from _cut(delta(parts), place, own, "weight")


def _cut(change: Tensor, place: Place, own: Mapping[str, Tensor], kind: str) -> Iterator[tuple[str, Tensor]]:
    if place.shape == "halves":
        change = change.roll(len(change) // 2, 0)
    elif place.shape == "transposed":
        change = change.T
    for name, part in zip(place.ours, place.split(change), strict=True):
        target = f"{name}.{kind}"
        if part.numel() != own[target].numel() or len(part) != len(own[target]):
            raise ValueError(f"it changes {tuple(part.shape)}, the model has {tuple(own[target].shape)}")
        yield target, part.reshape(own[target].shape)


def delta(parts: Mapping[str, Tensor]) -> Tensor:
    """ΔW of a module, times alpha/rank, in float32; KeyError if a part is missing.

    Linear layers give (out, in), convolutions (out, in, height, width).
    """
    import torch

    p = {k: t.float() for k, t in parts.items()}
    if "diff" in p:
        return p["diff"]
    if "up" in p or "down" in p:
        down, rank = p["down"], p["down"].shape[0]
        change = _product(p["up"].flatten(1), down, p.get("core"))
    elif "hada_w1_a" in p:
        rank = p["hada_w1_b"].shape[0]
        change = _product(p["hada_w1_a"], p["hada_w1_b"], p.get("hada_t1"), swapped=True)
        change = change * _product(p["hada_w2_a"], p["hada_w2_b"], p.get("hada_t2"), swapped=True)
    else:
        rank = 0
        if "lokr_w1" not in p:
            rank = p["lokr_w1_b"].shape[0]
        if "lokr_w2" not in p:
            rank = p["lokr_w2_b"].shape[0]
        first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        second = (
            p["lokr_w2"] if "lokr_w2" in p else _product(p["lokr_w2_a"], p["lokr_w2_b"], p.get("lokr_t2"), swapped=True)
        )
        change = torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)
    scale = float(p["alpha"]) / rank if "alpha" in p and rank else 1.0
    return change * scale


def _rescaled(weight: Tensor, change: Tensor, magnitude: Tensor, rows: bool) -> Tensor:
    """W + ΔW with the length of each row, or of each column, set to a magnitude."""
    import torch

    new = weight + change.reshape(weight.shape)
    axes = [d for d in range(new.ndim) if d != (0 if rows else 1)]
    shape = [n if d not in axes else 1 for d, n in enumerate(new.shape)]
    return new * (magnitude.reshape(shape) / torch.linalg.vector_norm(new, dim=axes, keepdim=True))


def _product(up: Tensor, down: Tensor, core: Tensor | None, swapped: bool = False) -> Tensor:
    """up · down, with a core (r, r, height, width) between them if there is one (Tucker's form)."""
    import torch

    if core is None:
        return (up @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    if swapped:  # LyCORIS's Hadamard and Kronecker products store up as (r, out)
        up = up.T
    return torch.einsum("or,rshw,si->oihw", up, core, down.flatten(1))


def add_words(model: Published, path: Path, word: str, *, allow_pickle: bool = False) -> Published:
    """The model with a word learned by textual inversion (2208.01618), which may stand for several vectors.

    Args:
        word: how it is written in prompts.

    Raises BadCheckpoint for a file that holds no such word, or one of another width.
    """
    import torch

    found = {k: t for k, t in weights(path, allow_pickle=allow_pickle).items() if t.ndim}
    by_tower = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    if found.keys() <= by_tower.keys() and found:
        vectors = {by_tower[k]: t for k, t in found.items()}
    elif len(found) == 1:
        vectors = {"text_encoder": next(iter(found.values()))}
    else:
        raise BadCheckpoint(f"{path}: holds {len(found)} tensors, and a learned word is one, or clip_l and clip_g")
    configs, tensors = dict(model.configs), {c: dict(own) for c, own in model.tensors.items()}
    tokenizers = {k: dict(v) for k, v in model.tokenizers.items()}
    table = "embeddings.token_embedding.weight"
    for component, vector in vectors.items():
        rows = vector.float().reshape(-1, vector.shape[-1])
        old = tensors.get(component, {}).get(table)
        if old is None or old.shape[1] != rows.shape[1]:
            width = "none" if old is None else old.shape[1]
            raise BadCheckpoint(f"{path}: its vectors are of width {rows.shape[1]}, the {component}'s of {width}")
        tensors[component][table] = torch.cat([old.float(), rows])
        configs[component] = {**configs[component], "vocab_size": len(old) + len(rows)}
        texts = tokenizers.setdefault(component.replace("text_encoder", "tokenizer"), {})
        words = json.loads(texts.get(ADDED_WORDS, "{}"))
        texts[ADDED_WORDS] = json.dumps({**words, word: list(range(len(old), len(old) + len(rows)))})
    return replace(model, configs=configs, tensors=tensors, tokenizers=tokenizers)
