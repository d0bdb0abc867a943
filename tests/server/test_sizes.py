"""A size that other programs ask for is that of the picture which comes out."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import openai
import pytest
from PIL import Image
from serving import Serve

from sfumato.errors import BadRequest, TooLarge
from sfumato.server.sizes import drawn, finished
from sfumato.server.wire import DefaultSettings, ModelFacts

FACTS = ModelFacts(
    "m", "0", "f", DefaultSettings("ddim", "trailing", 4, 3.0, 64, 64, 4), 16, 1 << 16, False, True, False, {}
)  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "width", "height", "upscale"),
    [
        ((256, 256), 64, 64, 4),
        ((512, 256), 128, 64, 4),
        ((64, 64), 64, 64, 1),  # the model's own size, rather than 16 pixels enlarged
        ((128, 128), 32, 32, 4),  # as far from it, either way
        ((96, 96), 96, 96, 1),  # no multiple of 64
        ((1024, 1024), 256, 256, 4),
        ((256, None), 64, 64, 4),
    ],
)
def test_what_is_drawn_and_enlarged_is_what_was_asked_for(
    asked: tuple[int, int | None], width: int, height: int, upscale: int
) -> None:
    settings = drawn(FACTS, {"prompt": "a", "width": asked[0], "height": asked[1]})
    assert settings == {"prompt": "a", "width": width, "height": height, "upscale": upscale}
    assert finished({**settings, "hires": None}, FACTS) == (asked[0], asked[1] or 256)
    assert finished({**settings, "hires": 2.0}, FACTS) == (2 * asked[0], 2 * (asked[1] or 256))


def test_what_is_asked_for_is_kept() -> None:
    assert drawn(FACTS, {"prompt": "a"}) == {"prompt": "a"}
    assert drawn(FACTS, {"width": 256, "height": 256, "upscale": 1})["width"] == 256
    assert drawn(FACTS, {"width": 64, "height": 64, "upscale": 4})["width"] == 16
    assert drawn(FACTS, {"width": "x", "height": 64}) == {"width": "x", "height": 64}, "refused by its type later"
    plain = replace(FACTS, defaults=replace(FACTS.defaults, upscale=1))
    assert drawn(plain, {"width": 128, "height": 64}) == {"width": 128, "height": 64, "upscale": 1}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"width": 250, "height": 250}, "multiples of 16, or 64 enlarged by 4; the nearest is 256x256"),
        ({"width": 1000, "height": 1000}, "multiples of 16, or 64 enlarged by 4; the nearest is 1024x1024"),
        ({"width": 2048, "height": 2048}, "too large: model 'm' makes at most 1048576 pixels, such as 1024x1024"),
        ({"width": 512, "height": 512, "upscale": 1}, "too large: model 'm' makes at most 65536 pixels, such as 256x"),
        ({"width": 96, "height": 96, "upscale": 4}, "multiples of 64 enlarged by 4; the nearest is 128x128"),
    ],
)
def test_what_cannot_be_reached_names_what_can(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        drawn(FACTS, asked)
    assert isinstance(caught.value, TooLarge) == ("too large" in message)


def test_both_dialects_send_the_size_they_were_asked_for(serve: Serve) -> None:
    server = serve("engines:enlarging")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.images.generate(prompt="a", size="64x32", extra_body={"steps": 1})  # type: ignore[arg-type]
        assert answer.data is not None
        assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).size == (64, 32)
        assert answer.size == "64x32"
        with pytest.raises(openai.BadRequestError, match="the nearest is"):
            client.images.generate(prompt="a", size="51x51")  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match="not both"):
            client.images.generate(prompt="a", size="64x64", extra_body={"width": 16})  # type: ignore[arg-type]
    body = {"prompt": "a", "steps": 1, "width": 64, "height": 64, "batch_size": 1}
    said = server.http.post("/sdapi/v1/txt2img", json=body).json()
    (picture,) = said["images"]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (64, 64)
    info = json.loads(said["info"])
    assert (info["width"], info["height"]) == (64, 64)
    assert "Size: 16x16" in info["infotexts"][0]
    assert "Postprocess upscale by: 4" in info["infotexts"][0]
    told = server.http.post("/sdapi/v1/png-info", json={"image": picture}).json()
    assert (told["parameters"]["width"], told["parameters"]["upscale"]) == (16, 4)
