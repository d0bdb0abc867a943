"""The task of training a CLIP: which caption belongs to which picture of the batch?

    loss_i = −½ log softmax_j s(picture_i, words_j)|_{j=i} − ½ log softmax_j s(picture_j, words_i)|_{j=i}

(2103.00020, figure 3). A caption may well be true of other pictures of the batch; such pairs are left out of both
sums. The pictures' features are computed once, as they are and in a few changed views. Each rank, and each part of
an accumulated step, compares its own pictures and captions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from sfumato.checkpoints.packaged import LITE0, MINILM
from sfumato.data.latents import encoded
from sfumato.data.pictures import Pictures, Row
from sfumato.families.clip import CLIP, TwoTowers, clip_metadata, clip_tensors
from sfumato.families.pretrained import load_lite0
from sfumato.files import write_atomically
from sfumato.networks.efficientnet import EfficientNetLite0
from sfumato.networks.towers import SIDE, look
from sfumato.text.tokenizer import packaged_clip
from sfumato.training.draws import draws
from sfumato.training.objective import Losses
from sfumato.training.recipe import ClipRecipe, Recipe
from sfumato.training.start import pour

PARTS = 4  # captions of like length go through the tower together


class Prepared(NamedTuple):
    """One micro-batch.

    Args:
        features: of the pictures (B, F), in the order of the captions' lengths, the shortest first.
        rows: token ids and masks (B/parts, M) of the captions.
        excluded: pairs (B, B) of picture and caption that say nothing: the caption is true of that picture as well.
    """

    features: Tensor
    rows: list[tuple[Tensor, Tensor]]
    excluded: Tensor


def info_nce(similarity: Tensor, excluded: Tensor) -> Tensor:
    """Symmetric InfoNCE of each picture and its caption (B,), from similarities (B, B) without the excluded pairs."""
    s = similarity.masked_fill(excluded, -torch.inf)
    own = torch.arange(len(s), device=s.device)
    return (F.cross_entropy(s, own, reduction="none") + F.cross_entropy(s.T, own, reduction="none")) / 2


def true_elsewhere(rows: Sequence[Row], captions: Sequence[str]) -> Tensor:
    """Pairs (B, B) of picture and caption, not each other's, where the caption is true of the picture all the same.

    What a caption names is its picture's concept, unless it is the style's phrase alone, and its style, if the phrase
    is in it.
    """
    things = [str(row.get("concept") or row.get("name") or row.get("caption") or "") for row in rows]
    styles = [str(row.get("style_phrase") or "") for row in rows]
    names_thing = torch.tensor([c not in ("", s) for c, s in zip(captions, styles, strict=True)])
    names_style = torch.tensor([bool(s) and s in c for c, s in zip(captions, styles, strict=True)])
    thing, style = _numbered(things), _numbered(styles)
    wrong = (thing[:, None] != thing) & names_thing | (style[:, None] != style) & names_style  # [picture, caption]
    return ~wrong & ~torch.eye(len(rows), dtype=torch.bool)


def _numbered(values: Sequence[str]) -> Tensor:
    place = {v: i for i, v in enumerate(dict.fromkeys(values))}
    return torch.tensor([place[v] for v in values])


class ClipTask:
    """Words and pictures in, contrastive losses out."""

    def __init__(self, recipe: Recipe, pictures: Pictures, root: Path, cache: Path):
        self.recipe, self.pictures = recipe, pictures
        settings = recipe.clip
        self.trunk = load_lite0().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.features = view_features(self.trunk, pictures, settings.views, cache)
        torch.manual_seed(recipe.seed)
        self.module = TwoTowers(settings.network, packaged_clip())
        self.module.picture.standardize(self.features[0])
        _start(self.module, settings, root, cache)

    def fetch(self, places: range) -> Prepared:
        """Prepare features and token ids for some places of the endless order, the shortest captions first."""
        drawn = [(i, self.pictures.caption(i, rng)) for i, rng in self.pictures.drawn(self.recipe.seed, places)]
        u, _ = draws(self.recipe.seed, places, ())
        views = (u * len(self.features)).long().tolist()
        lengths = [len(e.ids) for e in self.module.text.tokenizer.encode_batch([c for _, c in drawn])]
        order = sorted(range(len(drawn)), key=lambda i: (lengths[i], i))
        captions = [drawn[i][1] for i in order]
        size = -(-len(order) // PARTS)
        rows = [self.module.text.tokenize(captions[i : i + size]) for i in range(0, len(captions), size)]
        features = torch.stack([self.features[views[i]][drawn[i][0]].float() for i in order])
        return Prepared(features, rows, true_elsewhere([self.pictures.rows[drawn[i][0]] for i in order], captions))

    def fingerprint(self) -> str:
        """SHA-256 of the pictures and their columns."""
        return self.pictures.fingerprint()

    def losses(self, module: Callable[..., Any], batch: Prepared) -> Losses:
        """Return each pair's loss; the places, which nothing here draws, are 0."""
        device = self.module.log_scale.device
        rows = [(ids.to(device), mask.to(device)) for ids, mask in batch.rows]
        loss = info_nce(module(batch.features.to(device), rows).float(), batch.excluded.to(device))
        return Losses(loss, torch.zeros(len(loss)))

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write both towers and the trunk, fp16, with metadata that say how to build them."""
        config = self.recipe.clip.network
        meta = clip_metadata(config, self.module.text.tokenizer, {"name": self.recipe.name, **self.recipe.card})
        write_atomically(path, save(clip_tensors(weights, self.trunk), meta))

    @torch.no_grad()
    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw the pictures nearest to each of the recipe's prompts, a row of eight each."""
        from sfumato.training.grid import write_sheet

        towers = TwoTowers(self.recipe.clip.network, self.module.text.tokenizer).eval()
        towers.load_state_dict(dict(weights))
        prompts = self.recipe.grid_prompts or ("red apple", "tiger", "castle")
        words = CLIP(towers, self.trunk, {}).embed_words(prompts)
        best = (words @ towers.pictures(self.features[0]).T).topk(min(8, len(self.pictures)), dim=1).indices
        write_sheet(self.pictures.at(best.flatten().tolist()), best.shape[1], path)


