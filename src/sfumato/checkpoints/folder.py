"""Models as folders, the form of the Hugging Face hub: a folder per component, each a config.json and safetensors.

    model_index.json
    unet/           config.json   diffusion_pytorch_model[.fp16].safetensors
    text_encoder/   config.json   model-00001-of-00002.safetensors  …  model.safetensors.index.json
    scheduler/      scheduler_config.json
    tokenizer/      vocab.json merges.txt, or tokenizer.json

Nothing is fetched, no Python in the folder is looked at, and no file outside it is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.checkpoints.formats import placeholders
from sfumato.checkpoints.formats import weights as read_weights
from sfumato.checkpoints.published import (
    NETWORKS,
    TOKENIZER_FILES,
    TOKENIZERS,
    Json,
    Published,
    read_json,
    read_text,
)
from sfumato.errors import BadCheckpoint, NoResources

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}"
_SHARD = re.compile(r"-?\d{5}-of-\d{5}")
_VARIANT = re.compile(r"[A-Za-z0-9_-]{1,40}")


def read_folder(
    path: Path, variant: str | None = None, *, weights: bool = True, allow_pickle: bool = False
) -> Published:
    """Read a published folder; tensors are mapped, not copied.

    Args:
        path: the folder that holds model_index.json.
        variant: which files to take, such as "fp16"; None takes those without a variant or, if there are none, the
            only one there is.
        weights: False leaves the tensors without numbers.
        allow_pickle: whether components without safetensors may be read from pickles: see ``pickles``.

    Raises BadCheckpoint, naming the file, for what is missing, damaged, or names files elsewhere.
    """
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise BadCheckpoint(f"variant {variant!r} is no plain name such as fp16")
    configs: dict[str, Json] = {"": read_json(path / "model_index.json")}
    tensors: dict[str, dict[str, Tensor]] = {}
    files: list[Path] = []
    for component in NETWORKS:
        entry = configs[""].get(component)
        if isinstance(entry, list) and (not entry or entry[0] is None):  # said to be absent
            continue
        folder = path / component
        if not folder.is_dir():
            if entry is not None:
                raise BadCheckpoint(f"{path}: its model_index.json names a {component}, but there is no such folder")
            continue
        configs[component] = read_json(folder / "config.json")
        own = weight_files(folder, variant, allow_pickle=allow_pickle)
        files += own
        tensors[component] = tidy(component, _merge(own, read_weights if weights else placeholders, allow_pickle))
    if (path / "scheduler").is_dir():
        configs["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
    tokenizers = {c: read_tokenizer(path / c) for c in TOKENIZERS if (path / c).is_dir()}
    return Published(path, "folder", configs, tensors, tokenizers, {}, tuple(files))


def read_tokenizer(folder: Path) -> dict[str, str]:
    """The texts of a tokenizer's files, by name."""
    return {name: read_text(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def weight_files(folder: Path, variant: str | None = None, *, allow_pickle: bool = False) -> list[Path]:
    """The files that make up one component, all of them there: safetensors or, if there are none, allowed pickles.

    Raises BadCheckpoint if there are none, if one of several is missing, or if the index names other places.
    """
    variants = [variant] if variant is not None else [None, *_variants(folder)]
    for v in variants:
        for single, index in variant_names(v):
            if (folder / single).is_file():
                return [folder / single]
            if (folder / index).is_file():
                return _shards(folder / index)
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".ckpt", ".pt", ".pth", ".msgpack")]
    if allow_pickle:  # as folders of old have them
        for single, index in variant_names(variant, "bin"):
            if (folder / single).is_file():
                return [folder / single]
            if (folder / index).is_file():
                return _shards(folder / index, "bin")
    if variant is not None:
        raise BadCheckpoint(f"{folder}: has no safetensors of the variant {variant!r}")
    if others:
        raise BadCheckpoint(
            f"{folder}: its weights are only in {others[0]}, a form that can run code when it is read; "
            "take the safetensors of the same model, or allow it with --allow-pickle"
        )
    raise BadCheckpoint(f"{folder}: holds no safetensors file with weights")


