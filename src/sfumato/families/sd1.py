"""Stable Diffusion 1.x: latent diffusion (2112.10752) under the words of CLIP L.

| schedule                        | row | clock given to the network | spacing           |
|---------------------------------|-----|----------------------------|-------------------|
| scaled-linear .00085→.012, 1000 | eps | index t                    | leading, offset 1 |

x is the autoencoder's latents times 0.18215; the context is CLIP's last states, normalized.
"""

from __future__ import annotations

from sfumato.checkpoints.published import Json, Published
from sfumato.families import common
from sfumato.families.model import Model

FAMILY = "sd1"


def recognize(configs: dict[str, Json]) -> str | None:
    """Say why these configurations are of this family, or None."""
    unet = configs.get("unet", {})
    if "text_encoder" not in configs or "text_encoder_2" in configs or unet.get("use_linear_projection"):
        return None
    if unet.get("addition_embed_type") is not None:
        return None
    return "a U-Net with projections by convolution, under one CLIP tower"


def load(model: Published, name: str) -> Model:
    """Build the model; BadCheckpoint where its parts do not fit."""
    network = common.unet(model)
    tower = common.tower(model, "text_encoder", "tokenizer", projected=False)
    common.check_context(model, network, tower.network.config.dim)
    vae = common.autoencoder(model)
    meaning, why = common.parameterization(model.configs.get("scheduler", {}))
    return common.assemble_unet(
        model,
        name,
        FAMILY,
        network,
        vae,
        why,
        usual=(25, 7.5, 512),
        encode=tower.context,
        words=tower.spell,
        parameterization=meaning,
    )
