"""Stable Diffusion 1.x: latent diffusion (2112.10752) under the words of CLIP L.

| schedule                        | row | clock given to the network | spacing           |
|---------------------------------|-----|----------------------------|-------------------|
| scaled-linear .00085→.012, 1000 | eps | index t                    | leading, offset 1 |

x is the autoencoder's latents times 0.18215; the context is CLIP's last states, normalized.
"""

from __future__ import annotations

from torch import Tensor

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
    scheduler = model.configs.get("scheduler", {})
    network = common.unet(model)
    tower = common.tower(model, "text_encoder", "tokenizer", projected=False)
    for width in set(network.config.context_dim):
        common.check_width(model, "words", width, tower.network.config.dim)
    vae = common.autoencoder(model)
    inpaints = common.inpaints(model, network.config.in_channels, vae)
    meaning, why = common.parameterization(scheduler)

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        return {"context": tower.states(*tower.ids(prompts), skip=None)[0]}

    side = common.side(model.configs["unet"], vae, 512)
    return common.assemble(
        model,
        name,
        FAMILY,
        network,
        vae,
        why,
        encode=encode,
        words=tower.spell,
        schedule=common.schedule(scheduler),
        parameterization=meaning,
        inpaints=inpaints,
        max_pixels=1 << 22,
        situate=lambda width, height, guidance: common.embedded_guidance(network, guidance),
        distilled=network.config.guidance_dim > 0,
        spacings=common.spacings(scheduler),
        defaults=common.usual_unet(scheduler, network, 25, 7.5, side),
    )
