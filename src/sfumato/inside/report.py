"""A picture explained in one HTML file that asks nobody for anything: `sfumato explain`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from html import escape
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.inside import compare, path
from sfumato.inside.plot import Series, chart
from sfumato.inside.record import data_url
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request
from sfumato.pixels import Pixels

T = TypeVar("T")
Told = Callable[[str, int, int], None]  # what is done, steps done, of all

SIDE = 192  # pixels of the longer side of a picture in the report, at most
SHOWN = 8  # steps of which maps are shown
CURVES = 6  # words that have one, the first: as many as there are colours


def report(
    pipe: Pipeline,
    picture: Picture,
    source: Pixels,
    *,
    weights: Sequence[float] = compare.WEIGHTS,
    samplers: Sequence[str] = compare.COMPARED,
    steps: Sequence[int] = compare.STEPS,
    tell: Told = lambda what, done, total: None,
) -> str:
    """Explain a picture: its path, its words, guidance, samplers, and the schedule with a picture on its way down.

    Args:
        source: the picture that is noised, uint8 (H, W, 3) of the request's size; usually the picture itself.
        tell: called as the work goes on.
    """
    request = picture.request.resolve(pipe.model)
    compare.check(pipe, request, samplers, steps)  # before minutes of drawing
    words = [word.text for word in path.words_of(pipe, request)]
    frames: list[path.Frame] = []
    equal = False
    for event in path.trajectory(pipe, request):
        if isinstance(event, Picture):
            equal = np.array_equal(event.pixels, picture.pixels)
        else:
            frames.append(event)
            tell("its path", len(frames), pipe.steps(request) + 1)
    swept = [] if pipe.model.distilled else _found(compare.guidance(pipe, request, weights), "guidance", tell)
    exact, *runs = _found(compare.samplers(pipe, request, samplers, steps), "samplers", tell)
    noised = list(path.forward(pipe, request, source)) if pipe.model.encode_picture is not None else []
    drawn = path.curve(pipe, request)
    assert isinstance(exact, compare.Solution)
    body = "".join(
        [
            _head(picture, request, equal),
            _path(frames),
            _words(frames, words, request),
            _guidance([g for g in swept if isinstance(g, compare.Guided)]),
            _samplers(exact, [r for r in runs if isinstance(r, compare.Run)]),
            _schedule(drawn, noised),
        ]
    )
    return _page(picture.request.prompt, body)


def _found(events: Iterator[compare.Progress | T], what: str, tell: Told) -> list[T]:
    found: list[T] = []
    for event in events:
        if isinstance(event, compare.Progress):
            tell(what, event.done, event.total)
        else:
            found.append(event)
    return found


# ── parts ──────────────────────────────────────────────────────────────────────────────────────────────


def _head(picture: Picture, request: Request, equal: bool) -> str:
    asked = {f.name: (getattr(request, f.name), f.default) for f in fields(request) if f.name != "prompt"}
    facts = {k: _said(v) for k, (v, default) in asked.items() if v != default}  # a 0 that was asked for among them
    facts |= {"model": picture.model, "model hash": picture.model_hash[:12]}
    rows = "".join(f"<dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    verdict = (
        "Drawn again for this report, and equal in every pixel."
        if equal
        else "Drawn again for this report, and <strong>not equal in every pixel</strong>: another machine or version, "
        "or the picture was made in company. All below is of the picture drawn again."
    )
    return (
        f'<header class="lead">{_image(picture.pixels, request.prompt, 384)}<div><p class="soft">Looked inside</p>'
        f'<h1>{escape(request.prompt)}</h1><dl>{rows}</dl><p class="soft">{verdict}</p></div></header>'
    )


def _said(value: Any) -> str:
    """A setting's value in words; a picture by its name and the beginning of its SHA-256."""
    if isinstance(value, tuple):
        return ", ".join(map(_said, value))
    return f"{value.name} ({value.sha256[:12]})".lstrip() if isinstance(value, PictureFile) else str(value)


