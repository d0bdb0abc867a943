"""Stable Diffusion 2.x and SD-Turbo: as 1.x, under the words of OpenCLIP H, with heads of 64 and linear projections.

| model         | schedule                        | row | clock given to the network | spacing           |
|---------------|---------------------------------|-----|----------------------------|-------------------|
| 2.x-base, 512 | scaled-linear .00085→.012, 1000 | eps | index t                    | leading, offset 1 |
| 2.x, 768      | same                            | v   | index t                    | same              |
| Turbo         | same                            | eps | index t                    | trailing, 1 step  |

The context is the states before the tower's last layer, normalized; published folders leave that layer out. Where a
file does not say whether its row is eps or v, one call of the network does.
"""

from __future__ import annotations

import torch

from sfumato.checkpoints.published import Json, Published
from sfumato.families import common
from sfumato.families.model import Model

FAMILY = "sd2"


def recognize(configs: dict[str, Json]) -> str | None:
    """Say why these configurations are of this family, or None."""
    unet = configs.get("unet", {})
    if "text_encoder" not in configs or "text_encoder_2" in configs or not unet.get("use_linear_projection"):
        return None
    if unet.get("addition_embed_type") is not None:
        return None
    return "a U-Net with linear projections, under one CLIP tower"


def load(model: Published, name: str) -> Model:
    """Build the model; BadCheckpoint where its parts do not fit."""
    scheduler = model.configs.get("scheduler", {})
    network = common.unet(model)
    tower = common.tower(model, "text_encoder", "tokenizer", projected=False, pad=0)
    common.check_context(model, network, tower.network.config.dim)
    vae = common.autoencoder(model)
    inpaints = common.inpaints(model, network.config.in_channels, vae)
    schedule = common.schedule(scheduler)

    def probe() -> tuple[str, str]:
        latents = vae.config.latent_channels
        told = {"picture": torch.zeros(1, 1 + latents, 16, 16)} if inpaints else {}
        with torch.inference_mode():
            return common.probe(network, schedule(schedule.t_max), latents, {**tower.context([""]), **told})

    meaning, why = common.parameterization(scheduler, probe)
    return common.assemble_unet(
        model,
        name,
        FAMILY,
        network,
        vae,
        why,
        usual=(25, 7.5, 768 if meaning.name == "v" else 512),
        encode=tower.context,
        words=tower.spell,
        schedule=schedule,
        parameterization=meaning,
    )
