"""What our own CLIP knows of held-out pictures, beside chance: retrieval both ways, and naming without training.

    python bench/clip.py DATA.parquet [CLIP.safetensors]

DATA is the corpus of `sfumato data prepare recipes/emoji.yaml`. Per split of its core: R@1, R@5, R@10 of pictures among
their captions ("name, style phrase") and of captions among their pictures, and of the right concept among the names of
all core concepts, each name written in every style ("name, style phrase", vectors averaged). Intervals: 95 %,
bootstrap over concepts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sfumato.data.config import DataConfig
from sfumato.data.pictures import Pictures, load_pictures
from sfumato.evaluation.bootstrap import mean_interval
from sfumato.evaluation.judge import recall_at, retrieval_ranks
from sfumato.families.clip import CLIP, load_clip

SPLITS = ("train", "val_combo", "test_combo", "test_concept")
SEEN = 600  # pictures of the training split, evenly chosen


def name_vectors(clip: CLIP, pictures: Pictures) -> tuple[list[str], torch.Tensor]:
    """All concepts, and a unit vector (C, D) for each: its name in every style, averaged."""
    names = {str(row["concept"]): str(row["name"]) for row in pictures.rows}
    concepts, styles = sorted(names), sorted({str(row["style_phrase"]) for row in pictures.rows})
    vectors = torch.stack([clip.embed_words([f"{names[c]}, {style}" for c in concepts]) for style in styles]).mean(0)
    return concepts, F.normalize(vectors, dim=1)


def figures(clip: CLIP, pictures: Pictures) -> Iterator[tuple[str, str, list[str], int, float]]:
    """(split, what, R@1/5/10 with intervals, N, chance at 1)."""
    concepts, names = name_vectors(clip, pictures)
    place = {c: i for i, c in enumerate(concepts)}
    for split in SPLITS:
        rows = [i for i, row in enumerate(pictures.rows) if row["split"] == split]
        rows = rows[:: max(1, len(rows) // SEEN)][:SEEN] if split == "train" else rows
        shown = [str(pictures.rows[i]["concept"]) for i in rows]
        seen = clip.embed_pictures(torch.stack([pictures.images[i] for i in rows]))
        said = clip.embed_words([f"{pictures.rows[i]['name']}, {pictures.rows[i]['style_phrase']}" for i in rows])
        own = range(len(rows))
        for what, similarity, targets in (
            ("picture → caption", seen @ said.T, own),
            ("caption → picture", said @ seen.T, own),
            ("picture → concept", seen @ names.T, [place[c] for c in shown]),
        ):
            ranks = retrieval_ranks(similarity, list(targets))
            cells = []
            for k in (1, 5, 10):
                hits = recall_at(ranks, k)
                low, high = mean_interval(hits, shown)
                cells.append(f"{np.mean(hits):.3f} ({low:.3f}–{high:.3f})")
            yield split, what, cells, len(rows), 1 / similarity.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("clip", nargs="?", type=Path, help="of `task: clip` (default: the one built in)")
    args = parser.parse_args()
    clip = load_clip(args.clip)
    config = DataConfig(args.data, where={"core": True})
    pictures = load_pictures(config, clip.towers.config.size, Path())
    print(f"CLIP {clip.hash[:12]}, {len({row['concept'] for row in pictures.rows})} concepts")
    print("| split | task | R@1 | R@5 | R@10 | N | chance R@1 |\n|---|---|---|---|---|---|---|")
    for split, what, cells, n, chance in figures(clip, pictures):
        print(f"| {split} | {what} | {' | '.join(cells)} | {n} | {chance:.4f} |", flush=True)


if __name__ == "__main__":
    main()
