"""Looking inside published families: the same pictures, and maps of every word."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import make, make_flux, make_sd3

import sfumato
from sfumato.inside.path import Frame, trajectory, words_of
from sfumato.pipeline.picture import Picture

PROMPT = "an astronaut riding a horse"


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_maps_of_every_word_and_the_same_picture(family: str, tmp_path: Path) -> None:
    makers: dict[str, Any] = {
        "sd3": lambda: make_sd3(random.Random(1), with_t5=True),
        "flux": lambda: make_flux(random.Random(1), guided=True),
    }
    makers.get(family, lambda: make(family, 1))().save_pretrained(tmp_path / "model")
    pipe = sfumato.load(tmp_path / "model")
    unit = pipe.model.multiple
    request = sfumato.Request(PROMPT, seed=2, steps=2, width=8 * unit, height=6 * unit)
    (plain,) = [e for e in pipe.run(request) if isinstance(e, Picture)]
    *frames, _, picture = list(trajectory(pipe, request))
    assert isinstance(picture, Picture)
    assert np.array_equal(picture.pixels, plain.pixels)
    texts = [w.text for w in words_of(pipe, request)]
    assert {"astronaut", "horse"} <= set(texts) or family == "flux"  # its test tokenizer knows few pieces
    for frame in frames:
        assert isinstance(frame, Frame)
        assert frame.attention is not None
        assert len(frame.attention.maps) == len(texts) + 1
        np.testing.assert_allclose(frame.attention.maps.sum(0), 1, atol=1e-4)
        assert (frame.attention.maps[:-1].max(axis=(1, 2)) > 0).all(), "no word is without attention"
        h, w = frame.attention.maps.shape[1:]
        assert w / h == pytest.approx(8 / 6, rel=0.2)
        joint = family in ("sd3", "flux")
        assert 0 < frame.attention.share < 1 if joint else frame.attention.share == pytest.approx(1)
