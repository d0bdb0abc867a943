"""A trained model of our own as the embedded one: its matrices in eight bits, its card and defaults set.

    python tools/embed.py RUN/final.safetensors src/sfumato/models/NAME.safetensors RECIPE.yaml [--preview FILE]
        [--autoencoder FILE] [--average FILE] [--whole]

The word table, which stays as it was laid out from word vectors, is kept as floats of eight bits (E4M3: 2209.05433),
and the denoiser's and the text tower's matrices and the decoder's kernels as whole numbers of eight bits with a scale
for each row, so that more of them fit a file; how much is lost is printed. All else is fp16. ``--whole`` keeps them in
fp16, too. ``--average`` takes the mean of the denoiser's weights with those of another model of its shape, such as the
one that it was trained on from (2109.01903): that one's breadth, and what this one learned besides. What is embedded
already may be embedded again, with another decoder, card or defaults: its weights stay.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sfumato.checkpoints.eight_bits import pack, unpack
from sfumato.checkpoints.tensors import read_header, read_tensors, to_half
from sfumato.config import from_dict, to_dict
from sfumato.families.autoencoder import load_autoencoder, load_preview
from sfumato.families.native import FORMAT, NativeConfig
from sfumato.files import write_atomically
from sfumato.training.recipe import load_recipe

WORDS = "text.tokens.weight"
DECODER = "autoencoder.decoder."
SMALL = 4096  # numbers; matrices of fewer are not worth it


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--preview", type=Path, help="a decoder for previews, where the model was trained without one")
    parser.add_argument("--autoencoder", type=Path, help="the same latents with a decoder that learned on")
    parser.add_argument("--average", type=Path, help="another model, to the mean of whose denoiser and this one's")
    parser.add_argument("--whole", action="store_true", help="matrices in fp16")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, [])
    tensors = unpack(read_tensors(args.source))
    meta = json.loads(read_header(args.source).metadata[FORMAT])
    config = from_dict(NativeConfig, meta["config"], "config")
    if recipe.task != "distill":  # a student draws as it was taught
        config = replace(config, defaults=recipe.model.defaults)
    if args.average:
        other = unpack(read_tensors(args.average))
        for k in [k for k in tensors if k.startswith("network.")]:
            if k not in other or other[k].shape != tensors[k].shape:
                parser.error(f"{args.average} has another denoiser than {args.source}: {k} differs")
            tensors[k] = ((tensors[k].float() + other[k].float()) / 2).half()
    if args.autoencoder:
        network = load_autoencoder(args.autoencoder)
        if config.autoencoder is None:
            parser.error(f"{args.source} has no autoencoder")
        if network.config != replace(config.autoencoder, decoder_blocks=network.config.decoder_blocks):
            parser.error(f"{args.autoencoder} holds {network.config}, but {args.source} {config.autoencoder}")
        learned = {f"autoencoder.{k}": v for k, v in network.state_dict().items()}
        for k, v in learned.items():
            if not k.startswith(DECODER) and not torch.equal(v.half(), tensors[k]):
                parser.error(f"{args.autoencoder} has other latents than {args.source}: {k} differs")
        tensors = {k: v for k, v in tensors.items() if not k.startswith(DECODER)} | to_half(learned)
        config = replace(config, autoencoder=network.config)
    if args.preview:
        decoder = load_preview(args.preview)
        tensors |= to_half({f"preview.{k}": v for k, v in decoder.state_dict().items()})
        config = replace(config, preview=decoder.config)
    table = tensors[WORDS].float()
    tensors[WORDS] = table.to(torch.float8_e4m3fn)
    print(f"words: {lost(tensors[WORDS].float(), table):.4%} of their energy lost")
    chosen = [k for k, v in tensors.items() if k != WORDS and v.numel() >= SMALL and _is_matrix(k, v)]
    before = {k: tensors.pop(k) for k in chosen}
    if args.whole:
        tensors |= to_half(before)
    elif chosen:
        packed = {name: t for k, v in before.items() for name, t in pack(k, v).items()}
        after = unpack(packed)
        worst = max(chosen, key=lambda k: lost(after[k], before[k]))
        print(f"{len(chosen)} matrices and kernels: at most {lost(after[worst], before[worst]):.4%} ({worst})")
        tensors |= packed
    card = {**meta["card"], "name": args.target.stem, **recipe.card}
    stored = {"config": to_dict(config), "tokenizer": meta["tokenizer"], "card": card}
    write_atomically(args.target, save(tensors, {FORMAT: json.dumps(stored)}))
    numbers = sum(t.numel() for t in tensors.values())
    print(f"{args.target}: {numbers / 1e6:.2f} million parameters, {args.target.stat().st_size / 1e6:.2f} MB")


def _is_matrix(name: str, weight: Tensor) -> bool:
    """Whether it is a matrix, or a stack of them, of denoiser or text tower, or a kernel of the decoder."""
    if name.startswith(DECODER):
        return weight.ndim == 4
    return name.startswith(("network.", "text.")) and weight.ndim in (2, 3)


def lost(kept: Tensor, whole: Tensor) -> float:
    """The share of a tensor's energy that an error has."""
    return float((kept - whole.float()).square().sum() / whole.float().square().sum().clamp(min=1e-30))


if __name__ == "__main__":
    main()
