"""Sample order, weights, crops and captions are pure functions of (seed, place); bad data are counted and named."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faults import spoil, write_pictures
from sfumato.data.captions import caption_problem, template_caption
from sfumato.data.config import SAMPLE, DataConfig
from sfumato.data.pictures import LazyImages, Pictures, load_pictures
from sfumato.data.report import Report
from sfumato.errors import BadData, NoResources

ROOT = Path()


def bare(weights: list[float], **settings: Any) -> Pictures:
    """Pictures of one pixel whose value is their index."""
    n = len(weights)
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 1, 1)
    rows = [{"caption": f"picture {i}"} for i in range(n)]
    return Pictures(images, rows, np.array(weights), DataConfig(**{"dropout": 0.0, **settings}))


def load(path: Path | str, size: int = 8, **settings: Any) -> Pictures:
    return load_pictures(DataConfig(path=str(path), **settings), size, ROOT)


# ── order ──────────────────────────────────────────────────────────────────────────────────────────────


@given(n=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = bare([1.0] * n).order(seed, epoch)
    assert sorted(order.tolist()) == list(range(n))


@given(
    weights=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0]), min_size=1, max_size=60),
    epoch=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_weights_set_multiplicities(weights: list[float], epoch: int) -> None:
    total = sum(weights)
    if total == 0:
        return
    pictures = bare(weights)
    counts = Counter(pictures.order(0, epoch).tolist())
    length = max(1, round(total))
    assert pictures.epoch_length == sum(counts.values()) == length
    for i, w in enumerate(weights):
        share = w * length / total
        assert np.floor(share - 1e-9) <= counts[i] <= np.ceil(share + 1e-9)


def test_weights_hold_in_the_long_run() -> None:
    weights = [0.5, 0.25, 2.0, 1.0, 0.25]
    pictures = bare(weights)
    counts = sum((np.bincount(pictures.order(3, e), minlength=5) for e in range(2000)), np.zeros(5))
    assert counts / 2000 == pytest.approx(weights, abs=0.05)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    pictures = bare([1.0] * 50)
    assert (pictures.order(0, 0) == pictures.order(0, 0)).all()
    assert (pictures.order(0, 0) != pictures.order(0, 1)).any()
    assert (pictures.order(0, 0) != pictures.order(1, 0)).any()


def test_the_order_is_pinned() -> None:
    """A run that is taken up years later draws the same pictures."""
    assert bare([1.0] * 10).order(0, 0).tolist() == [0, 7, 6, 1, 9, 3, 8, 4, 5, 2]
    assert bare([0.5] * 8 + [1.0] * 6).order(7, 3).tolist() == [8, 2, 13, 12, 11, 6, 4, 9, 0, 10]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_do_not_depend_on_their_size(crop: str, tmp_path: Path) -> None:
    pictures = load(write_pictures(tmp_path / "p", 7, (30, 20)), crop=crop, flip=True, dropout=0.3)
    whole = pictures.take(5, range(60))
    for size in (1, 3, 4, 20, 30):
        parts = [pictures.batch(5, step, size) for step in range(60 // size)]
        assert torch.equal(torch.cat([p.x0 for p in parts]), whole.x0)
        assert [c for p in parts for c in p.captions] == whole.captions


def test_ranks_take_slices_of_one_order(tmp_path: Path) -> None:
    pictures = load(write_pictures(tmp_path / "p", 7))
    whole = pictures.batch(0, 4, 6)
    ranks = [pictures.take(0, range(24, 30)[rank::2]) for rank in (0, 1)]
    assert torch.equal(whole.x0[0::2], ranks[0].x0)
    assert torch.equal(whole.x0[1::2], ranks[1].x0)
    assert whole.captions[1::2] == ranks[1].captions


def test_every_picture_once_in_an_epoch_of_uneven_batches() -> None:
    pictures = bare([1.0] * 10)
    drawn = [c for step in range(10) for c in pictures.batch(0, step, 3).captions]
    assert [sorted(drawn[i : i + 10]) for i in (0, 10, 20)] == [[f"picture {i}" for i in range(10)]] * 3


def test_values_lie_in_minus_one_to_one() -> None:
    x0 = Pictures(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4),
                  [{"caption": "x"}] * 2, np.ones(2), DataConfig()).batch(0, 0, 2).x0  # fmt: skip
    assert x0.dtype == torch.float32
    assert sorted(x0.amax((1, 2, 3)).tolist()) == [-1.0, 1.0]


def test_flips_only_if_asked(tmp_path: Path) -> None:
    root = tmp_path / "p"
    root.mkdir()
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 4, 8))
    image.save(root / "a.png")
    (root / "a.txt").write_text("half")
    for flip, sides in ((False, {1.0}), (True, {1.0, -1.0})):
        x0 = load(root, flip=flip).batch(0, 0, 40).x0
        assert set(x0[:, 0, 0, 0].tolist()) == sides


def test_random_crops_see_all_of_a_picture(tmp_path: Path) -> None:
    root = tmp_path / "p"
    root.mkdir()
    Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (8, 1))).save(root / "a.png")  # 24 × 8
    (root / "a.txt").write_text("ramp")
    pictures = load(root, crop="random")
    x0 = pictures.batch(0, 0, 200).x0
    assert x0.shape == (200, 3, 8, 8)
    starts = ((x0[:, 0, 0, 0] + 1) * 127.5 / 10).round().tolist()
    assert set(starts) == set(range(17))
    assert torch.equal(x0, pictures.batch(0, 0, 200).x0)
    assert ((pictures.at([0])[0, 0, 0] + 1) * 127.5 / 10).round().tolist() == list(range(8, 16))  # the middle


# ── captions ───────────────────────────────────────────────────────────────────────────────────────────

ROW: Mapping[str, Any] = {
    "name": "fox",
    "style_phrase": "noto style",
    "alt_names": ["red fox"],
    "tags": ["animal", "face"],
}


def test_template_shares() -> None:
    rng = random.Random(0)
    drawn = Counter(template_caption(ROW, 0.1, rng) for _ in range(20_000))
    assert drawn[""] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert drawn["noto style"] / 20_000 == pytest.approx(0.9 * 0.05, abs=0.01)
    assert sum(n for c, n in drawn.items() if "style" not in c and c) / 20_000 > 0.09
    assert all(any(w in c for w in ("fox", "animal", "face", "style")) for c in drawn if c)


def test_a_text_in_place_of_a_list_is_one_word() -> None:
    rng, row = random.Random(0), {**ROW, "alt_names": "vixen", "tags": 7}
    drawn = {template_caption(row, 0.0, rng) for _ in range(500)}
    assert any("vixen" in c for c in drawn)
    assert all(any(w in c for w in ("fox", "vixen", "7", "style")) for c in drawn)


def test_plain_field_and_none(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "p", 3)
    assert set(load(root, dropout=0.0).batch(0, 0, 30).captions) == {f"picture number {i}" for i in range(3)}
    assert set(load(root, captions="field:file_name", dropout=0.0).batch(0, 0, 30).captions) == {
        f"{i:03}.png" for i in range(3)
    }
    none = load(root, captions="none")
    assert set(none.batch(0, 0, 30).captions) == {""}
    assert {r["caption"] for r in none.rows} == {""}
    dropped = load(root, dropout=0.5).batch(0, 0, 2000).captions
    assert dropped.count("") == pytest.approx(1000, abs=100)


def test_variants_are_all_that_is_drawn() -> None:
    pictures = load(SAMPLE, captions="template", variants=3, dropout=0.25)
    seen: dict[int, set[str]] = {}
    for index, own in pictures.drawn(0, range(40 * len(pictures))):
        seen.setdefault(index, set()).add(pictures.caption(index, own))
    assert all(seen[i] == {"", *(pictures.variant(i, k) for k in range(3))} for i in range(len(pictures)))
    assert len({pictures.variant(i, k) for i in range(len(pictures)) for k in range(3)}) > 2 * len(pictures)
    captions = pictures.batch(0, 0, 2000).captions
    assert captions.count("") == pytest.approx(500, abs=80)


def test_one_of_several_captions_is_drawn(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()], "caption": [["one", "two"]]}), tmp_path / "p.parquet")
    assert set(load(tmp_path / "p.parquet", dropout=0.0).batch(0, 0, 40).captions) == {"one", "two"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"caption": "fine"}, None),
        ({"caption": ""}, "empty"),
        ({"caption": " \n"}, "empty"),
        ({"caption": None}, "no caption"),
        ({}, "no caption"),
        ({"caption": []}, "no caption"),
        ({"caption": ["fine", ""]}, "empty"),
        ({"caption": "x" * 1_000_000}, "1,000,000 characters"),
        ({"caption": "a\0b"}, "NUL"),
        ({"caption": "a\ud800b"}, "Unicode"),
        ({"caption": "fine", "tags": ["\udfff"]}, "tags"),
        ({"caption": "日本語 🍎 ünïcode"}, None),
    ],
)
def test_bad_captions_are_named(row: dict[str, Any], reason: str | None) -> None:
    found = caption_problem(row, "plain")
    assert found is None if reason is None else reason in str(found)


# ── choosing ───────────────────────────────────────────────────────────────────────────────────────────


def test_where_exclude_and_weights() -> None:
    everything = load(SAMPLE)
    noto = load(SAMPLE, where={"style": "noto"})
    assert len(everything) == 324
    assert {r["style"] for r in noto.rows} == {"noto"}
    assert len(load(SAMPLE, where={"style": ["noto", "blob"], "core": True})) == 2 * len(noto)
    assert len(load(SAMPLE, exclude={"style": ["noto", "unheard of"]})) == 324 - len(noto)
    half = load(SAMPLE, weights={"style": {"noto": 0.5}, "group": {"people-body": 0.5}})
    assert half.epoch_length == 324 - round(len(noto) / 2)
    assert noto.report is not None
    assert (noto.report.total, noto.report.left_out) == (len(noto), 324 - len(noto))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": {"stlye": "noto"}}, "'stlye', which is missing; did you mean 'style'"),
        ({"exclude": {"stlye": ["noto"]}}, "exclude names the column 'stlye'"),
        ({"weights": {"grp": {"a": 1.0}}}, "weights names the column 'grp'"),
        ({"where": {"style": "notto"}}, "no row has style='notto'; did you mean 'noto'"),
        ({"exclude": {"style": ["blob", "notto"]}}, "data.exclude: no row has style='notto'; did you mean 'noto'"),
        ({"weights": {"style": {"notto": 0.5}}}, "data.weights: no row has style='notto'; did you mean 'noto'"),
        ({"where": {"style": "noto"}, "exclude": {"style": ["noto"]}}, "no picture is left"),
        ({"captions": "field:titel"}, "needs a column 'titel'"),
        ({"weights": {"core": {"True": 0.0}}}, "leave nothing to draw"),
        ({"lazy": True}, "lazy needs a folder"),
        ({"captions": "templat"}, "did you mean 'template'"),
        ({"crop": "centre"}, "did you mean 'center'"),
        ({"dropout": 1.5}, "dropout must lie"),
        ({"variants": -1}, "variants must not be negative"),
        ({"background": "whit"}, "background is a colour"),
        ({"weights": {"style": {"noto": -1.0}}}, "at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadData, match=message) as caught:
        load(SAMPLE, **settings)
    assert "\n" not in str(caught.value)


def test_no_path() -> None:
    with pytest.raises(BadData, match="--data"):
        load("")


def test_relative_paths_start_at_the_root(tmp_path: Path) -> None:
    write_pictures(tmp_path / "p", 2)
    assert len(load_pictures(DataConfig(path="p"), 8, tmp_path)) == 2
    assert len(load_pictures(DataConfig(path="sample"), 8, tmp_path)) == 324


def test_template_needs_its_columns(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"needs a column 'name', and there are caption, file_name"):
        load(write_pictures(tmp_path / "p", 2), captions="template")


# ── faults ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures, every twentieth of them bad."""
    root = write_pictures(tmp_path_factory.mktemp("data") / "spoilt", 200)
    for i in range(0, 200, 20):
        spoil(root, i)
    return root


