"""Pretrained parts from ordinary packages, poured into our own networks, in evaluation mode and frozen.

Origin, licence and SHA-256 of each: ``sfumato.checkpoints.packaged``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sfumato.checkpoints import packaged
from sfumato.checkpoints.tensors import load_into
from sfumato.networks.efficientnet import STAGES, EfficientNetLite0
from sfumato.networks.lpips import LPIPS
from sfumato.text.sentence import SentenceEncoder, SentenceEncoderConfig

M = TypeVar("M", bound=nn.Module)


def load_lite0() -> EfficientNetLite0:
    """Load EfficientNet-lite0, trained on ImageNet; NoResources with pip's command if it is not installed."""
    tensors = packaged.read_torch(packaged.LITE0.read())
    return _frozen(EfficientNetLite0(), {name: v for k, v in tensors.items() if (name := _lite0_name(k))})


def load_lpips(net: str = "alex") -> LPIPS:
    """Load LPIPS on ``alex`` or ``vgg`` with its trunk; NoResources with pip's command if it is not installed."""
    file, trunk = {"alex": (packaged.ALEXNET, "AlexNet_0"), "vgg": (packaged.VGG16, "VGG16_0")}[net]
    tree = packaged.read_arrays(file.read())
    module = LPIPS(net)
    convolutions = [name for name, m in module.layers.named_modules() if isinstance(m, nn.Conv2d)]
    tensors: dict[str, Tensor] = {}
    for i, name in enumerate(convolutions):
        layer: Mapping[str, Any] = tree[trunk][f"Conv_{i}"]
        tensors[f"layers.{name}.weight"] = torch.from_numpy(layer["kernel"].copy()).permute(3, 2, 0, 1)  # HWIO → OIHW
        tensors[f"layers.{name}.bias"] = torch.from_numpy(layer["bias"].copy())
    for i in range(len(module.heads)):
        tensors[f"heads.{i}"] = torch.from_numpy(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].copy()).flatten()
    return _frozen(module, tensors)


def load_sentence_encoder() -> SentenceEncoder:
    """Load all-MiniLM-L6-v2; NoResources with pip's command if it is not installed."""
    from safetensors.torch import load

    tensors = load(packaged.MINILM.read())
    tokenizer = Tokenizer.from_str(packaged.MINILM_TOKENIZER.read().decode())
    module = SentenceEncoder(SentenceEncoderConfig(), tokenizer)
    return _frozen(module, {name: v for k, v in tensors.items() if (name := _bert_name(k))})


def _frozen(module: M, tensors: Mapping[str, Tensor]) -> M:
    load_into(module, tensors)
    return module.eval().requires_grad_(False)


_FIRST = [sum(repeats for repeats, *_ in STAGES[:i]) for i in range(len(STAGES) + 1)]  # each stage's first block


def _lite0_name(key: str) -> str | None:
    """The package counts its blocks through and numbers batch norms; the classifier is left out."""
    if key.startswith("_fc."):
        return None
    for old, new in (
        ("_conv_stem.", "stem.0."),
        ("_bn0.", "stem.1."),
        ("_conv_head.", "head.0."),
        ("_bn1.", "head.1."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+?)\.(\w+)", key)
    if not match:
        return key  # reported as foreign
    n, part, rest = int(match[1]), match[2], match[3]
    parts = {
        "expand_conv": "expand.0", "bn0": "expand.1", "depthwise_conv": "depthwise.0",
        "bn1": "depthwise.1", "project_conv": "project.0", "bn2": "project.1",
    }  # fmt: skip
    stage = next(i for i in range(len(STAGES)) if _FIRST[i] <= n < _FIRST[i + 1])
    return f"stages.{stage}.{n - _FIRST[stage]}.{parts[part]}.{rest}"


def _bert_name(key: str) -> str | None:
    """Hugging Face's names for BERT; the pooler and the table of positions 0, 1, 2, … are left out."""
    if key.startswith("pooler.") or key.endswith("position_ids"):
        return None
    for old, new in (
        ("embeddings.word_embeddings.", "tokens."),
        ("embeddings.position_embeddings.", "positions."),
        ("embeddings.token_type_embeddings.", "segments."),
        ("embeddings.LayerNorm.", "norm."),
        ("encoder.layer.", "layers."),
        ("attention.self.query.", "q."),
        ("attention.self.key.", "k."),
        ("attention.self.value.", "v."),
        ("attention.output.dense.", "out."),
        ("attention.output.LayerNorm.", "norm1."),
        ("intermediate.dense.", "wide."),
        ("output.dense.", "narrow."),
        ("output.LayerNorm.", "norm2."),
    ):
        key = key.replace(old, new)
    return key