def _path(frames: Sequence[path.Frame]) -> str:
    shots = "".join(
        f'<figure data-frame><div class="two">{_image(f.noisy, "given")}'
        f"{_image(f.noisy if f.predicted is None else f.predicted, 'seen')}</div>"
        f"<figcaption>{i}: σ {f.level.sigma:.3g}</figcaption></figure>"
        for i, f in enumerate(frames)
    )
    return (
        "<section><h2>Its path out of the noise</h2><p>At each level the network splits what it is given (left) into a "
        "picture (right, the predicted x0) and noise; the sampler mixes the two again with less noise.</p>"
        '<div class="scrub" hidden><label for="step">Step</label><input id="step" type="range" min="0" '
        f'max="{len(frames) - 1}" value="0"><output for="step"></output></div><div class="big" hidden></div>'
        f'<div class="strip">{shots}</div></section>'
    )


def _words(frames: Sequence[path.Frame], words: Sequence[str], request: Request) -> str:
    seen = [(i, f) for i, f in enumerate(frames) if f.attention is not None]
    if not seen or not words:
        return (
            "<section><h2>Where each word looked</h2><p>This network attends to no words: it is told them by other "
            "ways.</p></section>"
        )
    shown = min(SHOWN, len(seen))
    chosen = [seen[round(k * (len(seen) - 1) / max(1, shown - 1))] for k in range(shown)]
    head = "".join(f'<th scope="col">{i}: σ {f.level.sigma:.2g}</th>' for i, f in chosen)
    names = [*words, "start and end"]
    rows = ""
    for k, name in enumerate(names):
        cells = ""
        for _, f in chosen:
            assert f.attention is not None
            assert f.predicted is not None
            m = f.attention.maps[k]
            cells += (
                f"<td><figure>{_image(lit(f.predicted, m), name)}<figcaption>{m.mean():.1%}</figcaption></figure></td>"
            )
        rows += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    curves = [Series(w, [(i, _mean(f, k)) for i, f in seen]) for k, w in enumerate(words[:CURVES])]
    of = (
        " These are the words of the first prompt; those of the second are read beside them."
        if request.prompt_to
        else ""
    )
    whose = "each word" if len(words) <= CURVES else f"the first {CURVES} words"
    shares = [f.attention.share for _, f in seen if f.attention is not None]
    joint = (
        f" Cells gave words {np.mean(shares):.1%} of their attention, the rest to each other."
        if min(shares) < 0.999
        else ""
    )
    return (
        "<section><h2>Where each word looked</h2><p>The predicted picture, lit by the share of each cell's attention "
        "to words that went to this one: mean over layers and heads, each map to its own peak; the figure is the mean "
        f"over cells, and all figures of a step sum to 100 %.{joint}{of}</p>"
        f'<div class="scroll"><table><thead><tr><th scope="col">Word</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f"<p>The mean share of {whose} by step:</p>"
        f"{chart(f'Mean share of attention of {whose} by step', curves, 'step', 'share of attention')}</section>"
    )


def _mean(frame: path.Frame, k: int) -> float:
    return 0.0 if frame.attention is None else float(frame.attention.maps[k].mean())


def lit(pixels: Pixels, map: NDArray[np.float32]) -> Pixels:
    """A picture (H, W, 3) in the light of a map (h, w), whose peak is full light and whose zero leaves a sixth."""
    side = (pixels.shape[1], pixels.shape[0])
    grey = np.asarray(
        Image.fromarray((map / max(float(map.max()), 1e-12)).astype(np.float32)).resize(side, Image.Resampling.BILINEAR)
    )
    light = 0.16 + 0.84 * grey.clip(0, 1)
    return (pixels * light[..., None]).round().astype(np.uint8)


def _guidance(swept: Sequence[compare.Guided]) -> str:
    if not swept:
        return ""
    shots = "".join(
        f"<figure>{_image(g.pixels, f'guidance {g.guidance:g}')}<figcaption>w {g.guidance:g}</figcaption></figure>"
        for g in swept
    )
    lines = [
        Series("contrast", [(g.guidance, g.contrast / 127.5) for g in swept], dots=True),
        Series("burnt out", [(g.guidance, g.clipped) for g in swept], dots=True),
    ]
    return (
        "<section><h2>What guidance does</h2><p>The same noise under guidance scales from 1, the words alone, upwards. "
        "Contrast is the standard deviation of values; burnt out are those at 0 or 255.</p>"
        f'<div class="strip">{shots}</div>'
        f"{chart('Contrast and burnt-out values', lines, 'guidance w', 'share')}</section>"
    )


