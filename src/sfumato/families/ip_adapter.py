"""An IP-Adapter in a model's U-Net: ``image_tokens`` and ``image_scale`` join what the network is told.

The picture comes to CLIP's tower as that was trained: its shorter side brought to the tower's, the middle cut out. In
calls without words it is told of none: of an embedding of zeros, or of the states of a picture that is zero everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.published import Published
from sfumato.errors import BadCheckpoint
from sfumato.families import common
from sfumato.families.configs import clip_vision_config, ip_adapter_config
from sfumato.families.model import Conditioning, Guide, Model
from sfumato.networks.clip import CLIPVision
from sfumato.networks.ip_adapter import IPAdapter, attentions
from sfumato.networks.sd_unet import SDUNet

if TYPE_CHECKING:
    from PIL import Image

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training data


def attach(model: Model, published: Published) -> Model:
    """The model with the IP-Adapter in its U-Net; BadCheckpoint if that is for another family, or another encoder."""
    unet = model.network
    if not isinstance(unet, SDUNet):
        raise BadCheckpoint(f"{published.path}: a {model.family} model, and IP-Adapters go with a U-Net (SD 1, 2, XL)")
    config = ip_adapter_config(published.configs["ip_adapter"])
    tower = clip_vision_config(published.configs["image_encoder"])
    own = tuple((layer.to_k.in_features, layer.to_k.out_features) for layer in attentions(unet))
    if config.attention != own:
        raise BadCheckpoint(
            f"{published.path}: the IP-Adapter is for another family: its {len(config.attention)} layers are of widths "
            f"{_short(config.attention)}, the U-Net's {len(own)} of {_short(own)}"
        )
    seen = tower.projection if config.kind == "plain" else tower.dim
    if config.features != seen:
        raise BadCheckpoint(
            f"{published.path}: the IP-Adapter goes with an image encoder that gives {config.features} numbers, and "
            f"this one gives {seen}: name the right one (--image-encoder FOLDER)"
        )
    encoder = common.build(published, "image_encoder", CLIPVision, tower)
    adapter = common.build(published, "ip_adapter", IPAdapter, config)
    adapter.attach(unet)

    def look(pixels: Tensor) -> Tensor:
        states = encoder(pixels.to(encoder.visual_projection.weight.dtype))
        return states.embedding if config.kind == "plain" else states.penultimate

    def tell(pictures: Sequence[Image.Image], scales: Sequence[float]) -> Conditioning:
        """Two rows of what the network is told: of the one picture, and of none."""
        pixels = prepare(pictures[0], tower.side)
        with torch.inference_mode():
            seen = look(pixels)
            nothing = torch.zeros_like(seen) if config.kind == "plain" else look(torch.zeros_like(pixels))
            tokens = torch.cat([adapter(seen), adapter(nothing)]).float()
        return {"image_tokens": tokens, "image_scale": torch.tensor([scales[0]])}

    return replace(model, guides={**model.guides, "image_prompt": Guide(tell, sized=False)})


def prepare(picture: Image.Image, side: int) -> Tensor:
    """An RGB picture as CLIP's tower takes it: (1, 3, side, side), normalized channel by channel."""
    from PIL import Image

    w, h = (side * length // min(picture.size) for length in picture.size)
    left, top = (w - side) // 2, (h - side) // 2
    cut = picture.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    mean, deviation = (np.array(v, np.float32) for v in (MEAN, DEVIATION))
    pixels = (np.array(cut, np.float32) / 255 - mean) / deviation  # (side, side, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def _short(widths: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{a}→{b}" for a, b in widths[:3]) + (", …" if len(widths) > 3 else "")
