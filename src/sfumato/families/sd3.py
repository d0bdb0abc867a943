"""Stable Diffusion 3 and 3.5 (2403.03206): a flow under two CLIP towers and, if it is there, T5.

| schedule        | row  | clock given to the network | spacing  |
|-----------------|------|----------------------------|----------|
| flow, α = 1 − σ | flow | 1000·σ                     | shift(3) |

The context is both towers' states before their last layers, side by side and filled up with zeros to T5's width, then
T5's 256 states, or zeros in their place; the pooled vector is both towers'.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.checkpoints.published import Json, Published
from sfumato.diffusion.schedules import Flow
from sfumato.families import common
from sfumato.families.configs import mmdit_config
from sfumato.families.model import Defaults, Model
from sfumato.networks.mmdit import MMDiT
from sfumato.text.spelling import Word

FAMILY = "sd3"
T5_LENGTH = 256


def recognize(configs: Mapping[str, Json]) -> str | None:
    """Say why these configurations are of this family, or None."""
    if "pos_embed_max_size" in configs.get("transformer", {}) and "text_encoder_2" in configs:
        return "a transformer over cells and words with a table of positions, under two CLIP towers"
    return None


def load(model: Published, name: str) -> Model:
    """Build the model; BadCheckpoint where its parts do not fit."""
    scheduler = model.configs.get("scheduler", {})
    config = mmdit_config(model.configs["transformer"])
    network = common.build(model, "transformer", MMDiT, config)
    first = common.tower(model, "text_encoder", "tokenizer", projected=True)
    second = common.tower(model, "text_encoder_2", "tokenizer_2", projected=True, pad=0)
    t5 = common.t5(model, "text_encoder_3", "tokenizer_3", T5_LENGTH)
    a, b = first.network.config, second.network.config
    common.check_width(model, "pooled words", config.pooled_dim, a.projection + b.projection)
    if t5 is not None:
        common.check_width(model, "words", config.context_dim, t5.network.config.dim)
    vae = common.autoencoder(model)
    common.check_latents(model, config.in_channels, vae)

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        ids = common.same_rows(prompts, first, second)
        (a, pooled_a), (b, pooled_b) = first.states(*ids[0], skip=1), second.states(*ids[1], skip=1)
        clip = torch.cat([a, b], dim=-1)
        clip = F.pad(clip, (0, config.context_dim - clip.shape[-1]))
        long = clip.new_zeros(len(prompts), T5_LENGTH, config.context_dim) if t5 is None else t5.encode(prompts)
        return {"context": torch.cat([clip, long], dim=1), "pooled": torch.cat([pooled_a, pooled_b], dim=-1)}

    def words(prompt: str) -> list[Word]:
        clip, long = first.spell(prompt), [] if t5 is None else t5.spell(prompt)
        after = common.same_rows([prompt], first, second)[0][0].numel()  # columns of the two towers
        return clip + [Word(w.text, tuple(after + c for c in w.columns)) for w in long]

    side = common.side(model.configs["transformer"], vae, 1024)
    multiple = vae.config.factor * config.patch
    return common.assemble(
        model,
        name,
        FAMILY,
        network,
        vae,
        "flow: this family's only one",
        {"T5": f"left out: {common.no_t5(model, 'text_encoder_3')}"} if t5 is None else common.t5_used(t5),
        encode=encode,
        words=words,
        truncated=(lambda prompt: 0) if t5 is None else t5.truncated,
        schedule=Flow(),
        parameterization=common.flow(1000.0),
        multiple=multiple,
        max_pixels=(config.positions * multiple) ** 2,
        spacings=common.shifted(scheduler, multiple, usual=3.0),
        defaults=Defaults("flow-euler", "shift", 28, 5.0, side, side),
    )
