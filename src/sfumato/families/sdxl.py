"""Stable Diffusion XL and SDXL-Turbo (2307.01952): a U-Net under two towers, told the picture's size and crop.

| model | schedule                        | row | clock given to the network | spacing           |
|-------|---------------------------------|-----|----------------------------|-------------------|
| XL    | scaled-linear .00085→.012, 1000 | eps | index t                    | leading, offset 1 |
| Turbo | same                            | eps | index t                    | trailing, 1 step  |

The context is both towers' states before their last layers, side by side; the pooled vector is the second tower's.
Without words both are zero, as in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.checkpoints.published import Json, Published
from sfumato.families import common
from sfumato.families.model import Model

FAMILY = "sdxl"


def recognize(configs: dict[str, Json]) -> str | None:
    """Say why these configurations are of this family, or None."""
    if configs.get("unet", {}).get("addition_embed_type") == "text_time":
        return "a U-Net that is told sizes, under two CLIP towers"
    return None


def load(model: Published, name: str) -> Model:
    """Build the model; BadCheckpoint where its parts do not fit."""
    network = common.unet(model)
    first = common.tower(model, "text_encoder", "tokenizer", projected=False)
    second = common.tower(model, "text_encoder_2", "tokenizer_2", projected=True, pad=0)
    a, b, c = first.network.config, second.network.config, network.config
    common.check_context(model, network, a.dim + b.dim)
    common.check_width(model, "pooled words", c.vector - 6 * c.size_dim, b.projection)
    vae = common.autoencoder(model)
    meaning, why = common.parameterization(model.configs.get("scheduler", {}))
    zeros = bool(model.configs.get("", {}).get("force_zeros_for_empty_prompt", True))

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        ids = common.same_rows(prompts, first, second)
        (a, _), (b, pooled) = first.states(*ids[0], skip=1), second.states(*ids[1], skip=1)
        context = torch.cat([a, b], dim=-1)
        if zeros:
            told = torch.tensor([bool(p) for p in prompts], device=context.device)
            context, pooled = context * told[:, None, None], pooled * told[:, None]
        return {"context": context, "pooled": pooled}

    def situate(width: int, height: int, guidance: float) -> dict[str, Tensor]:
        sizes = common.row([height, width, 0, 0, height, width])
        return {"sizes": sizes, **common.embedded_guidance(network, guidance)}

    return common.assemble_unet(
        model,
        name,
        FAMILY,
        network,
        vae,
        why,
        usual=(30, 5.0, 1024),
        encode=encode,
        words=first.spell,
        parameterization=meaning,
        max_pixels=1 << 23,
        situate=situate,
    )
