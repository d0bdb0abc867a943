"""Our own family: a pixel U-Net and the words that guide it, in one safetensors file.

| schedule | row  | clock given to the network | spacing  |
|----------|------|----------------------------|----------|
| flow     | flow | σ (network multiplies)     | trailing |

The file's metadata carry the whole configuration and the tokenizer, so nothing beside it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sfumato.checkpoints.tensors import load_into
from sfumato.config import from_dict
from sfumato.diffusion.parameterizations import PARAMETERIZATIONS, Parameterization
from sfumato.diffusion.schedules import SCHEDULES, Schedule
from sfumato.errors import BadCheckpoint, nearest
from sfumato.families import NATIVE_FORMAT
from sfumato.families.model import Defaults, Model
from sfumato.networks.unet import UNet, UNetConfig
from sfumato.text.tower import TextTower, TextTowerConfig

FORMAT = NATIVE_FORMAT


@dataclass(frozen=True)
class NativeConfig:
    """A model of our own, to train or to load.

    Args:
        size: side of the training pictures in pixels.
        schedule, parameterization: names in ``SCHEDULES`` and ``PARAMETERIZATIONS``.
    """

    size: int = 32
    schedule: str = "flow"
    schedule_settings: Mapping[str, Any] = field(default_factory=dict)
    parameterization: str = "flow"
    network: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            patch=2, widths=(96, 128, 144), blocks=1, heads=2, context_dim=160, clock_scale=1000.0
        )
    )
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    defaults: Defaults = field(default_factory=Defaults)

    def __post_init__(self) -> None:
        if self.network.context_dim != self.text.dim:
            raise ValueError(f"network.context_dim is {self.network.context_dim}, but text.dim is {self.text.dim}")
        for what, name, table in (
            ("schedule", self.schedule, SCHEDULES),
            ("parameterization", self.parameterization, PARAMETERIZATIONS),
        ):
            if name not in table:
                raise ValueError(f"no {what} named {name!r}{nearest(name, list(table))}")
        if self.size % self.network.multiple:
            raise ValueError(f"size {self.size} is not a multiple of {self.network.multiple}, as the network needs")

    def build_schedule(self) -> Schedule:
        """Return the noise schedule."""
        return SCHEDULES[self.schedule](**self.schedule_settings)

    def build_parameterization(self) -> Parameterization:
        """Return the meaning of the network's output."""
        return PARAMETERIZATIONS[self.parameterization]


class Native(nn.Module):
    """Denoiser and text tower as one module, trained together."""

    def __init__(self, config: NativeConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.network = UNet(config.network)
        self.text = TextTower(config.text, tokenizer)

    def forward(self, x: Tensor, clock: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Denoise x (B, C, H, W) at clock (B,) under token ids (B, M); for training."""
        return self.network(x, clock, **self.text(ids, mask))


def metadata(config: NativeConfig, tokenizer: Tokenizer, card: Mapping[str, str]) -> dict[str, str]:
    """Return the safetensors metadata from which the model can be rebuilt.

    One entry holds it all: safetensors writes several in random order, and equal models must be equal bytes.
    """
    tokenizer_json = json.loads(tokenizer.to_str())
    return {FORMAT: json.dumps({"config": asdict(config), "tokenizer": tokenizer_json, "card": dict(card)})}


def load_native(path: Path, name: str, tensors: Mapping[str, Tensor], metadata: str, hash: str) -> Model:
    """Build a model of our own from its file's tensors and metadata; BadCheckpoint where they do not fit."""
    try:
        meta = json.loads(metadata)
        config = from_dict(NativeConfig, meta["config"], "config")
        native = Native(config, Tokenizer.from_str(json.dumps(meta["tokenizer"])))
    except Exception as e:  # the tokenizer library raises bare Exceptions
        raise BadCheckpoint(f"{path}: its configuration cannot be read ({e})") from None
    try:
        load_into(native, tensors)
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{path}: {e}") from None
    native = native.float().eval().requires_grad_(False)
    return Model(
        name=name,
        family="native",
        path=path,
        hash=hash,
        network=native.network.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
        encode=native.text.encode,
        words=native.text.spell,
        decode=_three_channels,
        schedule=config.build_schedule(),
        parameterization=config.build_parameterization(),
        channels=config.network.in_channels,
        multiple=config.network.multiple,
        max_pixels=(4 * config.size) ** 2,
        defaults=config.defaults,
        card=meta["card"],
    )


def _three_channels(x: Tensor) -> Tensor:
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)  # grey
