"""Latents against pixels: operations and wall time of a whole picture, text and decoding included, two models in turns.

    python bench/pixels.py LATENT.safetensors PIXELS.safetensors [ROUNDS]

Both make a picture of their own size at their own defaults, without enlargement. Their quality is `sfumato evaluate`'s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from torch.utils.flop_counter import FlopCounterMode

from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline, load
from sfumato.pipeline.request import Request


def draw(pipe: Pipeline, seed: int) -> Picture:
    """Make one picture."""
    request = Request("a red apple", seed=seed, upscale=1)
    return next(event for event in pipe.run(request) if isinstance(event, Picture))


def main(models: list[str], rounds: int) -> None:
    """Count, then time in turns."""
    pipes = [load(name) for name in models]
    operations: list[float] = []
    for pipe in pipes:
        with FlopCounterMode(display=False) as counter:
            draw(pipe, 0)
        operations.append(counter.get_total_flops())
    times: list[list[float]] = [[] for _ in pipes]
    for i in range(rounds):
        for pipe, taken in zip(pipes, times, strict=True):
            start = time.perf_counter()
            draw(pipe, i)
            taken.append(time.perf_counter() - start)
    for name, pipe, flops, taken in zip(models, pipes, operations, times, strict=True):
        d = pipe.model.defaults
        row = {"model": name, "size": [d.width, d.height], "steps": d.steps, "GFLOP": round(flops / 1e9, 2)}
        print(json.dumps({**row, "median s": round(statistics.median(taken), 4), "least s": round(min(taken), 4)}))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    print(
        json.dumps({"operations": round(operations[1] / operations[0], 2), "time": round(statistics.median(ratios), 2)})
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, metavar="MODEL", help="files, runs or names")
    parser.add_argument("rounds", nargs="?", type=int, default=10, help="(default: 10)")
    args = parser.parse_args()
    main(args.models, args.rounds)
