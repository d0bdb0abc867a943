"""The request: one frozen schema, strict both ways, every bad value refused in one clear line."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest

from sfumato.errors import BadRequest
from sfumato.families.model import Model
from sfumato.pipeline.request import MAX_SEED, Request

FIELDS = {
    "prompt": "str",
    "negative": "str",
    "seed": "int | None",
    "n": "int",
    "steps": "int | None",
    "sampler": "str | None",
    "spacing": "str | None",
    "guidance": "float | None",
    "guidance_rescale": "float",
    "guidance_interval": "tuple[float, float] | None",
    "eta": "float | None",
    "width": "int | None",
    "height": "int | None",
}


def test_the_fields_are_frozen() -> None:
    """PNGs, servers and scripts hold these names: add with a default, never rename or remove."""
    assert {f.name: f.type for f in fields(Request)} == FIELDS
    with pytest.raises(FrozenInstanceError):
        Request("a").n = 2  # type: ignore[misc]


def test_every_field_describes_itself() -> None:
    for f in fields(Request):
        assert f.metadata["help"]
        assert f.metadata["metavar"]


def test_resolving_fills_in_the_model_s_defaults_and_a_seed(tiny: Model) -> None:
    r = Request("a red apple").resolve(tiny)
    assert (r.steps, r.sampler, r.spacing, r.guidance, r.width, r.height) == (4, "dpmpp-2m", "trailing", 2.0, 16, 16)
    assert r.seed is not None
    assert 0 <= r.seed < 2**32
    assert r.resolve(tiny) == r
    assert Request("a red apple").resolve(tiny).seed != r.seed


def test_names_of_other_tools_are_translated(tiny: Model) -> None:
    assert Request("a", sampler="DPM++ 2M").resolve(tiny).sampler == "dpmpp-2m"
    assert Request("a", sampler="Euler a").resolve(tiny).sampler == "euler-ancestral"
    assert Request("a", spacing="sgm_uniform").resolve(tiny).spacing == "trailing"


def test_numbers_get_their_own_types(tiny: Model) -> None:
    r = Request("a", seed=np.int64(3), steps=np.int32(2), guidance=3).resolve(tiny)  # type: ignore[arg-type]
    assert (type(r.seed), type(r.steps), type(r.guidance)) == (int, int, float)
    json.dumps(r.to_dict())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n\t"}, "prompt is empty"),
    ({"prompt": None}, "prompt must be text"),
    ({"prompt": 7}, "prompt must be text, not 7"),
    ({"prompt": ["a"]}, "prompt must be text"),
    ({"prompt": "a\0b"}, "prompt holds a character that is no text"),
    ({"prompt": "a\x1b[2Jb"}, "prompt holds a character that is no text"),
    ({"prompt": "\ud800"}, "prompt holds a character that is no text"),
    ({"prompt": "a" * 10_001}, "prompt has 10001 characters"),
    ({"negative": None}, "negative must be text"),
    ({"seed": -1}, "seed must be a whole number from 0"),
    ({"seed": 2**53}, "seed must be a whole number"),
    ({"seed": MAX_SEED, "n": 2}, "seed must be a whole number"),
    ({"seed": 10**5000}, "not a number of more than 40 digits"),
    ({"seed": 1.0}, "seed must be a whole number"),
    ({"seed": True}, "seed must be a whole number"),
    ({"seed": "1"}, "seed must be a whole number"),
    ({"n": 0}, "n must be a whole number from 1 to 100, not 0"),
    ({"n": 101}, "n must be"),
    ({"n": None}, "n must be"),
    ({"steps": 0}, "steps must be a whole number from 1 to 1000, not 0"),
    ({"steps": -3}, "steps must be"),
    ({"steps": 1001}, "steps must be"),
    ({"steps": "abc"}, "steps must be .* not 'abc'"),
    ({"steps": 2.5}, "steps must be"),
    ({"steps": float("nan")}, "steps must be"),
    ({"steps": True}, "steps must be"),
    ({"steps": [4]}, "steps must be"),
    ({"sampler": "dpmp-2m"}, "unknown sampler 'dpmp-2m'; did you mean 'dpmpp-2m'"),
    ({"sampler": ""}, "sampler must be a name"),
    ({"sampler": 3}, "sampler must be a name"),
    ({"sampler": "x" * 1000}, "sampler must be a name"),
    ({"sampler": "ddim-inversion"}, "from a picture to noise"),
    ({"spacing": "karas"}, "unknown spacing 'karas'; did you mean 'karras'"),
    ({"guidance": float("nan")}, "guidance must be a number from 0 to 100, not nan"),
    ({"guidance": float("inf")}, "guidance must be"),
    ({"guidance": -1}, "guidance must be"),
    ({"guidance": 101}, "guidance must be"),
    ({"guidance": True}, "guidance must be"),
    ({"guidance": "7"}, "guidance must be"),
    ({"guidance": 10**400}, "guidance must be"),
    ({"guidance_rescale": 1.5}, "guidance_rescale must be"),
    ({"guidance_rescale": None}, "guidance_rescale must be"),
    ({"guidance_interval": 3}, "guidance_interval must be two numbers"),
    ({"guidance_interval": (1, 2, 3)}, "guidance_interval must be two numbers"),
    ({"guidance_interval": (2, 1)}, "guidance_interval must rise"),
    ({"guidance_interval": (float("nan"), 1)}, "lower end of guidance_interval"),
    ({"guidance_interval": (0, float("inf"))}, "upper end of guidance_interval"),
    ({"guidance": 1, "negative": "rain"}, "negative has no effect at guidance 1"),
    ({"guidance": 1, "guidance_rescale": 0.5}, "guidance_rescale has no effect"),
    ({"guidance": 1, "guidance_interval": (0, 1)}, "guidance_interval has no effect"),
    ({"sampler": "ddim", "eta": 1.5}, "eta must be"),
    ({"sampler": "plms", "eta": 0.5}, "sampler 'plms' takes no eta"),
    ({"width": 17}, "size 17x16 .* multiples of 2; the nearest is 16x16"),
    ({"width": 0}, "width must be"),
    ({"height": -16}, "height must be"),
    ({"width": 16.0}, "width must be"),
    ({"width": 1024, "height": 1024}, "size 1024x1024 is too large: .* at most 4096 pixels, such as 64x64"),
    ({"width": 2**30}, "width must be"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_a_bad_value_is_refused_in_one_line(settings: dict[str, Any], message: str, tiny: Model) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        Request(**{"prompt": "a", **settings}).resolve(tiny)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_json_goes_both_ways() -> None:
    r = Request("ein Füchslein\n🦊", seed=3, n=2, guidance=2.5, guidance_interval=(0.5, 3.0), sampler="ddim", eta=0.5)
    assert Request.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    assert set(r.to_dict()) == set(FIELDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "a", "stepz": 3}, "unknown setting 'stepz'; did you mean 'steps'"),
        ({"prompt": "a", "cfg_scale": 3}, "unknown setting 'cfg_scale'"),
        ({"prompt": "a", 3: 4}, "unknown setting 3"),
        ({"prompt": "a", "steps": "20"}, "steps must be"),
        ({"prompt": "a", "guidance_interval": [1]}, "two numbers"),
        ({"prompt": "a", "guidance_interval": {"low": 1}}, "two numbers"),
    ],
)
def test_from_dict_is_strict(settings: dict[Any, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Request.from_dict(settings)


def test_a_size_s_nearest_neighbour_is_never_nothing(tiny: Model) -> None:
    model = replace(tiny, multiple=8)
    with pytest.raises(BadRequest, match="the nearest is 8x16"):
        Request("a", width=1, height=17).resolve(model)
