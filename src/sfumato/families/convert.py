"""From one form of a published model to the other: folder ↔ single file, bitwise.

sfumato convert sd-turbo/ sd-turbo.safetensors
sfumato convert v1-5-pruned.safetensors v1-5/
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sfumato.checkpoints.folder import read_folder, write_folder
from sfumato.checkpoints.formats import form_of, weights
from sfumato.checkpoints.published import Json, Published
from sfumato.checkpoints.single_file import LAYOUTS, Layout, read_single_file, write_single_file, write_tensors
from sfumato.checkpoints.tensors import read_header
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families import check_variant, recognize
from sfumato.text.tokenizer import (
    END,
    START,
    T5_ROWS,
    clip_vocabulary,
    packaged_merges,
    packaged_pairs,
    packaged_pieces,
)


def convert(source: Path, target: Path, variant: str | None = None, *, allow_pickle: bool = False) -> Path:
    """Write the model at ``source``, a folder or a single file, to ``target`` in the other form, and return it.

    A pickle or a GGUF file becomes a safetensors file of the same tensors if the target's name ends so. Raises
    BadCheckpoint if the source is not whole, has no other form, or the target exists.
    """
    check_variant(source, variant)
    if source.is_dir():
        if target.suffix != ".safetensors":
            raise BadRequest(f"{target}: a folder becomes a single file, whose name must end in .safetensors")
        model = _without_packaged(read_folder(source, variant, allow_pickle=allow_pickle))
        write_single_file(model, target, layout_of(model))
    elif target.suffix != ".safetensors":
        write_folder(with_tokenizers(read_single_file(source, allow_pickle=allow_pickle)), target)
    elif form_of(source) == "safetensors":
        read_header(source)  # a file of no known form is refused as such
        raise BadRequest(f"{source} is a safetensors file already; name a folder to convert it to")
    else:
        write_tensors(weights(source, allow_pickle=allow_pickle), target)
    return target


def layout_of(model: Published) -> Layout:
    """The layout of single files that a folder's parts fit into; BadCheckpoint if there is none."""
    family, _ = recognize(model)
    layouts = [layout for layout in LAYOUTS if layout.family == family]
    if not layouts:
        raise BadCheckpoint(f"{model.path}: there is no single-file form for a model of the family {family}")
    return min(layouts, key=lambda own: sum(p.component not in model.tensors for p in own.parts if not p.optional))


T5_SETTINGS = {
    "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100,
    "model_max_length": 512,
}  # fmt: skip
VOCABULARY_FILES = frozenset({"tokenizer.json", "vocab.json", "merges.txt"})


def _without_packaged(model: Published) -> Published:
    """The model without tokenizers' vocabularies that are the packaged one: megabytes that every reader has."""
    merges = packaged_pairs()
    packaged = clip_vocabulary(merges)
    tokenizers = {}
    for name, texts in model.tokenizers.items():
        try:
            whole = json.loads(texts["tokenizer.json"])["model"] if "tokenizer.json" in texts else {}
            vocabulary = whole.get("vocab") or json.loads(texts.get("vocab.json", "{}"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            vocabulary = {}
        small = {k: v for k, v in texts.items() if k not in VOCABULARY_FILES}
        tokenizers[name] = small if vocabulary == packaged else texts
    return replace(model, tokenizers=tokenizers)


def with_tokenizers(model: Published) -> Published:
    """The model with the files of the packaged vocabularies where it uses them, so that others can read the folder."""
    tokenizers = {k: dict(v) for k, v in model.tokenizers.items()}
    for component, tensors in model.tensors.items():
        own = tokenizers.setdefault(component.replace("text_encoder", "tokenizer"), {})
        if own.keys() & VOCABULARY_FILES:
            continue
        if "embeddings.token_embedding.weight" in tensors:
            vocabulary, settings = _clip_files(model.configs[component])
        elif len(tensors.get("shared.weight", ())) == T5_ROWS:
            vocabulary, settings = {"tokenizer.json": packaged_pieces()}, T5_SETTINGS
        else:
            continue
        own |= vocabulary
        own.setdefault("tokenizer_config.json", json.dumps(settings, indent=2))
    return replace(model, tokenizers=tokenizers)


def _clip_files(config: Json) -> tuple[dict[str, str], Json]:
    pad = "!" if config.get("hidden_act") == "gelu" else END  # as each was trained
    settings = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad,
        "model_max_length": config.get("max_position_embeddings", 77),
    }  # fmt: skip
    vocabulary = {
        "vocab.json": json.dumps(clip_vocabulary(packaged_pairs()), ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + packaged_merges(),
    }
    return vocabulary, settings
