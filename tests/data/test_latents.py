"""Latents take the place of pictures: the same order and words, made once, known again by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from faults import write_pictures
from sfumato.data.config import DataConfig
from sfumato.data.latents import Latents, encoded, encoded_in_shapes
from sfumato.data.pictures import Pictures, load_pictures
from sfumato.errors import BadData


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return load_pictures(DataConfig(path="sample", captions="template"), 8, Path())


def mean_colour(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3), keepdim=True)


def test_same_order_and_words_as_the_pictures(pictures: Pictures, tmp_path: Path) -> None:
    latents = Latents(pictures, encoded(pictures, mean_colour, "mean", tmp_path))
    for places in (range(5), range(len(pictures) - 2, len(pictures) + 3)):
        theirs, ours = pictures.take(3, places), latents.take(3, places)
        assert ours.captions == theirs.captions
        torch.testing.assert_close(ours.x0, mean_colour(theirs.x0), atol=1e-3, rtol=1e-3)  # kept in fp16


def test_made_once_and_known_by_content(pictures: Pictures, tmp_path: Path) -> None:
    calls: list[int] = []

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return mean_colour(x)

    first = encoded(pictures, counting, "a", tmp_path)
    assert sum(calls) == len(pictures)
    assert torch.equal(encoded(pictures, counting, "a", tmp_path), first)
    assert sum(calls) == len(pictures)
    encoded(pictures, counting, "b", tmp_path)  # another encoder
    assert sum(calls) == 2 * len(pictures)
    changed = replace(pictures, weights=pictures.weights * 2, _orders={})  # other data
    encoded(changed, counting, "a", tmp_path)
    assert sum(calls) == 3 * len(pictures)


def test_pictures_of_many_shapes_are_encoded_in_their_own(tmp_path: Path) -> None:
    for name, n, size in (("square", 7, (40, 40)), ("wide", 5, (80, 50)), ("tall", 6, (50, 80))):
        write_pictures(tmp_path / "data" / name, n, size)
    config = DataConfig(path=str(tmp_path / "data"), max_aspect=2.0)
    pictures = load_pictures(config, 32, Path(), multiple=8, step_size=3)
    calls: list[int] = []

    def halved(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.nn.functional.avg_pool2d(x, 4)

    latents = Latents(pictures, encoded_in_shapes(pictures, halved, "halved", tmp_path, batch=4))
    assert sorted(calls) == [1, 2, 3, 4, 4, 4]  # groups of one shape
    shapes = set()
    for step in range(12):
        places = range(3 * step, 3 * step + 3)
        theirs, ours = pictures.take(1, places), latents.take(1, places)
        assert ours.captions == theirs.captions
        torch.testing.assert_close(ours.x0, torch.nn.functional.avg_pool2d(theirs.x0, 4), atol=1e-3, rtol=1e-3)
        shapes.add(tuple(ours.x0.shape[-2:]))
    assert shapes == {(8, 8), (6, 10), (10, 6)}
    again = Latents(pictures, encoded_in_shapes(pictures, halved, "halved", tmp_path))
    assert len(calls) == 6
    assert again.fingerprint() == latents.fingerprint()


@pytest.mark.parametrize("setting", [{"flip": True}, {"crop": "random"}, {"lazy": True}])
def test_what_changes_at_every_visit_is_refused(pictures: Pictures, tmp_path: Path, setting: dict[str, object]) -> None:
    with pytest.raises(BadData, match="do not go with latents"):
        encoded(replace(pictures, config=replace(pictures.config, **setting)), mean_colour, "a", tmp_path)
