"""The request: one frozen schema, strict both ways, every bad value refused in one clear line."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import BadRequest
from sfumato.families.model import Model
from sfumato.pipeline.request import MAX_SEED, Request


def png(width: int = 16, height: int = 16, mode: str = "RGB") -> bytes:
    """A picture of noise."""
    channels = len(mode) if len(mode) > 1 else None
    shape = (height, width) if channels is None else (height, width, channels)
    pixels = np.random.default_rng(width).integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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
    "init": "PictureFile | None",
    "strength": "float | None",
    "mask": "PictureFile | None",
    "outpaint": "tuple[int, int, int, int] | None",
    "variation_seed": "int | None",
    "variation_strength": "float",
    "prompt_to": "str | None",
    "mix": "float | None",
    "hires": "float | None",
    "hires_strength": "float | None",
    "upscale": "int | None",
    "control_image": "PictureFile | tuple[PictureFile, ...] | None",
    "control_scale": "float | tuple[float, ...] | None",
    "image_prompt": "PictureFile | None",
    "image_prompt_scale": "float | None",
    "best_of": "int",
    "control_range": "tuple[float, float] | tuple[tuple[float, float], ...] | None",
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
    ({"init": 7}, "init must be a picture"),
    ({"init": ""}, "init is empty"),
    ({"init": b""}, "init is empty"),
    ({"init": "photo.png"}, "init is text that is no base64; in Python, give bytes"),
    ({"init": "data:image/png,abc"}, "data URL in base64"),
    ({"init": Path("missing.png")}, "init missing.png: no such file"),
    ({"init": Path("/")}, "init /: a folder, not a picture"),
    ({"init": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "init: not a picture but an SVG drawing"),
    ({"init": b"\x89PNG\r\n\x1a\n"}, "init: .*(damaged|not a picture)"),
    ({"init": png(24, 24)[:200]}, "init: damaged or cut off"),
    ({"init": {"sha256": "00"}}, "init must have its SHA-256 in 64"),
    ({"init": {"path": "/etc/passwd"}}, "init must have sha256, name and data"),
    ({"init": {"sha256": "0" * 64, "name": "a.png"}}, "init a.png: not at hand"),
    ({"init": {"sha256": "0" * 64, "data": "AAAA"}}, "init is not the picture that was used: its SHA-256"),
    ({"init": png(640, 16)}, "640x16 is too long and narrow"),
    ({"init": png(), "strength": 0}, "strength must be above 0"),
    ({"init": png(), "strength": 1.5}, "strength must be a number from 0 to 1"),
    ({"init": png(), "strength": float("nan")}, "strength must be a number"),
    ({"strength": 0.5}, "strength has no effect without init"),
    ({"mask": png()}, "mask has no effect without init"),
    ({"outpaint": (0, 0, 8, 8)}, "outpaint has no effect without init"),
    ({"init": png(), "outpaint": (8, 8)}, "outpaint must be four numbers"),
    ({"init": png(), "outpaint": (0, 0, 0, 0)}, "outpaint has no margin above 0"),
    ({"init": png(), "outpaint": (0, -8, 0, 0)}, "a margin of outpaint must be"),
    ({"init": png(), "outpaint": (0, 0, 1, 0)}, "size 17x16 does not fit"),
    ({"variation_seed": 3}, "variation_seed has no effect without variation_strength"),
    ({"variation_strength": 1.5}, "variation_strength must be"),
    ({"mix": 0.5}, "mix has no effect without prompt_to"),
    ({"prompt_to": " "}, "prompt_to is empty"),
    ({"prompt_to": "b", "mix": 2}, "mix must be"),
    ({"hires": 1}, "hires must be above 1"),
    ({"hires": 9}, "hires must be a number from 1 to 8"),
    ({"hires": 5}, "size 80x80 is too large"),
    ({"upscale": 2}, "upscale is 1 or 4, not 2"),
    ({"upscale": 8}, "upscale must be a whole number from 1 to 4"),
    ({"control_scale": 0.5}, "control_scale has no effect without control_image"),
    ({"image_prompt_scale": 0.5}, "image_prompt_scale has no effect without image_prompt"),
    ({"control_image": png(), "control_scale": -1}, "control_scale must be a number from 0 to 10"),
    ({"control_image": ()}, "control_image must be one or up to 64, not 0"),
    ({"control_image": (png(),) * 65}, "control_image must be one or up to 64, not 65"),
    ({"control_image": (png(), 7)}, "control_image must be a picture"),
    ({"control_image": (png(), png()), "control_scale": (1, -1)}, "control_scale must be a number from 0 to 10"),
    (
        {"control_image": (png(),) * 3, "control_scale": (1, 0.5)},
        "control_scale has 2 values, control_image 3 pictures",
    ),
    ({"control_image": png(), "control_scale": (1, 0.5)}, "control_scale has 2 values, control_image 1 picture:"),
    ({"control_range": (0, 1)}, "control_range has no effect without control_image"),
    ({"control_image": png(), "control_range": 0.5}, "control_range must be two numbers"),
    ({"control_image": png(), "control_range": (0.5, 0.5)}, "control_range must rise"),
    ({"control_image": png(), "control_range": (0, 1.5)}, "an end of control_range must be a number from 0 to 1"),
    ({"control_image": (png(),) * 2, "control_range": ((0, 1), 0.5)}, "control_range must be two numbers"),
    ({"control_image": png(), "control_range": ((0, 1), (0, 0.5))}, "control_range has 2 values, control_image 1 pic"),
    ({"control_image": png()}, "control_image has no effect: model .* was loaded without a ControlNet"),
    ({"hires_strength": 0.5}, "hires_strength has no effect without hires"),
    ({"hires": 2, "hires_strength": 0}, "hires_strength must be above 0"),
    ({"hires": 2, "init": png(), "mask": png()}, "hires goes with no mask"),
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


def test_one_or_one_for_each_control_picture_goes_both_ways() -> None:
    pictures = [png(), png(24, 24)]
    several: dict[str, Any] = {"control_scale": [0.5, 1], "control_range": [[0, 0.5], [0.25, 1]]}
    r = Request.from_dict({"prompt": "a", "control_image": [base64.b64encode(p).decode() for p in pictures], **several})
    assert isinstance(r.control_image, tuple)
    assert [p.data for p in r.control_image] == pictures
    assert (r.control_scale, r.control_range) == ((0.5, 1.0), ((0.0, 0.5), (0.25, 1.0)))
    assert Request.from_dict(json.loads(json.dumps(r.to_dict(pictures=True)))) == r
    assert r.map_pictures(lambda name, p: replace(p, name=name)).control_image == r.control_image
    one = Request.from_dict(
        {"prompt": "a", "control_image": [pictures[0]], "control_scale": [0.5], "control_range": [[0, 1]]}
    )
    assert one == Request("a", control_image=pictures[0], control_scale=0.5, control_range=(0, 1)).checked()  # type: ignore[arg-type]
    for_all = Request("a", control_image=tuple(pictures), control_scale=0.5, control_range=(0, 1))  # type: ignore[arg-type]
    assert for_all.checked().control_scale == 0.5


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


def test_a_picture_comes_in_any_form_and_is_known_by_its_bytes(tmp_path: Path) -> None:
    data = png()
    (tmp_path / "photo.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    forms: list[Any] = [data, text, f"data:image/png;base64,{text}", tmp_path / "photo.png", {"data": text}]
    requests = [Request("a", init=form).checked() for form in forms]
    assert len(set(requests)) == 1
    assert all(r.init is not None and r.init.sha256 == hashlib.sha256(data).hexdigest() for r in requests)
    assert Request("a", init=png(18)).checked() != requests[0]  # type: ignore[arg-type]
    image = Request("a", init=Image.open(tmp_path / "photo.png")).checked()  # type: ignore[arg-type]
    assert image.init is not None
    assert np.array_equal(image.init.image("init"), Image.open(io.BytesIO(data)))


def test_json_names_a_picture_and_carries_it_if_asked() -> None:
    r = Request("a", init=png(), mask=png(16, 16, "L"), outpaint=(2, 0, 0, 2), strength=0.5).checked()  # type: ignore[arg-type]
    small, whole = json.dumps(r.to_dict()), json.dumps(r.to_dict(pictures=True))
    assert len(small) < 1000
    again, named = Request.from_dict(json.loads(whole)), Request.from_dict(json.loads(small))
    assert again == named == r
    assert again.init is not None
    assert again.init.data == png()
    assert named.init is not None
    assert named.init.data is None


def test_a_picture_s_name_tells_no_one_where_it_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "me.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    names = [Request("a", init=p).checked().init.name for p in (Path("in/me.png"), tmp_path / "in" / "me.png")]  # type: ignore[arg-type,union-attr]
    assert names == ["in/me.png", "me.png"]


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ((16, 16), (16, 16)),
        ((20, 14), (20, 14)),
        ((21, 15), (20, 14)),  # cut to multiples of 2
        ((640, 320), (22, 12)),  # far too large: the model's own number of pixels
        ((4, 6), (14, 20)),  # far too small
    ],
)
def test_the_size_follows_from_the_picture(given: tuple[int, int], made: tuple[int, int], tiny: Model) -> None:
    r = Request("a", init=png(*given)).resolve(tiny)  # type: ignore[arg-type]
    assert r.size == made
    assert r.strength == 0.75
    assert r.resolve(tiny) == r
    r = Request("a", init=png(*given), outpaint=(4, 0, 2, 6)).resolve(tiny)  # type: ignore[arg-type]
    assert r.size == (made[0] + 6, made[1] + 6)
    assert r.strength == 1
    assert Request("a", init=png(*given), width=16, height=18).resolve(tiny).size == (16, 18)  # type: ignore[arg-type]


def test_the_size_from_a_picture_is_one_that_the_model_makes(tiny: Model) -> None:
    """Of a model that makes no more than its own number of pixels: both sides are not rounded up beyond it."""
    least = replace(tiny, max_pixels=16 * 16)
    request = Request.from_dict({"prompt": "a", "init": png(150, 170)}).resolve(least)
    assert request.size == (14, 16)


def test_a_model_without_an_encoder_says_so(tiny: Model) -> None:
    blind = replace(tiny, encode_picture=None)
    for settings in ({"init": png()}, {"hires": 2}):
        with pytest.raises(BadRequest, match="has no encoder"):
            Request("a", **settings).resolve(blind)  # type: ignore[arg-type]
    assert Request("a").resolve(blind).init is None


def test_variations_and_mixes_are_filled_in(tiny: Model) -> None:
    r = Request("a", seed=3, n=2, variation_strength=0.2, prompt_to="b", hires=2).resolve(tiny)
    assert r.variation_seed is not None
    assert (r.mix, r.hires_strength) == (0.5, 0.5)
    assert (r.nth(1).seed, r.nth(1).variation_seed) == (3, r.variation_seed + 1)
    assert Request("a", seed=3, n=2).resolve(tiny).nth(1).seed == 4
