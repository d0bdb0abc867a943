"""Aspect-ratio buckets: shapes, and an order of batches that is a pure function of (seed, place)."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faults import write_pictures
from sfumato.data.buckets import Buckets, join_small, nearest_shape, shapes_within
from sfumato.data.config import DataConfig
from sfumato.data.pictures import Pictures, load_pictures
from sfumato.errors import BadData


@given(multiple=st.integers(1, 16), sides=st.integers(1, 16), max_aspect=st.floats(1, 4))
@settings(max_examples=60, deadline=None)
def test_shapes_are_multiples_within_the_area_and_the_aspect(multiple: int, sides: int, max_aspect: float) -> None:
    size = multiple * sides
    shapes = shapes_within(size, multiple, max_aspect)
    assert (size, size) in shapes
    for h, w in shapes:
        assert h % multiple == w % multiple == 0
        assert h * w <= size * size
        assert (w, h) in shapes
        assert max(h, w) <= max_aspect * min(h, w)
        assert (max(h, w) + multiple) * min(h, w) > size * size  # no longer one would do
    assert len(set(shapes)) == len(shapes)


def test_the_nearest_shape_is_so_by_ratio() -> None:
    shapes = shapes_within(32, 8, 4.0)
    assert shapes == [(16, 64), (24, 40), (32, 32), (40, 24), (64, 16)]
    for (h, w), wanted in {(100, 100): 2, (100, 128): 2, (100, 150): 1, (100, 300): 0, (300, 100): 4}.items():
        assert nearest_shape(shapes, h, w) == wanted


def test_small_buckets_join_the_nearest_that_is_large_enough() -> None:
    shapes = shapes_within(32, 8, 4.0)
    members = [0] * 2 + [1] * 9 + [2] * 3 + [3] * 1 + [4] * 5
    assert Counter(join_small(members, shapes, 5)) == {1: 9 + 2 + 3, 4: 5 + 1}
    assert Counter(join_small(members, shapes, 100)) == {1: 20}
    assert join_small(members, shapes, 1) == members


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(lengths=lengths, batch=st.integers(1, 12), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_a_step_has_one_bucket_and_every_bucket_goes_through_its_own_order(
    lengths: list[int], batch: int, seed: int
) -> None:
    """None missing, none twice, in equal shares, whatever is asked first."""
    buckets = Buckets(tuple(lengths), batch)
    steps = 60
    found = [buckets.locate(seed, place) for place in range(steps * batch)]
    assert all(len({b for b, _ in found[i : i + batch]}) == 1 for i in range(0, len(found), batch))
    for b, n in enumerate(lengths):
        own = [place for bucket, place in found if bucket == b]
        assert own == list(range(len(own)))
        assert abs(len(own) / n - steps * batch / sum(lengths)) <= 2 + 2 * batch / n
    fresh = Buckets(tuple(lengths), batch)
    places = random.Random(0).sample(range(len(found)), 20)
    assert [fresh.locate(seed, p) for p in places] == [found[p] for p in places]
    assert fresh.locate(seed, 10**12)[0] in range(len(lengths))


def mixed(root: Path) -> Path:
    """Write forty pictures: square, wide, tall, and two very wide ones."""
    write_pictures(root / "square", 14, (40, 40))
    write_pictures(root / "wide", 13, (80, 50))
    write_pictures(root / "tall", 11, (50, 80))
    write_pictures(root / "panorama", 2, (90, 30))
    return root


def load(root: Path, **changes: Any) -> Pictures:
    config = DataConfig(path=str(root), **{"max_aspect": 3.0, "dropout": 0.0, **changes})
    return load_pictures(config, 32, Path(), multiple=8, step_size=6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed(tmp_path_factory.mktemp("mixed"))


def test_pictures_keep_their_shape_and_batches_have_one(root: Path) -> None:
    pictures = load(root)
    assert pictures.shapes is not None
    assert Counter(pictures.shapes) == {(32, 32): 14, (24, 40): 13 + 2, (40, 24): 11}  # panoramas are too few
    assert pictures.epoch_length == 40
    seen: Counter[int] = Counter()
    for step in range(20):
        batch = pictures.batch(3, step, 6)
        indices = [pictures.index(3, place) for place in range(6 * step, 6 * step + 6)]
        assert {pictures.shapes[i] for i in indices} == {tuple(batch.x0.shape[-2:])}
        seen.update(indices)
    assert max(seen.values()) - min(seen[i] for i in range(40)) <= 2  # after three epochs, cut at a step


@pytest.mark.parametrize("crop", ["center", "random", "pad"])
def test_lazy_pictures_and_slices_of_ranks_are_the_same(root: Path, crop: str) -> None:
    eager, lazy = load(root, crop=crop, flip=True), load(root, crop=crop, flip=True, lazy=True)
    for step in (7, 0, 12):
        whole = eager.batch(1, step, 6)
        assert torch.equal(whole.x0, lazy.batch(1, step, 6).x0)
        first = 6 * step
        parts = [lazy.take(1, range(first, first + 3)), lazy.take(1, range(first + 3, first + 6))]
        assert torch.equal(whole.x0, torch.cat([p.x0 for p in parts]))
        assert whole.captions == [c for p in parts for c in p.captions]


def test_what_is_cropped_is_the_middle_of_the_picture_itself(tmp_path: Path) -> None:
    """A ramp of 80×40 has 2:1; its bucket has 40×24, so a sixth of its width is lost, half at either end."""
    ramp = np.tile(np.linspace(0, 240, 80).astype(np.uint8)[None, :, None], (40, 1, 3))
    for i in range(6):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a ramp")
    x = load(tmp_path).images[0].float()
    assert x.shape == (3, 24, 40)
    assert x[0, 12, 0] == pytest.approx(240 / 12, abs=6)
    assert x[0, 12, -1] == pytest.approx(240 * 11 / 12, abs=6)


def test_the_order_of_buckets_is_pinned() -> None:
    """A run that is taken up years later draws the same pictures."""
    buckets = Buckets((10, 6, 3), 4)
    assert [buckets.locate(0, 4 * step) for step in range(10)] == [
        (0, 0), (0, 4), (1, 0), (0, 8), (1, 4), (1, 8), (0, 12), (2, 0), (0, 16), (0, 20),
    ]  # fmt: skip


def test_weights_hold_in_every_bucket(root: Path) -> None:
    pictures = load(root)
    pictures = Pictures(pictures.images, pictures.rows, np.where(np.arange(40) % 2, 1.0, 0.5), pictures.config,
                        None, pictures.shapes, 6)  # fmt: skip
    seen = Counter(pictures.index(0, place) for place in range(6 * 400))
    even, odd = (np.mean([seen[i] for i in range(start, 40, 2)]) for start in (0, 1))
    assert odd / even == pytest.approx(2.0, rel=0.03)


def test_an_aspect_that_cannot_be_is_refused() -> None:
    for aspect in (0.5, 9.0, float("nan")):
        with pytest.raises(BadData, match="max_aspect must lie in"):
            DataConfig(max_aspect=aspect)
