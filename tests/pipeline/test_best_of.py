"""best_of: of K pictures the one that its critic likes best, each told as the picture of its own seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families import load
from sfumato.families.clip import Critic, load_clip
from sfumato.families.model import Model
from sfumato.pipeline.lockstep import Lockstep
from sfumato.pipeline.picture import Picture, grid, read
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request

WORDS = "a red apple"


@pytest.fixture(scope="module")
def brightest(tiny: Model) -> Model:
    """The tiny model with a critic whose choice can be checked by eye."""
    return replace(tiny, critic=lambda pictures, prompt: pictures.float().mean(dim=(1, 2, 3)))


def test_of_each_k_seeds_the_best_is_kept_under_its_own_seed(brightest: Model) -> None:
    pipe = Pipeline(brightest)
    alone = [pipe.generate(WORDS, seed=10 + j)[0] for j in range(6)]
    light = [float(p.pixels.mean()) for p in alone]
    want = [max(range(3), key=lambda j: light[j]), max(range(3, 6), key=lambda j: light[j])]
    kept = pipe.generate(WORDS, seed=10, n=2, best_of=3)
    assert [p.request for p in kept] == [alone[j].request for j in want]
    assert all(np.array_equal(p.pixels, alone[j].pixels) for p, j in zip(kept, want, strict=True))


def test_of_variations_too(brightest: Model) -> None:
    pipe, how = Pipeline(brightest), {"seed": 3, "variation_strength": 0.5}
    alone = [pipe.generate(WORDS, variation_seed=j, **how)[0] for j in range(4)]
    (kept,) = pipe.generate(WORDS, variation_seed=0, best_of=4, **how)
    best = max(alone, key=lambda p: float(p.pixels.mean()))
    assert kept.request == best.request
    assert np.array_equal(kept.pixels, best.pixels)


def test_it_is_chosen_alike_in_lockstep(brightest: Model) -> None:
    request = Request(WORDS, seed=10, n=2, best_of=3).resolve(brightest)
    together = Lockstep(brightest)
    runs = {together.start(request.nth(i)): i for i in range(2)}
    made: dict[int, Picture] = {}
    while len(together):
        made |= {runs[run]: event for run, event in together.advance() if isinstance(event, Picture)}
    kept = Pipeline(brightest).generate(WORDS, seed=10, n=2, best_of=3)
    assert [made[i].request for i in range(2)] == [p.request for p in kept]


def test_a_grid_of_them_can_be_made_again(brightest: Model, tmp_path: Path) -> None:
    pipe, request = Pipeline(brightest), Request(WORDS, seed=7, n=3, best_of=2).resolve(brightest)
    made = [e for e in pipe.run(request) if isinstance(e, Picture)]
    stored = read(grid(made, request).save(tmp_path / "grid.png")).picture
    again = [e for e in pipe.run(stored.request) if isinstance(e, Picture)]
    assert stored.request == request
    assert np.array_equal(stored.pixels, grid(again, request).pixels)
    with pytest.raises(BadRequest, match="seed after seed"):
        grid(made[::-1], request)
    one = Request(WORDS, seed=7, best_of=3).resolve(brightest)
    [kept] = [e for e in pipe.run(one) if isinstance(e, Picture)]
    assert grid([kept], one) is kept, "which says its own seed, and can be explained"


def test_what_would_have_no_effect_is_refused(tiny: Model, brightest: Model) -> None:
    with pytest.raises(BadRequest, match="without a CLIP to choose by"):
        Pipeline(tiny).generate(WORDS, best_of=2)
    with pytest.raises(BadRequest, match="leave out prompt_to"):
        Pipeline(brightest).generate(WORDS, best_of=2, prompt_to="a blue house")
    with pytest.raises(BadRequest, match="best_of must be a whole number from 1 to 50"):
        Pipeline(brightest).generate(WORDS, best_of=51, n=2)


def test_words_that_the_choice_leaves_out_are_told(tiny: Model) -> None:
    reads_all = Pipeline(replace(tiny, critic=Critic(), truncated=lambda prompt: 0))
    request = Request(" ".join(["fox"] * 40), best_of=2)
    (told,) = reads_all.warnings(request)
    assert told == "best_of: its CLIP chooses without the prompt's last 9 tokens: they are too many"
    assert reads_all.warnings(replace(request, best_of=1)) == ()


def test_the_embedded_model_chooses_by_our_clip(tiny_file: Path) -> None:
    model, clip = load(), load_clip()
    assert model.critic is not None
    (kept,) = Pipeline(model).generate("red apple, noto style", seed=1, best_of=3, steps=4, upscale=1)
    alone = Pipeline(model).generate("red apple, noto style", seed=1, n=3, steps=4, upscale=1)
    pictures = torch.from_numpy(np.stack([p.pixels for p in alone])).permute(0, 3, 1, 2)
    scores = clip.embed_pictures(pictures) @ clip.embed_words(["red apple, noto style"])[0]
    assert kept.request.seed == 1 + int(scores.argmax())
    with pytest.raises(BadCheckpoint, match="no CLIP of this project's"):
        load(tiny_file, critic=tiny_file)
