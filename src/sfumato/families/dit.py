"""DiT (2212.09748): a class instead of words; of the noise and the variance that it predicts, only the noise is used.

| schedule               | row | clock given to the network | spacing |
|------------------------|-----|----------------------------|---------|
| linear .0001→.02, 1000 | eps | index t                    | leading |

A prompt is a class: its number, its label, or one of the names in its label; no words are no class.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.checkpoints.published import Json, Published
from sfumato.errors import BadRequest, nearest
from sfumato.families import common
from sfumato.families.configs import dit_config
from sfumato.families.model import Defaults, Model
from sfumato.networks.dit import DiT

FAMILY = "dit"


def recognize(configs: Mapping[str, Json]) -> str | None:
    """Say why these configurations are of this family, or None."""
    transformer = configs.get("transformer", {})
    if transformer.get("norm_type", "") == "ada_norm_zero" and "num_embeds_ada_norm" in transformer:
        return "a transformer told a class, and no words"
    return None


class Mean(nn.Module):
    """The network without the variance that it learned."""

    def __init__(self, network: DiT):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        return self.network(x, clock, classes)[:, : x.shape[1]]


def load(model: Published, name: str) -> Model:
    """Build the model; BadCheckpoint where its parts do not fit."""
    scheduler = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, **model.configs.get("scheduler", {})}
    config = dit_config(model.configs["transformer"])
    network = common.build(model, "transformer", DiT, config)
    vae = common.autoencoder(model)
    common.check_latents(model, config.in_channels, vae)
    meaning, why = common.parameterization(scheduler)
    names = class_names(model.configs.get("", {}).get("id2label", {}))

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        return {"classes": torch.tensor([class_of(p, names, config.classes) for p in prompts])}

    side = config.size * vae.config.factor
    return common.assemble(
        model,
        name,
        FAMILY,
        Mean(network),
        vae,
        why,
        common.left_out(scheduler),
        encode=encode,
        schedule=common.schedule(scheduler),
        parameterization=meaning,
        multiple=vae.config.factor * config.patch,
        max_pixels=side**2,
        spacings=common.spacings(scheduler),
        defaults=Defaults("dpmpp-2m", common.usual_spacing(scheduler), 25, 4.0, side, side),
    )


def class_names(labels: Mapping[str, str]) -> dict[str, int]:
    """Numbers of classes by label and, of a label such as "tench, Tinca tinca", by each of its names."""
    names: dict[str, int] = {}
    for number, label in labels.items():
        for part in (label, *label.split(",")):
            names.setdefault(part.strip().lower(), int(number))
    return names


def class_of(prompt: str, names: Mapping[str, int], classes: int) -> int:
    """The class that a prompt names; BadRequest if there is none of that name."""
    text = prompt.strip().lower()
    if not text:
        return classes
    if text.isdecimal() and len(text) < 10 and int(text) < classes:
        return int(text)
    if text in names:
        return names[text]
    hint = nearest(text, list(names)) if names else ""
    raise BadRequest(f"no class {prompt[:60]!r}{hint}; a prompt here is a class, by name or by number below {classes}")
