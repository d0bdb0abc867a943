"""Our own family: a denoiser of pixels or latents and the words that guide it, in one safetensors file.

| schedule | row  | clock given to the network | spacing  |
|----------|------|----------------------------|----------|
| flow     | flow | σ (network multiplies)     | trailing |

The file's metadata carry the whole configuration and the tokenizer, so nothing beside it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sfumato.checkpoints.eight_bits import unpack
from sfumato.checkpoints.tensors import load_into, read_header, read_tensors
from sfumato.config import from_dict
from sfumato.diffusion.parameterizations import PARAMETERIZATIONS, Parameterization
from sfumato.diffusion.schedules import SCHEDULES, Schedule
from sfumato.errors import BadCheckpoint, nearest
from sfumato.families import NATIVE_FORMAT
from sfumato.families.common import decoder, encoder, in_type_of
from sfumato.families.model import Defaults, Model
from sfumato.networks.compact import CompactAutoencoder, CompactConfig, PreviewConfig, PreviewDecoder
from sfumato.networks.unet import UNet, UNetConfig
from sfumato.networks.worded import WordedConfig, WordedTransformer
from sfumato.text.tower import TextTower, TextTowerConfig, build_tokenizer, stored_tokenizer

FORMAT = NATIVE_FORMAT


@dataclass(frozen=True)
class NativeConfig:
    """A model of our own, to train or to load.

    Args:
        size: side of the training pictures in pixels.
        schedule, parameterization: names in ``SCHEDULES`` and ``PARAMETERIZATIONS``.
        network: the U-Net; ``transformer``: given, it takes the U-Net's place.
        autoencoder: given, the denoiser works on its latents instead of pixels.
        preview: a small decoder of the same latents, for a look at steps on the way.
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
    transformer: WordedConfig | None = None
    autoencoder: CompactConfig | None = None
    preview: PreviewConfig | None = None
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    defaults: Defaults = field(default_factory=Defaults)

    def __post_init__(self) -> None:
        part = "network" if self.transformer is None else "transformer"
        if self.denoiser.context_dim != self.text.dim:
            raise ValueError(f"{part}.context_dim is {self.denoiser.context_dim}, but text.dim is {self.text.dim}")
        if self.autoencoder is not None and self.denoiser.in_channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"{part}.in_channels is {self.denoiser.in_channels}, but autoencoder.latent_channels is "
                f"{self.autoencoder.latent_channels}"
            )
        for what, name, table in (
            ("schedule", self.schedule, SCHEDULES),
            ("parameterization", self.parameterization, PARAMETERIZATIONS),
        ):
            if name not in table:
                raise ValueError(f"no {what} named {name!r}{nearest(name, list(table))}")
        if self.size % self.multiple:
            raise ValueError(f"size {self.size} is not a multiple of {self.multiple}, as the network needs")

    @property
    def denoiser(self) -> UNetConfig | WordedConfig:
        """The shape of the network that is in use."""
        return self.transformer or self.network

    @property
    def factor(self) -> int:
        """Pixels per side of one cell of the denoiser's x."""
        return 1 if self.autoencoder is None else self.autoencoder.factor

    @property
    def multiple(self) -> int:
        """A picture's sides are multiples of this many pixels."""
        return self.factor * self.denoiser.multiple

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the denoiser's x at the training size."""
        return self.denoiser.in_channels, self.size // self.factor, self.size // self.factor

    def build_schedule(self) -> Schedule:
        """Return the noise schedule."""
        return SCHEDULES[self.schedule](**self.schedule_settings)

    def build_parameterization(self) -> Parameterization:
        """Return the meaning of the network's output."""
        return PARAMETERIZATIONS[self.parameterization]


