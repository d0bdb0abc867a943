"""A trained model of our own as the embedded one: its word table narrowed, its card and defaults set.

    python tools/embed.py RUN/final.safetensors src/sfumato/models/NAME.safetensors RECIPE.yaml [--token-dim 45]

Words go through a table (V, E) and a matrix that widens them (E, D), whose product has rank E. Of that product the
first singular directions are kept (Eckart & Young 1936), so that the file fits its size; how much is lost is printed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save

from sfumato.checkpoints.tensors import read_header, read_tensors
from sfumato.config import from_dict, to_dict
from sfumato.families.autoencoder import load_preview
from sfumato.families.native import FORMAT, NativeConfig
from sfumato.files import write_atomically
from sfumato.training.recipe import load_recipe


def narrow(table: torch.Tensor, widen: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best table (V, rank) and matrix (D, rank) in the place of (V, E) and (D, E); the share of energy lost."""
    q, r = torch.linalg.qr(table.double())
    u, s, v = torch.linalg.svd(r @ widen.double().T, full_matrices=False)
    root = s[:rank].sqrt()
    lost = float((s[rank:] ** 2).sum() / (s**2).sum())
    return (q @ u[:, :rank]) * root, (v[:rank].T * root), lost


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--token-dim", type=int, default=0)
    parser.add_argument("--preview", type=Path, help="a decoder for previews, where the model was trained without one")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, [])
    tensors = dict(read_tensors(args.source))
    meta = json.loads(read_header(args.source).metadata[FORMAT])
    config = replace(from_dict(NativeConfig, meta["config"], "config"), defaults=recipe.model.defaults)
    if args.token_dim:
        table, widen, lost = narrow(tensors["text.tokens.weight"], tensors["text.widen.weight"], args.token_dim)
        tensors |= {"text.tokens.weight": table.half().contiguous(), "text.widen.weight": widen.half().contiguous()}
        config = replace(config, text=replace(config.text, token_dim=args.token_dim))
        print(f"words: {config.text.token_dim} numbers each, {lost:.2%} of their energy lost")
    if args.preview:
        decoder = load_preview(args.preview)
        tensors |= {f"preview.{k}": v.half().contiguous() for k, v in decoder.state_dict().items()}
        config = replace(config, preview=decoder.config)
    card = {**meta["card"], "name": args.target.stem, **recipe.card}
    stored = {"config": to_dict(config), "tokenizer": meta["tokenizer"], "card": card}
    write_atomically(args.target, save(tensors, {FORMAT: json.dumps(stored)}))
    numbers = sum(t.numel() for t in tensors.values())
    print(f"{args.target}: {numbers / 1e6:.2f} million parameters, {args.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
