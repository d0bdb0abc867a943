"""Samplers and guidance on a model of our own: FD and the judge's recall of its pictures, and their time.

    python bench/quality.py samplers MODEL DATA.parquet [N]     # ddpm 1000 … dpmpp-2m 5: FD, R@1, seconds a picture
    python bench/quality.py guidance MODEL DATA.parquet [N]     # w = 1 … 15: FD and R@1, drawn as docs/guidance.png

N captions of each split (default 540: every held-out combination). Pictures are kept in the cache, so an interrupted
bench goes on where it stopped; a time is told only where all pictures of a row were made anew.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sfumato.data.config import DataConfig
from sfumato.evaluation.cache import Cache, default_folder
from sfumato.evaluation.measure import evaluate, make_pictures, prepare
from sfumato.evaluation.truth import Truth, load_truth
from sfumato.pipeline.pipeline import Pipeline, load

SAMPLERS = [
    ("ddpm", 1000), ("ddpm", 250), ("ddpm", 100), ("ddim", 50), ("ddim", 20), ("ddim", 10), ("plms", 20), ("heun", 10),
    ("dpmpp-2m", 20), ("dpmpp-2m", 10), ("dpmpp-2m", 5),
]  # fmt: skip
SCALES = (1, 1.5, 2, 3, 4, 5, 7.5, 10, 15)
SPLITS = ("seen", "test_combo")
FIGURE = Path(__file__).parents[1] / "docs/guidance.png"


def main(what: str, model: str, data: str, n: int) -> None:
    pipe, cache = load(model), Cache(default_folder())
    where = {"core": True, "split": ["train", "test_combo"]}
    truth = load_truth(DataConfig(path=data, where=where), pipe.model.defaults.width, n)
    yardstick = prepare(truth, ("fd", "judge"), cache)
    pictures = sum(map(len, truth.drawn.values()))
    rows: list[dict[str, object]] = []
    settings = (
        [{"sampler": sampler, "steps": steps} for sampler, steps in SAMPLERS[::-1]]
        if what == "samplers"
        else [{"guidance": float(w)} for w in SCALES]
    )
    for setting in settings:
        row: dict[str, object] = {**setting}
        if (seconds := seconds_to_make(pipe, truth, cache, setting)) is not None:
            row["seconds a picture"] = round(seconds / pictures, 3)
        report = evaluate(pipe, yardstick, Path(data).name, **setting)
        figures = {f"{f.metric} {f.split}": f for f in report.figures if not f.style}
        for split in SPLITS:
            for metric in ("FD-lite0", "R@1"):
                f = figures[f"{metric} {split}"]
                row[f"{metric} {split}"] = round(f.value, 3)
                row[f"{metric} {split} interval"] = [round(v, 3) for v in f.interval]
        rows.append(row)
        print(json.dumps(row), flush=True)
    if what == "guidance":
        plot(rows, FIGURE)


def seconds_to_make(pipe: Pipeline, truth: Truth, cache: Cache, setting: dict[str, Any]) -> float | None:
    """Make a row's pictures; None if some of them were there."""
    kept, making = False, False

    def made(n: int) -> None:
        nonlocal kept, making
        kept, making = kept or (n > 0 and not making), n == 0  # told 0 at each step, and n at a part's end

    start = time.perf_counter()
    make_pictures(pipe, truth, cache, made, **setting)
    return None if kept else time.perf_counter() - start


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scales = [r["guidance"] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, metric in ((left, "FD-lite0"), (right, "R@1")):
        for split in SPLITS:
            values = [r[f"{metric} {split}"] for r in rows]
            intervals = [r[f"{metric} {split} interval"] for r in rows]
            axes.plot(scales, values, marker="o", label=split)
            axes.fill_between(scales, [i[0] for i in intervals], [i[1] for i in intervals], alpha=0.15)
        axes.set(xlabel="guidance scale w", ylabel=metric)
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samplers", "guidance"))
    parser.add_argument("model")
    parser.add_argument("data", help="the corpus of `sfumato data prepare recipes/emoji.yaml`")
    parser.add_argument("n", nargs="?", type=int, default=540, help="captions of each split (default: 540)")
    args = parser.parse_args()
    main(args.what, args.model, args.data, args.n)
