"""Which of a published model's tensors would find their place, told by names and shapes alone: no weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sfumato.checkpoints.published import Published
from sfumato.checkpoints.tensors import LoadReport, load_into
from sfumato.errors import BadCheckpoint
from sfumato.families import common, configs
from sfumato.networks.dit import DiT
from sfumato.networks.flux import Flux
from sfumato.networks.mmdit import MMDiT
from sfumato.networks.sd_unet import SDUNet
from sfumato.text.clip import CLIPText
from sfumato.text.t5 import T5Encoder

TRANSFORMERS: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], Any]]] = {
    "sd3": (MMDiT, configs.mmdit_config),
    "flux": (Flux, configs.flux_config),
    "dit": (DiT, configs.dit_config),
}


def match(model: Published, family: str) -> dict[str, LoadReport]:
    """A report for each component of a model whose tensors have no numbers; BadCheckpoint if nothing fits."""
    reports: dict[str, LoadReport] = {}
    for component, tensors in model.tensors.items():
        try:
            network, config = _network(model, component, family)
            with common.at_most(2 * len(tensors) + 100), torch.device("meta"), common.Unfilled():
                module = network(config)
            reports[component] = load_into(module, tensors, partial=True)
        except (BadCheckpoint, ValueError, RuntimeError) as e:
            raise BadCheckpoint(f"{model.path}: {component}: {e}") from None
    return reports


def _network(model: Published, component: str, family: str) -> tuple[Callable[[Any], nn.Module], Any]:
    raw = model.configs[component]
    if component == "unet":
        return SDUNet, configs.sd_unet_config(raw)
    if component == "transformer":
        network, read = TRANSFORMERS[family]
        return network, read(raw)
    if component == "vae":
        return common.autoencoder_of(raw)
    if "d_model" in raw:
        return T5Encoder, configs.t5_config(raw)
    return CLIPText, configs.clip_config(raw, projected="text_projection.weight" in model.tensors[component])