@pytest.mark.parametrize("lazy", [False, True])
def test_faults_at_five_percent_are_listed(spoilt: Path, lazy: bool) -> None:
    reports: list[Report] = []
    config = DataConfig(path=str(spoilt), dropout=0.0, lazy=lazy)
    pictures = load_pictures(config, 8, ROOT, on_report=reports.append)
    (report,) = reports
    assert (report.total, report.ok, len(report.bad)) == (200, 190, 10)
    assert len(pictures) == 190
    assert [b.name[:3] for b in report.bad] == [f"{i:03}" for i in range(0, 200, 20)]
    wanted = ["damaged", "HTML", "million pixels", "empty", "empty caption", "1,000,000 bytes", "NUL", "UTF-8",
              "is missing", "without a picture"]  # fmt: skip
    assert [w for b, w in zip(report.bad, wanted, strict=True) if w not in b.reason] == []
    listed = [json.loads(line) for line in report.to_jsonl().splitlines()]
    assert [e["file"] for e in listed] == [b.name for b in report.bad]
    assert report.summary(Path("run/bad.jsonl")) == "190 pictures, 10 bad (list in run/bad.jsonl)"
    drawn = pictures.take(0, range(190)).captions
    assert sorted(drawn) == sorted(f"picture number {i}" for i in range(200) if i % 20)


