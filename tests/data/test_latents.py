"""Latents take the place of pictures: the same order and words, made once, known again by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.data.config import DataConfig
from sfumato.data.latents import Latents, encoded
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


@pytest.mark.parametrize("setting", [{"flip": True}, {"crop": "random"}, {"lazy": True}])
def test_what_changes_at_every_visit_is_refused(pictures: Pictures, tmp_path: Path, setting: dict[str, object]) -> None:
    with pytest.raises(BadData, match="do not go with latents"):
        encoded(replace(pictures, config=replace(pictures.config, **setting)), mean_colour, "a", tmp_path)
