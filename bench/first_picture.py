"""What a pipeline adds to its model's own time, for the first picture after loading and for the next one.

    python bench/first_picture.py [MODEL ...] [--steps 20] [--rounds 3] [--wall] [--json]

A model's own time is what its text towers, its denoiser and its decoder take, measured around each call; all else is
the pipeline's: the request, noise, levels, the sampler's and guidance's arithmetic, whatever is imported late, the
picture as PNG. Every round is a fresh process; the least of the rounds is told. Seconds are of the CPU, since others
may be at work; ``--wall`` takes the clock's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

LIMIT = 0.2  # seconds


def measure(name: str, steps: int, clock: Callable[[], float]) -> dict[str, float]:
    """Load, then make two pictures one after the other, in this process."""
    import sfumato
    from sfumato.pipeline.pipeline import Pipeline

    model = sfumato.load(name or None).model
    own = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal own
            begin = clock()
            try:
                return call(*args, **kwargs)
            finally:
                own += clock() - begin

        return run

    model.network.forward = timed(model.network.forward)
    pipe = Pipeline(replace(model, encode=timed(model.encode), decode=timed(model.decode)))
    facts: dict[str, float] = {}
    for which in ("first", "second"):
        own, begin = 0.0, clock()
        [picture] = pipe.generate("a red apple", seed=0, steps=steps)
        picture.encode()
        total = clock() - begin
        facts |= {f"{which} s": total, f"{which}, the model's own s": own, f"{which}, added s": total - own}
    return facts


def main() -> int:
    """Print each round's figures; exit code 1 if a first picture's addition is beyond the limit in the best round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=[""], metavar="MODEL", help="default: the one built in")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(measure(a.models[0], a.steps, time.perf_counter if a.wall else time.process_time)))
        return 0
    good = True
    for name in a.models:
        rounds: list[dict[str, float]] = []
        for _ in range(a.rounds):
            command = [sys.executable, __file__, name, "--child", f"--steps={a.steps}", *["--wall"] * a.wall]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
        least = {k: min(r[k] for r in rounds) for k in rounds[0]}
        good &= least["first, added s"] <= LIMIT
        if a.json:
            print(json.dumps({"model": name, "rounds": rounds, "least": least}))
        else:
            print(name or "the built-in model", *(f"{k} {v:.3f};" for k, v in least.items()), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