def test_lazy_pictures_are_the_same(spoilt: Path) -> None:
    eager, lazy = load(spoilt), load(spoilt, lazy=True)
    assert isinstance(lazy.images, LazyImages)
    assert torch.equal(eager.batch(1, 2, 50).x0, lazy.batch(1, 2, 50).x0)
    assert lazy.fingerprint() == load(spoilt, lazy=True).fingerprint() != eager.fingerprint()  # columns alone


def test_a_lazy_picture_that_goes_bad_is_named(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "p", 3)
    pictures = load(root, lazy=True)
    (root / "001.png").write_bytes(b"")
    with pytest.raises(BadData, match=r"001\.png was whole when the run began"):
        pictures.batch(0, 0, 3)


def test_too_many_bad_ones_are_refused_unless_allowed(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "p", 10)
    for i in range(3):
        (root / f"{i:03}.png").write_bytes(b"<html>")
    reports: list[Report] = []
    with pytest.raises(BadData, match=r"3 of 10 pictures are bad, such as 000\.png: .*HTML.*bad_limit=0\.31"):
        load_pictures(DataConfig(path=str(root)), 8, ROOT, on_report=reports.append)
    assert len(reports[0].bad) == 3
    assert len(load(root, bad_limit=0.31)) == 7


def test_all_bad_is_bad_data(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "p", 3)
    for path in root.glob("*.txt"):
        path.unlink()
    with pytest.raises(BadData, match=r"all 3 pictures are bad, such as .*no caption") as caught:
        load(root, bad_limit=1.0)
    assert caught.value.exit_code == 4
    assert len(load(root, captions="none")) == 3