def _start(towers: TwoTowers, settings: ClipRecipe, root: Path, cache: Path) -> None:
    """Give the tower its first weights, or its table of tokens the first rows, and freeze what the recipe says."""
    if settings.text:
        for part in ("text", "text_head"):
            pour(getattr(towers, part), root / settings.text, f"{part}.")
        if settings.freeze_text:
            towers.text.requires_grad_(False)
            towers.text_head.requires_grad_(False)
    elif settings.words == "minilm":
        table = _kept(cache / f"words-{MINILM.sha256[:16]}-{settings.network.text.token_dim}.safetensors", towers)
        with torch.no_grad():
            towers.text.tokens.weight.copy_(table)
            if settings.network.text.token_dim:
                torch.nn.init.orthogonal_(towers.text.widen.weight, gain=0.5)  # type: ignore[arg-type]
    if settings.freeze_words:
        towers.text.tokens.requires_grad_(False)


def _kept(path: Path, towers: TwoTowers) -> Tensor:
    from safetensors.torch import load

    from sfumato.training.word_table import word_table

    if not path.exists():
        config = towers.config.text
        table = word_table(towers.text.tokenizer, config.token_dim or config.dim)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"table": table.contiguous()}))
    return load(path.read_bytes())["table"]


def view_features(trunk: EfficientNetLite0, pictures: Pictures, views: int, cache: Path) -> list[Tensor]:
    """The trunk's features fp16 (N, F) of all pictures as they are, and of ``views`` − 1 changed views of each."""

    def make(view: int) -> Tensor:
        generator = torch.Generator().manual_seed(view)
        key = f"clip/{LITE0.sha256}/{SIDE}/{view}"
        return encoded(pictures, lambda x: look(trunk, changed(x, generator) if view else x), key, cache)

    return [make(view) for view in range(views)]


def changed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [−1, 1] at 128 px: turned up to 11°, scaled by 0.8 to 1.15, moved, tinted; white around.

    Never mirrored: letters and arrows would be others.
    """
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=generator)

    angle, zoom, move = uniform(-0.2, 0.2), 1 / uniform(0.8, 1.15), uniform(-0.12, 0.12, 2)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrices = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    where = F.affine_grid(matrices, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, where, align_corners=False)  # what lies outside is 0, which is white here
    contrast, tint = uniform(0.8, 1.2, 1, 1, 1), uniform(-0.1, 0.1, 3, 1, 1)
    return (x * contrast + 1 + tint).clamp(-1, 1)
