"""Which captions are drawn, and what stands beside them."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shapes import drawings

from sfumato.data.config import DataConfig
from sfumato.errors import BadData, BadRequest
from sfumato.evaluation.truth import Truth, draw, load_truth


def test_splits(truth: Truth) -> None:
    assert {k: len(v) for k, v in truth.drawn.items()} == {"seen": 24, "test": 24}
    assert all(truth.rows[i]["split"] == "train" for i in truth.drawn["seen"])
    assert all(truth.rows[i]["split"] == "test" for i in truth.drawn["test"])
    assert truth.held_out == truth.drawn["test"]
    assert not set(truth.others) & set(truth.drawn["seen"])
    assert set(truth.others) < set(truth.train)


def test_the_same_captions_every_time(truth: Truth) -> None:
    images, rows = drawings()
    assert draw(images, rows, 24).drawn == truth.drawn
    assert draw(images, rows, 30).drawn != truth.drawn
    assert len(draw(images, rows).drawn["test"]) == len(draw(images, rows).drawn["seen"]) == 60


def test_siblings_of_what_is_drawn_are_left_to_no_judge() -> None:
    images, rows = drawings()
    truth = draw(images, [row | {"family": row["style"]} for row in rows], 24)
    drawn = {(truth.rows[i]["concept"], truth.rows[i]["family"]) for i in truth.drawn["seen"]}
    assert not any((truth.rows[i]["concept"], truth.rows[i]["family"]) in drawn for i in truth.others)


def test_real_pictures_of_the_same_mixture(truth: Truth) -> None:
    like = truth.like(truth.drawn["test"])
    assert like is not None
    assert len(set(like)) == 24
    assert set(like) <= set(truth.others)
    assert Counter(truth.styles(like)) == Counter(truth.styles(truth.drawn["test"]))
    assert truth.like(range(len(truth.rows))) is None


def test_data_without_splits_or_styles() -> None:
    images, rows = drawings(splits=False)
    truth = draw(images, [{"caption": row["caption"]} for row in rows])
    assert {k: len(v) for k, v in truth.drawn.items()} == {"all": 180}
    assert truth.held_out == truth.drawn["all"]
    assert truth.concepts([0]) == truth.names([0]) == ["red disc, plain style"]
    assert truth.styles([0]) == [""]


def test_too_few() -> None:
    images, rows = drawings()
    with pytest.raises(BadRequest, match="n must be at least 10"):
        load_truth(DataConfig(path="sample"), 16, n=3)
    few = [i for i, row in enumerate(rows) if row["split"] == "test"][5:]
    keep = [i for i in range(len(rows)) if i not in few]
    with pytest.raises(BadRequest, match="split 'test' has 5 pictures"):
        draw(images[keep], [rows[i] for i in keep])


def test_folder_and_parquet(tmp_path: Path) -> None:
    images, rows = drawings(copies=1)
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
        files.append(file.getvalue())
    pq.write_table(
        pa.Table.from_pylist([{"image": f, **r} for f, r in zip(files, rows, strict=True)]), tmp_path / "d.parquet"
    )
    truth = load_truth(DataConfig(path=str(tmp_path / "d.parquet"), where={"style": ["dark", "plain"]}), 16, n=10)
    assert len(truth.rows) == 60
    assert torch.equal(truth.images[1], images[2])
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, (f, row) in enumerate(zip(files, rows, strict=True)):
        (folder / f"{i:03}.png").write_bytes(f)
        (folder / f"{i:03}.txt").write_text(str(row["caption"]))
    plain = load_truth(DataConfig(path=str(folder)), 16)
    assert list(plain.drawn) == ["all"]
    assert len(plain.drawn["all"]) == 45
    with pytest.raises(BadData):
        load_truth(DataConfig(path=str(tmp_path / "none")), 16)