def test_bad_rows_of_a_chosen_part_are_counted(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": [b"", b"x"] * 3, "caption": ["a"] * 6, "part": ["p", "q"] * 3}), tmp_path / "p.parquet"
    )
    reports: list[Report] = []
    config = DataConfig(path=str(tmp_path / "p.parquet"), where={"part": "p"})
    with pytest.raises(BadData, match="all 3"):
        load_pictures(config, 8, ROOT, on_report=reports.append)
    assert (reports[0].total, reports[0].left_out, len(reports[0].bad)) == (3, 3, 3)


def test_more_than_memory_is_refused_before_reading(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "p", 3)
    with pytest.raises(NoResources, match=r"3 pictures at 64×64 take 0\.0 GB .*data\.lazy=true"):
        load(root, 64, memory=1e-5)
    assert load(root, 64, memory=1e-5, lazy=True).batch(0, 0, 2).x0.shape == (2, 3, 64, 64)


def test_the_fingerprint_tells_changed_data(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "p", 3)
    before = load(root).fingerprint()
    assert load(root).fingerprint() == before
    (root / "001.txt").write_text("other words")
    assert load(root).fingerprint() != before


def test_grey_pictures_have_one_channel(tmp_path: Path) -> None:
    pictures = load_pictures(DataConfig(path=str(write_pictures(tmp_path / "p", 3))), 8, ROOT, channels=1)
    assert pictures.batch(0, 0, 2).x0.shape == (2, 1, 8, 8)
