"""The figures of a set of pictures against real ones.

    truth = load_truth(config, size)                     real pictures, captions drawn
    yardstick = prepare(truth, metrics, cache)           all that is known before a model is: references, judge
    figures = yardstick.measure(pictures by split)       a model's figures, each beside the real pictures'

A training run prepares one yardstick of few captions, and evaluates its averaged weights with ``keep=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.errors import BadRequest, nearest
from sfumato.evaluation import extractors
from sfumato.evaluation.bootstrap import Array, Interval, generator, mean_interval, normal_interval
from sfumato.evaluation.cache import Cache, content_hash
from sfumato.evaluation.distances import (
    frechet_deviation,
    frechet_distance,
    kid,
    moments,
    precision_recall,
    squared_distances,
)  # fmt: skip
from sfumato.evaluation.extractors import MIDDLE, Extractor, lpips_distances
from sfumato.evaluation.generate import base_request, fit_size, generate, made_of
from sfumato.evaluation.judge import Judge, embed_names, recall_at, retrieval_ranks, train_judge
from sfumato.evaluation.report import Figure, Report
from sfumato.evaluation.truth import ALL, SEEN, Truth
from sfumato.families.clip import CLIP, load_clip
from sfumato.pipeline.pipeline import Pipeline

METRICS = ("fd", "kid", "pr", "lpips", "judge", "clip", "nearest", "fid")
DEFAULT = METRICS[:-1]
OF_SETS = ("fd", "kid", "pr", "fid")
TOO_NEAR = 0.05  # of held-out real pictures are nearer to a training picture than this quantile
THUMBNAIL = 16  # pixels: where near-copies are still near
Made = Mapping[str, Tensor]  # split → pictures uint8 (N, 3, S, S), in the order of the captions drawn


@dataclass(frozen=True, eq=False)
class Trained:
    """A judge, the names it chooses from, and which of them each row of the truth shows."""

    judge: Judge
    words: Tensor
    labels: Sequence[int]

    def ranks(self, features: NDArray[np.float32], rows: Sequence[int]) -> NDArray[np.int64]:
        """Return the rank of the right name for pictures' features (N, D); 0 is the first."""
        return retrieval_ranks(self.judge(torch.from_numpy(features), self.words), [self.labels[i] for i in rows])


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Everything that is known before a model is; ``skipped`` says which metrics these data cannot give, and why."""

    truth: Truth
    metrics: tuple[str, ...]
    cache: Cache
    lite0: Extractor | None
    alex: Extractor | None
    inception: Extractor | None
    judge: Trained | None
    clip: CLIP | None
    skipped: Mapping[str, str]

    def measure(self, made: Made | None, *, keep: bool = True) -> list[Figure]:
        """Return the figures of a model's pictures, each beside that of real ones.

        Args:
            made: split → pictures for ``truth.drawn``'s captions; None measures real pictures alone.
            keep: whether features of the model's pictures go into the cache.
        """
        if made is not None:
            for split, rows in self.truth.drawn.items():
                if split not in made or made[split].shape != (len(rows), *self.truth.images.shape[1:]):
                    raise BadRequest(f"split {split!r} needs {len(rows)} pictures like the real ones")
        cache = self.cache if keep else Cache(None)
        return [
            f for metric in self.metrics if metric not in self.skipped for f in _MEASURES[metric](self, made, cache)
        ]

    def lacking(self) -> dict[str, str]:
        """Which metrics real pictures alone cannot give, beside those skipped, and why: too few are not drawn."""
        n, lacking = len(self.truth.others), dict[str, str]()
        few = [f"{split} {len(rows)}" for split, rows in self.truth.drawn.items() if self.truth.like(rows) is None]
        if few:
            drawn = ", ".join(few)
            reason = f"{n} training pictures are neither drawn nor akin to those drawn ({drawn}): take a smaller --n"
            lacking |= {metric: reason for metric in self.metrics if metric in OF_SETS}
        if "lpips" in self.metrics and not any(_partners(self.truth, rows) for rows in self.truth.drawn.values()):
            lacking["lpips"] = "no picture drawn has another of its thing or of its style"
        return lacking

    def features(self, extractor: Extractor, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the features of real pictures (N, D)."""
        return extractor(self.truth.images, self.cache)[list(rows)]  # all at once: one entry in the cache

    def nearest(self, split: str, images: Tensor) -> NDArray[np.int64]:
        """Return the row of the training picture that lies nearest to each picture by lite0's features, (N,)."""
        assert self.lite0 is not None
        rows = self.truth.drawn[split]
        found = _squared_cosine(self.lite0(images, self.cache), self.features(self.lite0, self.truth.train))
        assert len(found) == len(rows)
        return np.asarray(self.truth.train)[found.argmin(1)]


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of metrics in their order, once each; raises BadRequest for one that is unknown."""
    for name in names:
        if name not in METRICS:
            raise BadRequest(f"unknown metric {name!r}{nearest(name, list(METRICS))}; there are {', '.join(METRICS)}")
    return tuple(m for m in METRICS if m in names)


def prepare(truth: Truth, metrics: Sequence[str], cache: Cache, inception: Path | None = None) -> Yardstick:
    """Load what the metrics need, and train the judge; all of it comes from the cache the next time.

    Raises NoResources, with pip's command, if an extractor is not installed.
    """
    metrics = check_metrics(metrics)
    wanted = set(metrics)
    lite0 = extractors.lite0() if wanted & {"fd", "kid", "pr", "judge", "nearest"} else None
    alex = extractors.alex() if wanted & {"lpips", "judge"} else None
    theirs = extractors.inception(inception) if "fid" in wanted else None
    clip = load_clip() if "clip" in wanted else None
    skipped: dict[str, str] = {}
    judge = None
    if "judge" in wanted:
        judge = _prepare_judge(truth, lite0, alex, cache, skipped)
    return Yardstick(truth, metrics, cache, lite0, alex, theirs, judge, clip, skipped)


def _prepare_judge(
    truth: Truth, lite0: Extractor | None, alex: Extractor | None, cache: Cache, skipped: dict[str, str]
) -> Trained | None:
    assert lite0 is not None
    assert alex is not None
    everything = range(len(truth.rows))
    concepts = truth.concepts(everything)
    known, words_of = sorted(set(concepts)), dict(zip(concepts, truth.names(everything), strict=True))
    places = {c: i for i, c in enumerate(known)}
    labels = [places[c] for c in concepts]
    learned = {concepts[i] for i in truth.others}
    drawn = [i for split, rows in truth.drawn.items() if split in (SEEN, ALL) for i in rows]
    familiar = np.mean([concepts[i] in learned for i in drawn])
    if len(truth.others) < 100 or len(learned) < 2:
        skipped["judge"] = f"{len(truth.others)} training pictures beside those drawn are too few to train it on"
        return None
    if familiar < 0.5:
        skipped["judge"] = f"only {familiar:.0%} of the things drawn are shown by any other picture"
        return None
    words = embed_names([words_of[c] for c in known], cache)
    features = np.concatenate([e(truth.images, cache)[list(truth.others)] for e in (lite0, alex)], 1)
    return Trained(train_judge(features, [labels[i] for i in truth.others], words, cache), words, labels)


# ── distances between sets ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Set:
    """Features (N, D) of pictures, and what each of them shows."""

    features: Array
    concepts: Sequence[str]


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two sets to compare: a model's (None if there is no model) and the reference, and a real third."""

    split: str
    made: _Set | None
    reference: _Set
    real: _Set | None
    hash: str


