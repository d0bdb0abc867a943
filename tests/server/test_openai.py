"""OpenAI's dialect, spoken by OpenAI's own client."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving import Server


@pytest.fixture
def client(shared: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def decoded(item: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def test_words_become_pictures_as_text_and_at_a_url(client: openai.OpenAI, shared: Server) -> None:
    answer = client.images.generate(prompt="a red apple", n=2, size="32x16", extra_body={"seed": 7, "steps": 2})  # type: ignore[arg-type]
    assert answer.data is not None
    assert [decoded(d).size for d in answer.data] == [(32, 16), (32, 16)]
    for item in answer.data:
        at_url = Image.open(io.BytesIO(httpx.get(str(item.url)).content))
        assert np.array_equal(np.asarray(at_url), np.asarray(decoded(item)))
    again = client.images.generate(
        prompt="a red apple", size="32x16", response_format="b64_json", extra_body={"seed": 8, "steps": 2}  # type: ignore[arg-type]
    )  # fmt: skip
    assert again.data is not None
    assert again.data[0].url is None
    difference = np.asarray(decoded(again.data[0])).astype(int) - np.asarray(decoded(answer.data[1]))
    assert abs(difference).max() <= 1  # another batch rounds otherwise


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats(client: openai.OpenAI, form: Any) -> None:
    answer = client.images.generate(prompt="a", output_format=form, output_compression=50, extra_body={"steps": 1})
    assert answer.data is not None
    assert decoded(answer.data[0]).format == form.upper()


def test_partial_images_come_before_the_whole(client: openai.OpenAI) -> None:
    with client.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"steps": 40}) as stream:
        events = list(stream)
    assert events[-1].type == "image_generation.completed"
    assert decoded(events[-1]).size == (16, 16)
    partial = [e for e in events if e.type == "image_generation.partial_image"]
    assert [e.partial_image_index for e in partial] == list(range(len(partial)))
    assert 1 <= len(partial) <= 2
    assert len(events) == len(partial) + 1


def test_models(client: openai.OpenAI, shared: Server) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert client.images.generate(prompt="a", model=model.id, extra_body={"steps": 1}).data
    assert client.images.generate(prompt="a", model="gpt-image-1", extra_body={"steps": 1}).data
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as caught:
        client.images.generate(prompt="a", model="other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("settings", "message", "param", "code"),
    [
        ({"n": 0}, "n must be", "n", "invalid_value"),
        ({"size": "17x16"}, "does not fit", "size", "invalid_value"),
        ({"extra_body": {"width": 17}}, "does not fit", "width", "invalid_value"),
        ({"size": "large"}, "size must be", "size", "invalid_value"),
        ({"background": "transparent"}, "background can only be", "background", "invalid_value"),
        ({"partial_images": 9}, "partial_images must be", "partial_images", "invalid_value"),
        ({"response_format": "url", "stream": True}, "as base64", "response_format", "invalid_value"),
        ({"response_format": "url", "output_format": "jpeg"}, "URL are PNG", "output_format", "invalid_value"),
        ({"partial_images": 1}, "only in a stream", "partial_images", "invalid_value"),
        ({"output_compression": 50}, "for jpeg and webp", "output_compression", "invalid_value"),
        ({"extra_body": {"user": 5}}, "user must be text", "user", "invalid_value"),
        ({"extra_body": {"stepz": 3}}, "unknown setting 'stepz'", "stepz", "unknown_parameter"),
        ({"extra_body": {"steps": "3"}}, "steps must be a whole number", "steps", "invalid_value"),
        ({"extra_body": {"sampler": "x"}}, "unknown sampler", "sampler", "invalid_value"),
        ({"extra_body": {"prompt": None}}, "prompt is missing", "prompt", "missing_required_parameter"),
    ],
)
def test_what_cannot_be_served_is_an_error_in_their_form(
    client: openai.OpenAI, settings: dict[str, Any], message: str, param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.images.generate(**{"prompt": "a"} | settings)
    error = caught.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, code)
    assert error.body == {"message": error.body["message"], "type": error.type, "param": param, "code": code}  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"n": 33}, "n"), ({"n": 10**6}, "n"), ({"extra_body": {"steps": 201}}, "steps"),
        ({"size": "4096x4096"}, "size"),
        ({"n": 32, "size": "256x256", "extra_body": {"steps": 200, "hires": 8}}, "size"),
    ],
)  # fmt: skip
def test_what_is_right_and_only_too_much_has_a_status_of_its_own(
    client: openai.OpenAI, settings: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=r"at most|to 100|is too large") as caught:
        client.images.generate(**{"prompt": "a"} | settings)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


def test_other_errors_in_their_form(shared: Server) -> None:
    def told(answer: httpx.Response) -> tuple[Any, ...]:
        error = answer.json()["error"]
        return answer.status_code, error["type"], error["param"], error["code"]

    at = f"{shared.url}/v1/images/generations"
    assert told(httpx.post(at, content=b"{", headers={"content-type": "application/json"})) == (
        400, "invalid_request_error", None, None,
    )  # fmt: skip
    assert told(httpx.post(at, json=[1])) == (400, "invalid_request_error", None, None)
    assert told(httpx.post(at, content=b"a=1", headers={"content-type": "text/plain"}))[0] == 415
    assert told(httpx.get(f"{shared.url}/v1/nothing")) == (404, "invalid_request_error", None, "not_found")


def file_of(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return file


def test_edits_repaint_what_the_mask_leaves_open(client: openai.OpenAI) -> None:
    before = Image.effect_noise((16, 16), 60).convert("RGB")
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 0, 16, 16))  # the right half is transparent: to be redrawn
    answer = client.images.edit(
        image=("a.png", file_of(before)), mask=("m.png", file_of(mask)), prompt="a red apple",
        extra_body={"seed": 3, "steps": 3},
    )  # fmt: skip
    assert answer.data is not None
    after, old = np.asarray(decoded(answer.data[0])), np.asarray(before)
    assert np.array_equal(after[:, :8], old[:, :8])
    assert not np.array_equal(after[:, 8:], old[:, 8:])
    with pytest.raises(openai.BadRequestError, match="transparent where"):
        client.images.edit(image=("a.png", file_of(before)), mask=("m.png", file_of(before)), prompt="a")
    whole = Image.new("RGBA", (16, 16), "white")
    with pytest.raises(openai.BadRequestError, match="opaque everywhere"):
        client.images.edit(image=("a.png", file_of(before)), mask=("m.png", file_of(whole)), prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"image .*is too long and narrow"):
        client.images.edit(image=("a.png", file_of(Image.new("RGB", (400, 2)))), prompt="a")
    small = Image.new("RGBA", (8, 8))
    with pytest.raises(openai.BadRequestError, match="mask is 8x8, but the picture 16x16") as caught:
        client.images.edit(image=("a.png", file_of(before)), mask=("m.png", file_of(small)), prompt="a")
    assert caught.value.param == "mask"
    with pytest.raises(openai.BadRequestError, match="given more than once"):
        client.images.edit(image=[("a.png", file_of(before)), ("b.png", file_of(before))], prompt="a")
    with pytest.raises(openai.BadRequestError, match="not a whole PNG") as caught:
        client.images.edit(image=("a.png", io.BytesIO(b"GIF89a")), prompt="a")
    assert caught.value.param == "image"


def test_words_of_a_variation_guide_and_text_of_a_form_stays_text(client: openai.OpenAI, shared: Server) -> None:
    for words, guides in (({}, False), ({"prompt": "a red apple", "prompt_to": "42"}, True)):
        client.images.create_variation(image=("a.png", file_of(Image.effect_noise((16, 16), 60))), extra_body=words)
        request = shared.http.get("/jobs", params={"limit": 1}).json()["jobs"][0]["request"]
        assert (request["guidance"] > 1) is guides
        assert request["prompt_to"] == words.get("prompt_to")


def test_variations_are_of_the_picture(client: openai.OpenAI, shared: Server) -> None:
    answer = client.images.create_variation(image=("a.png", file_of(Image.effect_noise((16, 16), 60))), n=2)
    assert answer.data is not None
    assert len(answer.data) == 2
    made = shared.ended(shared.submit("a red apple", seed=5, steps=2)["id"])
    (id,) = [p["id"] for p in made["pictures"]]
    again = shared.ended(shared.submit("a blue house", init=id, strength=0.5, seed=1, steps=4)["id"])
    assert again["state"] == "done", again
    known = shared.http.get(f"/pictures/{again['pictures'][0]['id']}").json()["request"]
    once_more = shared.ended(shared.submit(**known)["id"])  # the request inside names its picture by hash
    files = [shared.http.get(j["pictures"][0]["url"]).content for j in (again, once_more)]
    pixels = [np.asarray(Image.open(io.BytesIO(f))).astype(int) for f in files]
    assert abs(pixels[0] - pixels[1]).max() <= 1
    for missing in ("none", {"sha256": "0" * 64}):
        answer_ = shared.http.post("/jobs", json={"prompt": "a", "init": missing})
        assert answer_.status_code == 422
        assert "init" in answer_.json()["error"]["message"]
