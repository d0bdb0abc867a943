"""Our own CLIP (2103.00020): words and pictures as unit vectors of one space, in one safetensors file.

    s(picture, words) = scale · ⟨picture, words⟩

The words' side is the text tower that also tells our denoisers what to draw; the picture's side is a head on
EfficientNet-lite0. The file's metadata carry the configuration; CLIP's vocabulary is in the package.
Shapes: B pictures or prompts, D width of the shared space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from sfumato.checkpoints.tensors import load_into, read_header, read_tensors, to_half
from sfumato.config import from_dict, to_dict
from sfumato.errors import BadCheckpoint, SfumatoError
from sfumato.files import sha256
from sfumato.networks.efficientnet import EfficientNetLite0
from sfumato.networks.towers import PictureHead, PictureHeadConfig, look
from sfumato.pixels import signed
from sfumato.text.tokenizer import VOCABULARY
from sfumato.text.tower import TextTower, TextTowerConfig, build_tokenizer, stored_tokenizer

FORMAT = "sfumato-clip-1"  # the metadata's key
EMBEDDED = Path(__file__).parents[1] / "models" / "parts" / "emoji-clip.safetensors"
MAX_SCALE = 100.0  # 2103.00020, section 2.5


@dataclass(frozen=True)
class TwoTowersConfig:
    """Both towers' shapes.

    Args:
        size: side in pixels of the pictures that it learned from, to which all are brought.
        dim: width D of the space they share.
    """

    size: int = 64
    dim: int = 256
    text: TextTowerConfig = field(
        default_factory=lambda: TextTowerConfig(
            vocabulary=VOCABULARY, tokenizer="clip", token_dim=48, dim=256, layers=3, heads=4, max_tokens=32
        )
    )
    picture: PictureHeadConfig = field(default_factory=PictureHeadConfig)


class TwoTowers(nn.Module):
    """What is learned: the text tower, the picture's head, and the scale of their similarity."""

    def __init__(self, config: TwoTowersConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.text = TextTower(config.text, tokenizer)
        self.text_head = nn.Linear(config.text.dim, config.dim, bias=False)
        self.picture = PictureHead(config.picture, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # 2103.00020, section 2.5

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by, between 1 and 100."""
        return self.log_scale.clamp(0, math.log(MAX_SCALE)).exp()

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (B, D) of token ids (B, M)."""
        return F.normalize(self.text_head(self.text(ids, mask)["pooled"]).float(), dim=1)

    def pictures(self, features: Tensor) -> Tensor:
        """Unit vectors (B, D) of the trunk's features (B, F)."""
        return F.normalize(self.picture(features).float(), dim=1)

    def forward(self, features: Tensor, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Similarities (B, B) of pictures and captions, whose ids and masks come in parts of different widths."""
        words = torch.cat([self.words(ids, mask) for ids, mask in rows])
        return self.scale * self.pictures(features) @ words.T


class CLIP(nn.Module):
    """Both towers with the trunk that looks at pictures, to compare with."""

    def __init__(self, towers: TwoTowers, trunk: EfficientNetLite0, card: Mapping[str, str], hash: str = ""):
        super().__init__()
        self.towers, self.trunk = towers, trunk
        self.card, self.hash = dict(card), hash

    @torch.no_grad()
    def embed_words(self, prompts: Sequence[str], batch: int = 256) -> Tensor:
        """Return unit vectors (B, D) of prompts."""
        parts = [list(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        found = [self.towers.words(*self.towers.text.tokenize(part)) for part in parts]
        return torch.cat(found) if found else torch.empty(0, self.towers.config.dim)

    @torch.no_grad()
    def embed_pictures(self, images: Tensor, batch: int = 64) -> Tensor:
        """Return unit vectors (B, D) of uint8 pictures (B, 3, H, W)."""
        parts = [self.towers.pictures(look(self.trunk, signed(part))) for part in images.split(batch)]
        return torch.cat(parts) if parts else torch.empty(0, self.towers.config.dim)


class Critic:
    """Says how well pictures fit a prompt: cosines of their unit vectors.

    Args:
        path: the CLIP's file, which is read at once; the embedded one is read when it is first asked.
    """

    def __init__(self, path: Path | None = None):
        self._clip = None if path is None else load_clip(path)

    @property
    def clip(self) -> CLIP:
        """The CLIP by which it chooses."""
        self._clip = self._clip or load_clip()
        return self._clip

    def __call__(self, pictures: Tensor, prompt: str) -> Tensor:
        """Score uint8 pictures (B, 3, H, W); returns (B,) in [−1, 1]."""
        return self.clip.embed_pictures(pictures) @ self.clip.embed_words([prompt])[0]


def clip_tensors(towers: Mapping[str, Tensor], trunk: EfficientNetLite0) -> dict[str, Tensor]:
    """Return the tensors of a file, fp16: the towers' under their own names, the trunk's under ``trunk.``."""
    counts = "num_batches_tracked"  # of batch normalization's training
    both = {**towers, **{f"trunk.{k}": v for k, v in trunk.state_dict().items() if not k.endswith(counts)}}
    return to_half(both)


def clip_metadata(config: TwoTowersConfig, tokenizer: Tokenizer, card: Mapping[str, str]) -> dict[str, str]:
    """Return the safetensors metadata from which a CLIP can be rebuilt."""
    stored = stored_tokenizer(tokenizer, config.text)
    return {FORMAT: json.dumps({"config": to_dict(config), "tokenizer": stored, "card": dict(card)})}


def load_clip(path: Path | None = None) -> CLIP:
    """Load a CLIP of ours, the embedded one by default, in float32 and frozen.

    Raises BadCheckpoint for a file that is no such thing or does not fit.
    """
    path = path or EMBEDDED
    header = read_header(path)
    if FORMAT not in header.metadata:
        raise BadCheckpoint(f"{path}: no CLIP of this project's; train one with task: clip")
    try:
        meta = json.loads(header.metadata[FORMAT])
        config = from_dict(TwoTowersConfig, meta["config"], "config")
        clip = CLIP(
            TwoTowers(config, build_tokenizer(config.text, meta["tokenizer"])),
            EfficientNetLite0(),
            meta["card"],
            sha256(path),
        )
        tensors = read_tensors(path)
        load_into(clip.towers, {k: v for k, v in tensors.items() if not k.startswith("trunk.")})
        trunk = {k.removeprefix("trunk."): v for k, v in tensors.items() if k.startswith("trunk.")}
        counts = {k: v for k, v in clip.trunk.state_dict().items() if k.endswith("num_batches_tracked")}
        load_into(clip.trunk, {**trunk, **counts})
    except (SfumatoError, ValueError, KeyError, TypeError) as e:
        raise BadCheckpoint(f"{path}: {e}") from None
    clip = clip.float().eval().requires_grad_(False)
    clip.trunk.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return clip