_Measured = tuple[float, Interval, dict[str, float]]


def _pairs(y: Yardstick, made: Made | None, cache: Cache, extractor: Extractor) -> Iterator[_Pair]:
    first = MIDDLE if extractor.name == "lite0" else 0
    everything = extractor(y.truth.images, y.cache)[:, first:].astype(np.float64)

    def of(rows: Sequence[int]) -> _Set:
        return _Set(everything[list(rows)], y.truth.concepts(rows))

    for split, rows in y.truth.drawn.items():
        real, reference, drawn = y.truth.like(rows), of(rows), None
        if made is not None:
            drawn = _Set(extractor(made[split], cache)[:, first:].astype(np.float64), reference.concepts)
        hash = content_hash(y.truth.images[list(rows)])
        yield _Pair(split, drawn, reference, None if real is None else of(real), hash)


def _both(
    pair: _Pair, measure: Callable[[_Set], _Measured]
) -> tuple[float, Interval, dict[str, float], float | None, Interval | None] | None:
    """A figure of the model's set and of the real one; without a model the real one's stands for itself."""
    real = None if pair.real is None else measure(pair.real)
    if pair.made is None:
        return None if real is None else (*real, real[0], real[1])
    value, interval, detail = measure(pair.made)
    return (value, interval, detail, real[0], real[1]) if real else (value, interval, detail, None, None)


