"""ControlNets beside a model's U-Net: ``hint`` and ``hint_scale`` join what the network is told.

This is the form for whatever guides a network by a picture: a network that takes more keywords, and one of
``Model.guides``, which makes their rows of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sfumato.checkpoints.published import Published
from sfumato.errors import BadCheckpoint
from sfumato.families import common
from sfumato.families.configs import controlnet_config
from sfumato.families.model import Conditioning, Guide, Model
from sfumato.networks.controlnet import Controlled, ControlNet
from sfumato.networks.sd_unet import SDUNet

if TYPE_CHECKING:
    from PIL import Image


def attach(model: Model, published: Published) -> Model:
    """The model with the ControlNets among its parts; BadCheckpoint if one is for another family."""
    unet = model.network
    if not isinstance(unet, SDUNet):
        raise BadCheckpoint(
            f"{published.path}: a {model.family} model, and ControlNets go with a U-Net's (SD 1, 2, XL)"
        )
    nets = [_build(model, unet, published, name) for name in published.configs if name.startswith("controlnet")]
    guide = Guide(tell, sized=True, count=len(nets), scale="hint_scale")
    return replace(model, network=Controlled(unet, nets), guides={**model.guides, "control_image": guide})


def _build(model: Model, unet: SDUNet, published: Published, component: str) -> ControlNet:
    raw = published.configs[component]
    config, own = controlnet_config(raw), unet.config
    for what in ("widths", "blocks", "depth", "context_dim", "vector"):
        theirs, ours = getattr(config.unet, what), getattr(own, what)
        if theirs != ours:
            raise BadCheckpoint(
                f"{published.path}: the ControlNet is for another family: its {what} are {theirs}, the U-Net's {ours}"
            )
    if raw.get("read from shapes"):  # which do not tell these
        shape = replace(config.unet, heads=own.heads, groups=own.groups, size_dim=own.size_dim)
        config = replace(config, unet=shape)
    if config.factor != model.factor:
        raise BadCheckpoint(
            f"{published.path}: the ControlNet reads {config.factor} pixels a cell, the autoencoder {model.factor}"
        )
    return common.build(published, component, ControlNet, config)


def tell(pictures: Sequence[Image.Image], scales: Sequence[float]) -> Conditioning:
    """One row of what the network is told by K control pictures."""
    hint = torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2)[None]  # (1, K, 3, H, W)
    return {"hint": hint.float() / 255, "hint_scale": torch.tensor([list(scales)])}