def variant_names(variant: str | None, form: str = "safetensors") -> list[tuple[str, str]]:
    """The names that a component's weights may have: of one file, and of the index of several."""
    mark = "" if variant is None else f".{variant}"
    stems = ("diffusion_pytorch_model", "pytorch_model" if form == "bin" else "model")
    return [(f"{stem}{mark}.{form}", f"{stem}.{form}.index{mark}.json") for stem in stems]


def _variants(folder: Path) -> list[str]:
    """The variant of files that exist in one variant only; BadCheckpoint if there are several to choose from."""
    pattern = r"(?:diffusion_pytorch_model|model)(?:\.({v})\.safetensors|\.safetensors\.index\.({v})\.json)"
    names = re.compile(pattern.format(v=_VARIANT.pattern))
    found = {_SHARD.sub("", m[1] or m[2]) for p in folder.iterdir() if (m := names.fullmatch(p.name))} - {""}
    stems = ("diffusion_pytorch_model", "model")
    if len(found) > 1 and not any((folder / f"{stem}.safetensors").is_file() for stem in stems):
        raise BadCheckpoint(f"{folder}: has the variants {', '.join(sorted(found))}; say which one to take")
    return sorted(found)


def _shards(index: Path, form: str = "safetensors") -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{index}: holds no weight_map")
    names = sorted({str(v) for v in weight_map.values()})
    for name in names:
        if not re.fullmatch(rf"{_PLAIN_NAME}\.{form}", name):
            raise BadCheckpoint(f"{index}: names {name[:80]!r}, which is no plain {form} file beside it")
        if not (index.parent / name).is_file():
            raise BadCheckpoint(f"{index}: names {name}, which is not there: fetch it, or fetch the whole folder anew")
    return [index.parent / name for name in names]


def _merge(files: list[Path], read: Callable[..., dict[str, Tensor]], allow_pickle: bool) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in files:
        part = read(file, allow_pickle=allow_pickle)
        if twice := merged.keys() & part.keys():
            raise BadCheckpoint(f"{file}: holds {min(twice)}, which another file of the same component holds too")
        merged |= part
    return merged


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before 2023


def tidy(component: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names of today: older files have others, and some that follow from the rest."""
    tidy = {}
    for name, tensor in tensors.items():
        if component.startswith("text_encoder"):
            name = name.removeprefix("text_model.")
            if name in ("embeddings.position_ids", "encoder.embed_tokens.weight") and len(tensors) > 1:
                if name == "encoder.embed_tokens.weight" and "shared.weight" not in tensors:
                    name = "shared.weight"
                else:
                    continue
        elif component == "vae":
            head, _, leaf = name.rpartition(".")
            path, _, module = head.rpartition(".")
            if module in _OLD_ATTENTION:
                name = f"{path}.{_OLD_ATTENTION[module]}.{leaf}"
                if tensor.ndim == 4:
                    tensor = tensor[:, :, 0, 0]
        tidy[name] = tensor
    return tidy


def write_folder(model: Published, path: Path) -> None:
    """Write a published model as a folder that is there whole or not at all; BadCheckpoint if the path is taken."""
    import shutil
    import tempfile

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.exists():
        raise BadCheckpoint(f"{path} exists already; name a folder that does not")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as e:
        raise NoResources(f"cannot write {path}: {e.strerror}") from None
    try:
        for component, config in model.configs.items():
            folder = temporary / component
            folder.mkdir(exist_ok=True)
            name = {"": "model_index.json", "scheduler": "scheduler_config.json"}.get(component, "config.json")
            (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for component, tensors in model.tensors.items():
            text = component.startswith("text_encoder")
            prefix = "text_model." if text and "embeddings.token_embedding.weight" in tensors else ""
            named = {(k if k.startswith("text_projection") else prefix + k): t.contiguous() for k, t in tensors.items()}
            file = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
            save_file(named, temporary / component / file, {"format": "pt"})
        for component, texts in model.tokenizers.items():
            (temporary / component).mkdir(exist_ok=True)
            for name, text in texts.items():
                (temporary / component / name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        raise NoResources(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