def _samplers(exact: compare.Solution, runs: Sequence[compare.Run]) -> str:
    names = list(dict.fromkeys(r.sampler for r in runs))
    steps = sorted({r.steps for r in runs})
    lines, rows = [], ""
    for name in names:
        own = sorted((r for r in runs if r.sampler == name), key=lambda r: r.steps)
        lines.append(Series(name, [(r.calls, r.distance) for r in own], dots=True, dashed=own[0].stochastic))
        order = compare.observed_order([r.steps for r in own], [r.distance for r in own], exact.uncertainty)
        falls = "fresh noise" if own[0].stochastic else "–" if order is None else f"{order:.1f}"
        cells = "".join(
            f"<td><figure>{_image(r.pixels, f'{name}, {r.steps} steps')}"
            f"<figcaption>{r.distance:.2g}</figcaption></figure></td>"
            for r in own
        )
        rows += f'<tr><th scope="row">{escape(name)}</th>{cells}<td>{falls}</td></tr>'
    head = "".join(f'<th scope="col">{k} steps</th>' for k in steps)
    return (
        "<section><h2>Samplers side by side</h2><p>The same noise, and the root mean square of x minus the solution to "
        f"which samplers without fresh noise converge: {exact.steps} steps of Heun's method, itself off by about "
        f"{exact.uncertainty:.1g}. The last column is the order at which the distance falls here.</p>"
        f"{chart('Distance to the solution', lines, 'calls of the network', 'distance', xlog=True, ylog=True)}"
        f'<div class="scroll"><table><thead><tr><th scope="col">Sampler</th>{head}<th scope="col">order</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _schedule(drawn: path.Curve, noised: Sequence[path.Noised]) -> str:
    lines = [
        Series("α, picture", [(p.t, p.alpha) for p in drawn.levels]),
        Series("σ, noise", [(p.t, p.sigma) for p in drawn.levels]),
        Series("", [(p.t, p.sigma) for p in drawn.visited], dots=True),
    ]
    shots = "".join(
        f'<figure><div class="two">{_image(n.noisy, "with noise")}{_image(n.predicted, "seen in it")}</div>'
        f"<figcaption>σ {n.level.sigma:.2g}, error {n.error:.2g}</figcaption></figure>"
        for n in noised
    )
    error = [Series("error", [(n.level.sigma, n.error) for n in noised], dots=True)]
    down = (
        "<h3>A picture on its way down</h3><p>x = α·x0 + σ·ε at each level that was visited (left), and what the "
        f'network sees in it (right).</p><div class="strip">{shots}</div>'
        f"{chart('Error of the predicted picture', error, 'σ', 'error of x0')}"
    )
    return (
        "<section><h2>The schedule</h2><p>How much picture and how much noise a level holds; dots are the levels that "
        f"were visited.</p>{chart('Signal and noise', lines, 'time t of the schedule', 'share')}"
        f"{down if noised else ''}</section>"
    )


# ── page ───────────────────────────────────────────────────────────────────────────────────────────────


def _image(pixels: Pixels, alt: str, side: int = SIDE) -> str:
    """A picture of at most a side, inside the page; one that is small enough keeps its very pixels."""
    h, w = pixels.shape[:2]
    if max(h, w) > side:
        scale = side / max(h, w)
        size = (max(1, round(w * scale)), max(1, round(h * scale)))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    crisp = ' class="crisp"' if max(h, w) <= 64 else ""
    return f'<img{crisp} src="{data_url(pixels)}" alt="{escape(alt)}">'


def _page(title: str, body: str) -> str:
    """The whole file; its policy allows its own style and script and nothing from elsewhere."""

    def sha(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    style, script = ((files("sfumato.inside") / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{sha(style)}'; script-src 'sha256-{sha(script)}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title[:80])}</title>'
        f"<style>{style}</style></head><body><main>{body}</main><script>{script}</script></body></html>"
    )