def _set_figures(
    y: Yardstick, made: Made | None, cache: Cache, extractor: Extractor | None, metric: str,
    measure: Callable[[_Set, _Set], _Measured],
) -> Iterator[Figure]:  # fmt: skip
    assert extractor is not None
    for pair in _pairs(y, made, cache, extractor):
        found = _both(pair, lambda x, of=pair: measure(x, of.reference))
        if found is not None:
            value, interval, detail, real, real_interval = found
            name = f"{extractor.name} at {extractors.SIZE} px" if extractor.name == "lite0" else extractor.name
            yield Figure(
                metric, pair.split, "", value, interval,
                n=len(pair.reference.concepts), extractor=name, reference=pair.hash,
                real=real, real_interval=real_interval, detail=detail,
            )  # fmt: skip


def _fd(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    return _set_figures(y, made, cache, y.lite0, "FD-lite0", _frechet)


def _fid(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    return _set_figures(y, made, cache, y.inception, "FID", _frechet)


def _frechet(x: _Set, reference: _Set) -> _Measured:
    return frechet(x.features, reference.features)


def frechet(x: Array, reference: Array) -> _Measured:
    """Fréchet distance of features x (N, D) from a reference's, its interval, and nothing beside."""
    to = moments(reference)
    value = frechet_distance(moments(x), to)
    low, high = normal_interval(value, frechet_deviation(x, to))
    return value, Interval(max(0.0, low), high), {}


def _kid(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    def measure(x: _Set, reference: _Set) -> _Measured:
        k = kid(x.features, reference.features)
        subsets = {f"subsets of {k.subset_size}": k.subset_mean, "±": k.subset_deviation}
        return k.value, normal_interval(k.value, k.error), subsets

    return _set_figures(y, made, cache, y.lite0, "KID", measure)


def _pr(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    for which, metric in enumerate(("precision", "recall")):

        def measure(x: _Set, reference: _Set, which: int = which) -> _Measured:
            inside = precision_recall(x.features, reference.features)[which]
            return float(inside.mean()), mean_interval(inside, (x, reference)[which].concepts), {}

        yield from _set_figures(y, made, cache, y.lite0, metric, measure)


# ── picture by picture ─────────────────────────────────────────────────────────────────────────────────


def _parts(y: Yardstick, split: str) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """The places of a split's pictures, all together and style by style."""
    styles = np.array(y.truth.styles(y.truth.drawn[split]))
    yield "", np.arange(len(styles))
    if len(set(styles)) > 1:
        for style in sorted(set(styles)):
            yield str(style), np.flatnonzero(styles == style)


def _mean_figures(
    y: Yardstick, split: str, metric: str, extractor: str, reference: str, values: Array, real: Array | None,
    details: Mapping[str, Array],
) -> Iterator[Figure]:  # fmt: skip
    """The mean of one number per picture, whole and by style; pictures of one concept are drawn together."""
    concepts = np.array(y.truth.concepts(y.truth.drawn[split]))
    for style, places in _parts(y, split):
        groups = list(concepts[places])
        value, interval = float(values[places].mean()), mean_interval(values[places], groups)
        ceiling = (None, None) if real is None else (float(real[places].mean()), mean_interval(real[places], groups))
        beside = {k: float(np.nanmean(v[places])) for k, v in details.items() if not np.isnan(v[places]).all()}
        yield Figure(metric, split, style, value, interval, len(places), extractor, reference, *ceiling, beside)


def _judge(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    assert y.judge is not None
    assert y.lite0 is not None
    assert y.alex is not None
    sources = (y.lite0, y.alex)
    reference = content_hash(y.truth.images[list(y.truth.others)])  # what the judge has learned from
    for split, rows in y.truth.drawn.items():
        real = y.judge.ranks(np.concatenate([y.features(e, rows) for e in sources], 1), rows)
        found = (
            real if made is None else y.judge.ranks(np.concatenate([e(made[split], cache) for e in sources], 1), rows)
        )
        for k in (1, 5):
            yield from _mean_figures(
                y,
                split,
                f"R@{k}",
                f"judge, {len(y.judge.words)} names",
                reference,
                recall_at(found, k),
                recall_at(real, k),
                {},
            )


def _clip(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    """CLIP score beside that with another row's caption; how often the own caption is the nearest of its split's."""
    assert y.clip is not None
    extractor = extractors.clip(y.clip)
    name = f"our own CLIP {y.clip.hash[:8]} at {y.clip.towers.config.size} px"
    for split, rows in y.truth.drawn.items():
        captions = y.truth.captions(rows)
        different = list(dict.fromkeys(captions))  # equal captions are one
        place = {caption: i for i, caption in enumerate(different)}
        own = np.array([place[caption] for caption in captions])
        words = y.clip.embed_words(different).numpy().astype(np.float64)  # (C, D)
        real = y.features(extractor, rows) @ words.T  # (N, C)
        found = real if made is None else extractor(made[split], cache) @ words.T

        def score(near: Array, of: NDArray[np.int64] = own) -> Array:
            return 100 * near[np.arange(len(of)), of].clip(0)  # Hessel et al., 2104.08718, eq. 1

        details = {"another's caption": score(found, np.roll(own, len(own) // 2))}
        reference = content_hash(y.truth.images[list(rows)])
        yield from _mean_figures(y, split, "CLIP score", name, reference, score(found), score(real), details)
        against, reference = f"{name}, {len(different)} captions", content_hash(different)
        ranks = [retrieval_ranks(torch.from_numpy(near), own.tolist()) for near in (found, real)]
        for k in (1, 5):
            hits, ceiling = (recall_at(r, k) for r in ranks)
            yield from _mean_figures(y, split, f"caption R@{k}", against, reference, hits, ceiling, {})


def _lpips(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    """LPIPS to the real picture of the caption, beside two other real pictures': other style, and other thing."""
    truth = y.truth
    for split, rows in truth.drawn.items():
        own = truth.images[list(rows)]
        details = {
            name: _masked_lpips(own, truth.images[[max(i, 0) for i in other]], [i >= 0 for i in other], y.cache)
            for name, other in _partners(truth, rows).items()
        }
        extractor, reference = f"LPIPS-alex at {max(64, own.shape[-1])} px", content_hash(own)
        if made is not None:
            values = lpips_distances(made[split], own, cache)
            yield from _mean_figures(y, split, "LPIPS", extractor, reference, values, None, details)
        else:
            concepts = np.array(truth.concepts(rows))
            for name, values in details.items():
                known = ~np.isnan(values)  # of those that have such a partner
                value, interval = float(values[known].mean()), mean_interval(values[known], list(concepts[known]))
                n = int(known.sum())
                yield Figure(
                    f"LPIPS, {name}", split, "", value, interval, n, extractor, reference, value, interval
                )  # fmt: skip


def _masked_lpips(x: Tensor, other: Tensor, valid: Sequence[bool], cache: Cache) -> Array:
    found = lpips_distances(x, other, cache).copy()
    found[~np.array(valid)] = np.nan
    return found


def _partners(truth: Truth, rows: Sequence[int]) -> dict[str, list[int]]:
    """For each row a real picture of its concept in another style, and one of another concept in its style; or −1."""
    everything = range(len(truth.rows))
    concepts, styles, rng = truth.concepts(everything), truth.styles(everything), generator(2)
    by_concept: dict[str, list[int]] = {}
    by_style: dict[str, list[int]] = {}
    for i in everything:
        by_concept.setdefault(concepts[i], []).append(i)
        by_style.setdefault(styles[i], []).append(i)
    drawings, things = [], []
    for i in rows:
        same = [j for j in by_concept[concepts[i]] if styles[j] != styles[i] or (not styles[i] and j != i)]
        drawings.append(int(rng.choice(same)) if same else -1)
        other = [int(j) for j in rng.choice(by_style[styles[i]], 8) if concepts[j] != concepts[i]]
        things.append(other[0] if other else -1)
    found = {"another drawing of it": drawings, "another thing": things}
    return {k: v for k, v in found.items() if any(i >= 0 for i in v)}


def _nearest(y: Yardstick, made: Made | None, cache: Cache) -> Iterator[Figure]:
    """The share of pictures nearer to a training picture than 95 % of real ones that are not among them are."""
    assert y.lite0 is not None
    truth, train = y.truth, list(y.truth.train)
    reference = content_hash(truth.images[train])
    held_out = truth.held_out
    lite0 = y.lite0
    for name, describe, between in (
        (f"lite0 at {extractors.SIZE} px", lambda p, c: lite0(p, c), _squared_cosine),
        (f"pixels at {THUMBNAIL} px", lambda p, _: _thumbnails(p), squared_distances),
    ):
        everything = describe(truth.images, y.cache)
        of_train = everything[train]

        def apart(x: NDArray[Any], rows: Sequence[int], of: Any = of_train, between: Any = between) -> Array:
            squared = between(x, of)
            squared[np.equal.outer(np.asarray(rows), train)] = np.inf  # a picture is not its own neighbour
            return np.sqrt(squared.min(1))

        usual = apart(everything[list(held_out)], held_out)
        bound = np.quantile(usual, TOO_NEAR)
        for split, rows in truth.drawn.items():
            real = apart(everything[list(rows)], rows)
            # A model's picture may well be a copy of the very picture whose caption it was given.
            found = real if made is None else apart(describe(made[split], cache), [-1] * len(rows))
            details = {"distance": found, "real pictures' distance": real}
            near = ((found < bound).astype(np.float64), (real < bound).astype(np.float64))
            for f in _mean_figures(y, split, "too near", name, reference, *near, details):
                if not f.style:
                    yield f


def _squared_cosine(x: NDArray[Any], y: NDArray[Any]) -> Array:
    """Squared distance of unit vectors along x (N, D) and y (M, D)."""
    x, y = (v[:, MIDDLE:].astype(np.float64) for v in (x, y))
    return squared_distances(x / np.linalg.norm(x, axis=1, keepdims=True), y / np.linalg.norm(y, axis=1, keepdims=True))


def _thumbnails(images: Tensor) -> Array:
    """Root mean squares between these are distances in units of the whole range, (N, 3·16·16)."""
    parts = [extractors.resize(part, THUMBNAIL).flatten(1) / 2 for part in images.split(1024)]
    return torch.cat(parts).double().numpy() / np.sqrt(3 * THUMBNAIL**2)


_MEASURES: Mapping[str, Callable[[Yardstick, Made | None, Cache], Iterator[Figure]]] = {
    "fd": _fd, "kid": _kid, "pr": _pr, "lpips": _lpips, "judge": _judge, "clip": _clip, "nearest": _nearest,
    "fid": _fid,
}  # fmt: skip


# ── models ─────────────────────────────────────────────────────────────────────────────────────────────


def make_pictures(
    pipe: Pipeline, truth: Truth, cache: Cache, on_pictures: Callable[[int], None] = lambda _: None, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a model's pictures for all captions drawn, by split, and the settings that made them.

    Settings are those of ``base_request``: seed, steps, sampler, guidance, best_of.
    """
    request = base_request(pipe, **settings)
    rows = [i for of in truth.drawn.values() for i in of]
    images = fit_size(generate(pipe, request, truth.captions(rows), cache, on_pictures), truth.images.shape[-1])
    parts = images.split([len(of) for of in truth.drawn.values()])
    used = {
        k: v
        for k, v in request.to_dict().items()
        if k in ("seed", "sampler", "spacing", "steps", "guidance", "best_of")
    }
    used["made at"] = f"{request.width}x{request.height}"
    used |= made_of(pipe, request)
    return dict(zip(truth.drawn, parts, strict=True)), used


def evaluate(
    pipe: Pipeline | None,
    yardstick: Yardstick,
    data: str,
    on_pictures: Callable[[int], None] = lambda _: None,
    *,
    keep: bool = True,
    **settings: Any,
) -> Report:
    """Return a report on a model, or on real pictures if it is None.

    Args:
        pipe: what makes the pictures.
        yardstick: from ``prepare``.
        data: the data's name, for the report.
        on_pictures: is told how many more pictures there are; it may raise to end it all.
        keep: whether pictures and their features go into the cache.
        settings: those of ``base_request``: seed, steps, sampler, guidance, best_of.
    """
    if pipe is None:
        of_them = report("real pictures", "", yardstick, data, {}, yardstick.measure(None, keep=keep))
        return replace(of_them, skipped={**yardstick.skipped, **yardstick.lacking()})
    cache = yardstick.cache if keep else Cache(None)
    made, used = make_pictures(pipe, yardstick.truth, cache, on_pictures, **settings)
    return report(pipe.model.name, pipe.model.hash, yardstick, data, used, yardstick.measure(made, keep=keep))


def report(
    name: str, hash: str, yardstick: Yardstick, data: str, settings: Mapping[str, Any], figures: Sequence[Figure]
) -> Report:
    """Return figures with all that decided them: who made the pictures, from which data, with what."""
    made_with = {"sfumato": version("sfumato"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    truth = yardstick.truth
    return Report(name, hash, data, truth.hash, truth.images.shape[-1], settings, figures, yardstick.skipped, made_with)
