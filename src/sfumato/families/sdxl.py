"""Stable Diffusion XL, its refiner and SDXL-Turbo (2307.01952): a U-Net under two towers, told the size and crop.

| model   | schedule                        | row | clock given to the network | spacing           |
|---------|---------------------------------|-----|----------------------------|-------------------|
| XL      | scaled-linear .00085→.012, 1000 | eps | index t                    | leading, offset 1 |
| refiner | same                            | eps | index t                    | same              |
| Turbo   | same                            | eps | index t                    | trailing, 1 step  |

The context is both towers' states before their last layers, side by side; the pooled vector is the second tower's.
Without words both are zero, as in training. The refiner, which works on pictures that the base began, has the second
tower alone and is told how beautiful the picture is to be in place of the target's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.checkpoints.published import Json, Published
from sfumato.families import common
from sfumato.families.model import Model

FAMILY = "sdxl"
BEAUTY, NO_BEAUTY = 6.0, 2.5  # aesthetic scores with the words, and without


def recognize(configs: dict[str, Json]) -> str | None:
    """Say why these configurations are of this family, or None."""
    if configs.get("unet", {}).get("addition_embed_type") == "text_time":
        towers = "two CLIP towers" if "text_encoder" in configs else "one CLIP tower"
        return f"a U-Net that is told sizes, under {towers}"
    return None


def load(model: Published, name: str) -> Model:
    """Build the model; BadCheckpoint where its parts do not fit."""
    network = common.unet(model)
    second = common.tower(model, "text_encoder_2", "tokenizer_2", projected=True, pad=0)
    config, pooled_dim = network.config, second.network.config.projection
    refines = "text_encoder" not in model.configs and config.vector == pooled_dim + 5 * config.size_dim
    towers = [second]
    if not refines:
        towers = [common.tower(model, "text_encoder", "tokenizer", projected=False), second]
        common.check_width(model, "pooled words", config.vector - 6 * config.size_dim, pooled_dim)
    common.check_context(model, network, sum(t.network.config.dim for t in towers))
    vae = common.autoencoder(model)
    meaning, why = common.parameterization(model.configs.get("scheduler", {}))
    zeros = bool(model.configs.get("", {}).get("force_zeros_for_empty_prompt", True))

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        rows = common.same_rows(prompts, *towers)
        states, vectors = zip(*(t.states(*ids, skip=1) for t, ids in zip(towers, rows, strict=True)), strict=True)
        context, pooled = torch.cat(states, dim=-1), vectors[-1]
        if zeros:
            told = torch.tensor([bool(p) for p in prompts], device=context.device)
            context, pooled = context * told[:, None, None], pooled * told[:, None]
        return {"context": context, "pooled": pooled}

    def situate(width: int, height: int, guidance: float) -> dict[str, Tensor]:
        place = [height, width, 0, 0]
        wanted = [[*place, BEAUTY], [*place, NO_BEAUTY]] if refines else [[*place, height, width]]
        sizes = torch.tensor(wanted, dtype=torch.float32)
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
        words=towers[0].spell,
        parameterization=meaning,
        max_pixels=1 << 23,
        situate=situate,
    )
