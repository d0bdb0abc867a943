"""FLUX.1 dev and schnell: a flow under T5's states and CLIP L's pooled vector; dev is told the guidance scale.

| model   | schedule | row  | clock given to the network  | spacing                                        |
|---------|----------|------|-----------------------------|------------------------------------------------|
| dev     | flow     | flow | σ (the network multiplies)  | shift(e^μ), μ rising with the number of cells  |
| schnell | flow     | flow | same                        | shift(1), 4 steps                              |
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, tensor

from sfumato.checkpoints.published import Json, Published
from sfumato.diffusion.schedules import Flow
from sfumato.errors import BadCheckpoint
from sfumato.families import common
from sfumato.families.configs import flux_config
from sfumato.families.model import Defaults, Model
from sfumato.networks.flux import Flux

FAMILY = "flux"


def recognize(configs: Mapping[str, Json]) -> str | None:
    """Say why these configurations are of this family, or None."""
    if "num_single_layers" in configs.get("transformer", {}):
        return "a transformer of joint and single blocks"
    return None


def load(model: Published, name: str) -> Model:
    """Build the model; BadCheckpoint where its parts do not fit."""
    scheduler = model.configs.get("scheduler", {})
    config = flux_config(model.configs["transformer"])
    network = common.build(model, "transformer", Flux, config)
    tower = common.tower(model, "text_encoder", "tokenizer", projected=False)
    t5 = common.t5(model, "text_encoder_2", "tokenizer_2", 512 if config.guided else 256)
    if t5 is None:
        raise BadCheckpoint(f"{model.path}: {common.no_t5(model, 'text_encoder_2')}, and FLUX reads its words by T5")
    common.check_width(model, "words", config.context_dim, t5.network.config.dim)
    common.check_width(model, "pooled words", config.pooled_dim, tower.network.config.dim)
    vae = common.autoencoder(model)
    common.check_latents(model, config.in_channels // 4, vae)
    unit = 2 * vae.config.factor

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        _, pooled = tower.states(*tower.ids(prompts), skip=None)
        return {"context": t5.encode(prompts), "pooled": pooled}

    def situate(width: int, height: int, guidance: float) -> dict[str, Tensor]:
        return {"guidance": tensor([guidance])} if config.guided else {}

    return common.assemble(
        model,
        name,
        FAMILY,
        network,
        vae,
        "flow: this family's only one",
        common.t5_used(t5),
        encode=encode,
        words=t5.spell,
        truncated=t5.truncated,
        schedule=Flow(),
        parameterization=common.flow(1.0),
        multiple=unit,
        max_pixels=1 << 22,
        situate=situate,
        spacings=common.shifted(scheduler, unit, usual=1.0),
        distilled=config.guided,
        defaults=Defaults("flow-euler", "shift", *((28, 3.5) if config.guided else (4, 1.0)), 1024, 1024),
    )
