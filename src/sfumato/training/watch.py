"""Evaluation while a run goes on: the averaged weights, as they would be shipped, against held-out pictures.

Nothing of it touches the run's own state or random numbers: a run ends in the same bytes with it or without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.data.pictures import is_wanted
from sfumato.data.report import Report as DataReport
from sfumato.errors import BadData, SfumatoError
from sfumato.evaluation.cache import Cache, default_folder
from sfumato.evaluation.measure import evaluate, prepare
from sfumato.evaluation.truth import ALL, SEEN, load_truth
from sfumato.pipeline.pipeline import load
from sfumato.pipeline.request import Request
from sfumato.training.recipe import Recipe

Export = Callable[[Path], None]  # writes the averaged weights as a model file
SETS = {"fd", "kid", "pr", "lpips", "clip", "fid"}  # figures for which a part of the training pictures will do


class _Interrupted(Exception):
    """A signal came while pictures were made."""


class Watch:
    """A yardstick, and what a model file measures by it.

    Args:
        recipe: whose data, with its held-out rows, and settings of evaluation are used.
        root: the recipe's folder.
        note: is told what was found.
    """

    def __init__(self, recipe: Recipe, root: Path, note: Callable[[str], None]):
        if recipe.task not in ("denoiser", "distill"):
            raise BadData(f"a denoiser's pictures can be measured, not what task: {recipe.task} makes")
        data, n = recipe.data, recipe.evaluate_n
        if data.captions not in ("plain", "template"):
            raise BadData(f"evaluate_every needs captions to draw; data.captions is {data.captions!r}")
        self.settings: Mapping[str, Any] = {
            "steps": recipe.evaluate_steps or None, "guidance": recipe.evaluate_guidance, "seed": recipe.seed,
        }  # fmt: skip
        Request("any", **self.settings).checked()
        width, height = recipe.model.defaults.width, recipe.model.defaults.height
        if width != height:
            raise BadData(f"only squares are compared; model.defaults draw {width}x{height}")
        where, exclude = ({k: v for k, v in of.items() if k != "split"} for of in (data.where, data.exclude))
        config = replace(data, where=where, exclude=exclude, weights={})

        def report(found: DataReport) -> None:
            note(f"evaluation: {found.summary()}")

        truth = load_truth(config, width, n, root, report, choosing=True)
        for split, rows in truth.drawn.items():
            if split not in (SEEN, ALL) and any(is_wanted(truth.rows[i], data) for i in rows):
                raise BadData(f"the run learns from split {split!r}, too: leave it out by data.where.split")
        if set(recipe.evaluate_metrics) <= SETS:
            truth = truth.lean(4 * n)
        self.yardstick = prepare(truth, recipe.evaluate_metrics, Cache(default_folder()))
        for metric, reason in self.yardstick.skipped.items():
            raise BadData(f"evaluate_metrics: {metric} cannot be had from these data: {reason}")

    def __call__(self, export: Export, folder: Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Return the figures of the weights that ``export`` writes, each with N, extractor, reference and interval.

        Returns None soon after ``stop`` says so.
        """

        def check(_: int) -> None:
            if stop():
                raise _Interrupted

        path = folder / ".evaluated.safetensors"
        try:
            export(path)
            report = evaluate(load(path), self.yardstick, "", check, keep=False, **self.settings)
        except _Interrupted:
            return None
        finally:
            path.unlink(missing_ok=True)
        figures = [
            {"metric": f.metric, "split": f.split, "value": f.value, "interval": list(f.interval), "n": f.n,
             "extractor": f.extractor, "reference": f.reference[:16], "real": f.real}
            for f in report.figures if not f.style
        ]  # fmt: skip
        return {"figures": figures, **report.settings, "data": report.data_hash[:16], "size": report.size}


def build_watch(recipe: Recipe, root: Path, note: Callable[[str], None]) -> Watch:
    """Prepare the evaluations that a recipe asks for; raises SfumatoError, naming the setting, where it cannot be."""
    try:
        return Watch(recipe, root, note)
    except SfumatoError as e:
        raise type(e)(f"evaluate_every: {e}") from None
