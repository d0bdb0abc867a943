"""The sheets of pictures in the documents, by the embedded model and its autoencoder.

    python tools/sheets.py DATA.parquet    # docs/first.png, docs/grid.png, docs/vae.png

DATA are the pictures of recipes/emoji.yaml, of which held-out combinations are shown beside their reconstructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfumato import Request, load
from sfumato.cli import main as command
from sfumato.data.config import DataConfig
from sfumato.evaluation.reconstruction import reconstruct
from sfumato.evaluation.truth import load_truth
from sfumato.families.autoencoder import load_autoencoder
from sfumato.pipeline.canvas import cover
from sfumato.pipeline.picture import Picture, sheet
from sfumato.pixels import Pixels

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
AUTOENCODER = ROOT / "weights/emoji-vae.safetensors"
FIRST = "sunflower, fluent 3d style"  # as README.md has it
PROMPTS = (  # in pairs, one row each: things it has seen, a colour and a composition it has not
    "red apple, noto style", "tiger, fluent 3d style",
    "rocket in twemoji style", "smiling face, emojione style",
    "pizza, fluent flat style", "castle, blob style",
    "dog face, twemoji style", "house, streamline style",
    "octopus, noto style", "sunflower, fluent flat style",
    "birthday cake, fluent flat style", "soccer ball, fluent flat style",
    "a blue apple", "a cat wearing a crown",
    "owl, fluent flat style", "volcano, emojione style",
)  # fmt: skip
SIDE = 128  # pixels of one picture in the grid
COLUMNS, ROWS = 6, 8  # of pairs of drawing and reconstruction


def main(data: str) -> None:
    """Write the sheets."""
    truth = load_truth(DataConfig(path=data, where={"core": True, "split": ["train", "test_combo"]}), 64, None)
    first = ["generate", FIRST, "-n", "4", "--grid", "--seed", "1", "--scale", "1"]
    command([*first, "--out", str(DOCS / "first.png"), "--force"])
    pipe = load()
    drawn: list[Pixels] = []
    for prompt in PROMPTS:
        made = [e for e in pipe.run(Request(prompt, seed=1, n=4)) if isinstance(e, Picture)]
        drawn += [np.asarray(cover(p.image, (SIDE, SIDE))) for p in made]
    Image.fromarray(sheet(drawn, 8)).save(DOCS / "grid.png")

    of = truth.drawn["test_combo"]
    chosen = [of[i] for i in np.linspace(0, len(of) - 1, COLUMNS * ROWS).round().astype(int)]
    real = truth.images[chosen]
    both = torch.stack([real, reconstruct(load_autoencoder(AUTOENCODER), real)], 1).flatten(0, 1)
    Image.fromarray(sheet(list(both.permute(0, 2, 3, 1).numpy()), 2 * COLUMNS)).save(DOCS / "vae.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    main(parser.parse_args().data)
