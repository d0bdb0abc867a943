"""``sfumato evaluate``: a model's figures on captioned pictures, each with its interval and the real pictures' own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.console import Parser
from sfumato.errors import BadRequest
from sfumato.files import check_target

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.evaluation.measure import Yardstick
    from sfumato.evaluation.report import Report
    from sfumato.evaluation.truth import Truth
    from sfumato.networks.compact import CompactAutoencoder


OF_A_REQUEST = ("seed", "steps", "sampler", "guidance", "best_of")  # settings that only pictures from noise have
OF_RECONSTRUCTIONS = ("lpips", "fd")  # what an autoencoder is measured by unless metrics are asked for


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sfumato evaluate",
        description="Measure a model's pictures against real ones. What was made is kept: the same command goes on.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="weight file, training run or name (default: the one built in)"
    )
    parser.add_argument("--data", metavar="D", help="folder of captioned pictures, .parquet or .tar; or 'sample'")
    parser.add_argument(
        "--real", action="store_true", help="measure real pictures instead of a model's: the ceiling of each figure"
    )
    parser.add_argument(
        "--where", metavar="COLUMN=VALUE", action="append", default=[], help="only rows with this value"
    )
    parser.add_argument(
        "--exclude", metavar="COLUMN=A,B", action="append", default=[], help="no rows with one of these values"
    )
    parser.add_argument("--n", type=int, metavar="N", help="captions per split at most (default: every held-out one)")
    parser.add_argument(
        "--metrics", metavar="A,B", help="of fd, kid, pr, lpips, judge, clip, nearest (these are the default) and fid"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the first picture; the next has S+1 (default: 0)")
    parser.add_argument("--steps", type=int, metavar="K", help="steps from noise to picture")
    parser.add_argument("--sampler", metavar="NAME", help="see `sfumato samplers`")
    parser.add_argument("--guidance", type=float, metavar="W", help="how strongly to follow the captions; 1 = plain")
    parser.add_argument(
        "--best-of", type=int, metavar="K", help="draw K pictures for each caption, and keep the one CLIP finds nearest"
    )
    parser.add_argument(
        "--size", type=int, metavar="S", help="side at which pictures are compared (default: the model's, or 64)"
    )
    parser.add_argument("--inception", metavar="FILE", help="Inception-v3 weights of torch-fidelity's, for fid")
    parser.add_argument("--json", metavar="FILE", help="also write all figures as JSON")
    parser.add_argument(
        "--grid", metavar="FILE.png", help="also draw made, real and nearest training pictures side by side"
    )
    parser.add_argument("--force", action="store_true", help="replace the files of --json and --grid if they exist")
    parser.add_argument("--cache", metavar="DIR", help="where results are kept (default: below ~/.cache/sfumato)")
    return parser


def main(argv: list[str]) -> int:
    """Run ``sfumato evaluate`` with its arguments and return the exit code; raises SfumatoError for bad input."""
    args = _parser().parse_args(argv)
    _check(args)
    from rich.console import Console

    from sfumato.data.config import DataConfig
    from sfumato.evaluation.cache import Cache, default_folder
    from sfumato.evaluation.generate import base_request
    from sfumato.evaluation.measure import DEFAULT, check_metrics, evaluate, make_pictures, prepare
    from sfumato.evaluation.measure import report as report_on
    from sfumato.evaluation.reconstruction import measure_pairs, reconstructions
    from sfumato.evaluation.truth import load_truth
    from sfumato.families.autoencoder import is_autoencoder
    from sfumato.files import sha256, write_atomically
    from sfumato.pipeline.pipeline import load

    ae_file = Path(args.model) if args.model is not None and is_autoencoder(Path(args.model)) else None
    usual = DEFAULT if ae_file is None else OF_RECONSTRUCTIONS
    metrics = check_metrics(usual if args.metrics is None else [m.strip() for m in args.metrics.split(",")])
    if args.inception is not None and "fid" not in metrics:
        raise BadRequest("--inception is for the metric fid: ask for it with --metrics, or leave --inception out")
    if args.grid and not set(metrics) & {"fd", "kid", "pr", "judge", "nearest"}:
        raise BadRequest("--grid shows nearest training pictures: ask for the metric nearest too")
    settings: dict[str, Any] = {k: getattr(args, k) for k in ("steps", "sampler", "guidance")}
    settings["best_of"] = 1 if args.best_of is None else args.best_of  # 0 is refused, as by `generate`
    settings["seed"] = args.seed or 0
    pipe, size = None, 64
    if ae_file is not None:
        if given := _given(args, *OF_A_REQUEST):
            raise BadRequest(f"{ae_file} is an autoencoder and gives pictures back: leave out {', '.join(given)}")
    elif not args.real:
        pipe = load(args.model)
        size = base_request(pipe, **settings).width or size  # settings are checked before any work

    console = Console(stderr=True)
    where = _conditions("--where", args.where)
    exclude = {k: v if isinstance(v, list) else [v] for k, v in _conditions("--exclude", args.exclude).items()}
    config = DataConfig(path=args.data, where=where, exclude=exclude)
    truth = load_truth(
        config, args.size or size, args.n, on_report=lambda r: console.print(f"data: {r.summary()}", markup=False)
    )
    cache = Cache(Path(args.cache).expanduser() if args.cache else default_folder())
    network = None if ae_file is None else _load_autoencoder(ae_file, truth)
    console.print("captions: " + ", ".join(f"{split} {len(rows)}" for split, rows in truth.drawn.items()), markup=False)
    yardstick = prepare(truth, metrics, cache, Path(args.inception) if args.inception else None)
    data = Path(args.data).name
    if ae_file is not None and network is not None:
        made = reconstructions(network, truth)
        shape = {"factor": network.config.factor, "latent channels": network.config.latent_channels}
        figures = measure_pairs(truth, made) + yardstick.measure(made)
        report = report_on(ae_file.stem, sha256(ae_file), yardstick, data, shape, figures)
    else:
        with _progress(console, sum(map(len, truth.drawn.values()))) as advance:
            report = evaluate(pipe, yardstick, data, advance, **settings)
        made = None
    report.print(Console(width=None if sys.stdout.isatty() else 200))
    _write_json(args, report)
    if args.grid:
        if made is None:
            assert pipe is not None  # --real is refused with it
            made, _ = make_pictures(pipe, truth, cache, **settings)  # from the cache
        write_atomically(Path(args.grid), draw_grid(yardstick, made), overwrite=args.force)
    return 0


def _load_autoencoder(path: Path, truth: Truth) -> CompactAutoencoder:
    from sfumato.families.autoencoder import load_autoencoder

    network = load_autoencoder(path)
    if truth.images.shape[-1] % network.config.factor:
        raise BadRequest(f"--size must be a multiple of the autoencoder's factor, {network.config.factor}")
    return network


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that no data or model could make sense of."""
    if args.data is None:
        raise BadRequest("say which pictures to measure against with --data")
    of_a_model = ([] if args.model is None else ["the model"]) + _given(args, "grid", *OF_A_REQUEST)
    if args.real and of_a_model:
        raise BadRequest(f"--real measures real pictures: leave out {', '.join(of_a_model)}")
    for name, suffix in (("json", ".json"), ("grid", ".png")):
        if path := getattr(args, name):
            if not Path(path).absolute().parent.is_dir():
                raise BadRequest(f"--{name}: no folder {Path(path).absolute().parent}")
            check_target(Path(path), suffix, overwrite=args.force)
    if args.size is not None and not 8 <= args.size <= 1024:
        raise BadRequest(f"--size must lie from 8 to 1024, not {args.size}")


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    """Those of some flags that were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def _write_json(args: argparse.Namespace, report: Report) -> None:
    import json

    from sfumato.files import write_atomically

    if args.json:
        data = (json.dumps(report.to_dict(), indent=1) + "\n").encode()
        write_atomically(Path(args.json), data, overwrite=args.force)


def draw_grid(yardstick: Yardstick, made: dict[str, Tensor], per_split: int = 12, columns: int = 4) -> bytes:
    """Return a PNG of triples: a made picture, the real one of its caption, the nearest training picture."""
    import io

    import numpy as np
    from PIL import Image

    truth = yardstick.truth
    side = truth.images.shape[-1]
    scale, gap = max(1, 64 // side), 4
    cell = side * scale
    rows: list[list[Any]] = []
    for split, images in made.items():
        near = yardstick.nearest(split, images)
        chosen = np.linspace(0, len(images) - 1, min(per_split, len(images))).round().astype(int)
        triples = [(images[i], truth.images[truth.drawn[split][i]], truth.images[int(near[i])]) for i in chosen]
        rows += [triples[i : i + columns] for i in range(0, len(triples), columns)]
    width, height = columns * (3 * cell + gap) - gap, len(rows) * (cell + gap) - gap
    page = Image.new("RGB", (width, height), (128, 128, 128))
    for r, triples in enumerate(rows):
        for c, triple in enumerate(triples):
            for k, picture in enumerate(triple):
                image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((cell, cell), Image.Resampling.NEAREST)
                page.paste(image, (c * (3 * cell + gap) + k * cell, r * (cell + gap)))
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def _conditions(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column, value in map(_condition, texts):
        if column in found:
            raise BadRequest(f"{flag} names {column} twice: write {column}=A,B")
        found[column] = value
    return found


def _condition(text: str) -> tuple[str, Any]:
    """Read COLUMN=VALUE or COLUMN=A,B; true, false and numbers are what they look like."""
    import yaml

    column, equals, value = text.partition("=")
    if not equals or not column:
        raise BadRequest(f"{text!r} is not of the form COLUMN=VALUE")
    try:
        values = [yaml.safe_load(v) for v in value.split(",")]
    except yaml.YAMLError:
        raise BadRequest(f"{text!r}: the value cannot be read") from None
    return column, values if len(values) > 1 else values[0]


@contextmanager
def _progress(console: Any, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: Sequence[Any] = (TextColumn("making pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)
