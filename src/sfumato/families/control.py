"""A ControlNet beside a model's U-Net: ``hint`` and ``hint_scale`` join what the network is told.

This is the form for whatever guides a network by a picture: a network that takes more keywords, and one of
``Model.guides``, which makes their rows of a picture.
"""

from __future__ import annotations

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
    """The model with the ControlNet among its parts; BadCheckpoint if that is for another family."""
    unet, raw = model.network, published.configs["controlnet"]
    if not isinstance(unet, SDUNet):
        raise BadCheckpoint(
            f"{published.path}: a {model.family} model, and ControlNets go with a U-Net's (SD 1, 2, XL)"
        )
    config, own = controlnet_config(raw), unet.config
    if raw.get("read from shapes"):  # which do not tell these
        shape = replace(config.unet, heads=own.heads, groups=own.groups, size_dim=own.size_dim)
        config = replace(config, unet=shape)
    for what in ("widths", "blocks", "depth", "context_dim", "vector"):
        theirs, ours = getattr(config.unet, what), getattr(own, what)
        if theirs != ours:
            raise BadCheckpoint(
                f"{published.path}: the ControlNet is for another family: its {what} are {theirs}, the U-Net's {ours}"
            )
    if config.factor != model.factor:
        raise BadCheckpoint(
            f"{published.path}: the ControlNet reads {config.factor} pixels a cell, the autoencoder {model.factor}"
        )
    controlnet = common.build(published, "controlnet", ControlNet, config)
    guides = {**model.guides, "control_image": Guide(tell, sized=True)}
    return replace(model, network=Controlled(unet, controlnet), guides=guides)


def tell(picture: Image.Image, scale: float) -> Conditioning:
    """One row of what the network is told by a control picture."""
    hint = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
    return {"hint": hint, "hint_scale": torch.tensor([scale])}