class Native(nn.Module):
    """Denoiser and text tower as one module, trained together.

    Args:
        whole: with the decoders, where the model has any; training does without.
    """

    def __init__(self, config: NativeConfig, tokenizer: Tokenizer, whole: bool = True):
        super().__init__()
        self.config = config
        self.network = UNet(config.network) if config.transformer is None else WordedTransformer(config.transformer)
        self.text = TextTower(config.text, tokenizer)
        self.autoencoder = CompactAutoencoder(config.autoencoder) if whole and config.autoencoder else None
        self.preview = PreviewDecoder(config.preview) if whole and config.preview else None

    def forward(self, x: Tensor, clock: Tensor, words: Mapping[str, Tensor]) -> Tensor:
        """Denoise x (B, C, H, W) at clock (B,) under ``words`` as ``states`` takes them; for training."""
        return self.network(x, clock, **self.states(words))

    def states(self, words: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Encode ``ids`` and ``mask`` (B, M); what the tower has encoded before is returned as it is."""
        return self.text(**words) if "ids" in words else words


def metadata(config: NativeConfig, tokenizer: Tokenizer, card: Mapping[str, str]) -> dict[str, str]:
    """Return the safetensors metadata from which the model can be rebuilt.

    One entry holds it all: safetensors writes several in random order, and equal models must be equal bytes.
    """
    stored = stored_tokenizer(tokenizer, config.text)
    return {FORMAT: json.dumps({"config": asdict(config), "tokenizer": stored, "card": dict(card)})}


def load_native(path: Path, name: str, tensors: Mapping[str, Tensor], metadata: str, hash: str) -> Model:
    """Build a model of our own from its file's tensors and metadata; BadCheckpoint where they do not fit."""
    native, card = build_native(path, tensors, metadata)
    config = native.config
    vae, preview = native.autoencoder, native.preview
    return Model(
        name=name,
        family="native",
        path=path,
        hash=hash,
        network=native.network,
        encode=native.text.encode,
        words=native.text.spell,
        truncated=native.text.truncated,
        decode=_three_channels if vae is None else decoder(vae),
        preview=None if preview is None else lambda x: in_type_of(x, preview)(x),
        encode_picture=_own_channels(config.denoiser.in_channels) if vae is None else encoder(vae),
        schedule=config.build_schedule(),
        parameterization=config.build_parameterization(),
        channels=config.denoiser.in_channels,
        factor=config.factor,
        multiple=config.multiple,
        max_pixels=(4 * config.size) ** 2,
        defaults=config.defaults,
        card=card,
    )


def read_native(path: Path) -> Native:
    """Build the networks of a file of ours, in float32 and frozen; BadCheckpoint if it is none."""
    metadata = read_header(path).metadata
    if FORMAT not in metadata:
        raise BadCheckpoint(f"{path}: not what this project trains by task: denoiser")
    return build_native(path, read_tensors(path), metadata[FORMAT])[0]


def build_native(path: Path, tensors: Mapping[str, Tensor], metadata: str) -> tuple[Native, dict[str, str]]:
    """Build the networks alone, in float32 and frozen, and return them with their card; raises as ``load_native``."""
    try:
        meta = json.loads(metadata)
        config = from_dict(NativeConfig, meta["config"], "config")
        native = Native(config, build_tokenizer(config.text, meta["tokenizer"]))
        config.build_schedule()
        card = {str(k): str(v) for k, v in meta["card"].items()}
    except Exception as e:  # the tokenizer library raises bare Exceptions
        raise BadCheckpoint(f"{path}: its configuration cannot be read ({e})") from None
    try:
        load_into(native, unpack(tensors))
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{path}: {e}") from None
    native = native.float().eval().requires_grad_(False)
    return native.to(memory_format=torch.channels_last), card  # pyright: ignore[reportCallIssue]


def _own_channels(channels: int) -> Callable[[Tensor], Tensor]:
    return lambda pictures: pictures if channels == 3 else pictures.mean(1, keepdim=True)  # grey


def _three_channels(x: Tensor) -> Tensor:
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)  # grey
