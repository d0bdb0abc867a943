"""Which eyes for a CLIP: a convolutional network from nothing, or a head on EfficientNet-lite0's features?

    python bench/clip_towers.py DATA.parquet conv|lite0 TEXT.safetensors [CPU seconds]

TEXT holds a trained text tower and its head, which stay as they are (LiT, 2111.07991). Both eyes learn for the same CPU
seconds by the same InfoNCE on the core's training pictures; the seconds of computing features once are told apart.
Prints recall of captions for held-out pictures.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sfumato.data.captions import template_caption
from sfumato.data.config import DataConfig
from sfumato.data.pictures import load_pictures
from sfumato.evaluation.judge import recall_at, retrieval_ranks
from sfumato.families.clip import TwoTowers, TwoTowersConfig
from sfumato.families.pretrained import load_lite0
from sfumato.networks.blocks import group_norm
from sfumato.networks.towers import look
from sfumato.text.tokenizer import packaged_clip
from sfumato.training.clip import info_nce, true_elsewhere
from sfumato.training.start import pour

CAPTIONS = 2  # written for each picture


def conv_tower(dim: int) -> nn.Module:
    """Five stages of two 3×3 convolutions, 64×64 pixels → dim; about 60 million products a picture."""
    layers: list[nn.Module] = []
    c = 3
    for width in (24, 48, 96, 160, 256):
        layers += [nn.Conv2d(c, width, 3, stride=2, padding=1), group_norm(width), nn.GELU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), group_norm(width), nn.GELU()]
        c = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(c, dim))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("which", choices=("conv", "lite0"))
    parser.add_argument("text", type=Path, help="such as weights/emoji-clip-text.safetensors")
    parser.add_argument("budget", nargs="?", type=float, default=60.0, help="CPU seconds of training (default: 60)")
    args = parser.parse_args()
    which, budget = args.which, args.budget
    torch.manual_seed(0)
    towers = TwoTowers(TwoTowersConfig(), packaged_clip()).eval()
    for part in ("text", "text_head"):
        pour(getattr(towers, part), args.text, f"{part}.")

    @torch.no_grad()
    def said(captions: list[str]) -> torch.Tensor:
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        parts = [
            towers.words(*towers.text.tokenize([captions[i] for i in order[k : k + 256]]))
            for k in range(0, len(order), 256)
        ]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    pictures = load_pictures(DataConfig(args.data, where={"core": True}), 64, Path())
    split = {
        s: [i for i, r in enumerate(pictures.rows) if r["split"] == s] for s in ("train", "test_combo", "test_concept")
    }
    rng, train = random.Random(0), split["train"]
    captions = [[template_caption(pictures.rows[i], 0.0, rng) for i in train] for _ in range(CAPTIONS)]
    vectors = [said(of) for of in captions]
    images = torch.stack([pictures.images[i] for i in range(len(pictures))])
    inputs: torch.Tensor = images
    spent = time.process_time()
    if which == "lite0":
        trunk = load_lite0().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            inputs = torch.cat([look(trunk, part.float() / 127.5 - 1) for part in images.split(128)])
        towers.picture.standardize(inputs[train])
        eyes: nn.Module = towers.picture
        print(f"features: {time.process_time() - spent:.0f} CPU seconds", flush=True)
    else:
        eyes = conv_tower(towers.config.dim).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def view(rows: list[int] | torch.Tensor) -> torch.Tensor:
        x = inputs[rows]
        return x if which == "lite0" else (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    optimizer = torch.optim.AdamW(eyes.parameters(), 1e-3, weight_decay=0.05)
    batch = 512 if which == "lite0" else 256
    place, start, steps = torch.tensor(train), time.process_time(), 0
    eyes.train()
    while (share := (time.process_time() - start) / budget) < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (steps + 1) / 30, (1 - share) / 0.7)
        chosen = torch.randperm(len(train))[:batch]
        visit = rng.randrange(CAPTIONS)
        excluded = true_elsewhere([pictures.rows[train[i]] for i in chosen], [captions[visit][i] for i in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            seen = eyes(view(place[chosen]))
        loss = info_nce(20 * F.normalize(seen.float(), dim=1) @ vectors[visit][chosen].T, excluded).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    eyes.eval()
    learned = sum(p.numel() for p in eyes.parameters()) / 1e6
    print(f"{which}: {learned:.2f} M learned, {steps} steps of {batch} in {budget:g} s")
    for name in ("test_combo", "test_concept"):
        rows = split[name]
        with torch.no_grad():
            seen = torch.cat([eyes(view(rows[i : i + 128])) for i in range(0, len(rows), 128)])
        words = said([f"{pictures.rows[i]['name']}, {pictures.rows[i]['style_phrase']}" for i in rows])
        ranks = retrieval_ranks(F.normalize(seen.float(), dim=1) @ words.T, list(range(len(rows))))
        print(name, len(rows), *(f"R@{k} {recall_at(ranks, k).mean():.3f}" for k in (1, 5, 10)), flush=True)


if __name__ == "__main__":
    main()
