"""OpenAI's dialect: ``/v1/images/…`` and ``/v1/models``, as its clients speak it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from sfumato.errors import BadData, BadRequest
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.request import Request as PictureRequest
from sfumato.server.answers import openai_error, read_form, read_json
from sfumato.server.context import Context
from sfumato.server.errors import ApiError, fail
from sfumato.server.following import EventStream, outcome, succeeded
from sfumato.server.metadata import describe_png
from sfumato.server.queue import Job
from sfumato.server.routes import client_of
from sfumato.server.schema import body_of, request_properties
from sfumato.server.sizes import drawn, finished
from sfumato.server.uploads import open_picture

THEIR_MODELS = ("dall-e", "gpt-image", "chatgpt-image")  # names that clients send unasked: the default model
QUALITY = {"low": 0.5, "auto": 1, "standard": 1, "medium": 1, "high": 2, "hd": 2}  # × the model's default steps
FORMATS = ("png", "jpeg", "webp")
OURS = {f.name for f in fields(PictureRequest)}
NO_EFFECT = {  # settings that may be sent as long as they ask for nothing
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "style": ("natural",),
    "input_fidelity": ("low", "high"),
}
TEXTS = ("prompt", "negative", "prompt_to", "user", "model", "size")  # of a form: text, if it looks like a number too


@dataclass(frozen=True)
class Form:
    """How the client wants its answer."""

    kind: str  # of the events: image_generation or image_edit
    response_format: str | None = None
    output_format: str = "png"
    compression: int = 90
    stream: bool = False
    partial_images: int = 0
    quality: str = "auto"


def routes(context: Context) -> APIRouter:
    """The routes of OpenAI's dialect."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    began = int(time.time())

    @router.post("/images/generations", summary="Pictures from words", openapi_extra=body_of(_json_body()))
    async def generations(request: Request) -> Response:
        return await answer(request, await read_json(request), "image_generation")

    @router.post(
        "/images/edits", summary="Pictures from words and a picture", openapi_extra=body_of(_form_body("image"))
    )
    async def edits(request: Request) -> Response:
        given = _numbers(await read_form(request))
        image, mask = given.pop("image", None) or given.pop("image[]", None), given.pop("mask", None)
        if not isinstance(image, UploadFile) or not isinstance(mask, UploadFile | None):
            what = "image" if isinstance(mask, UploadFile | None) else "mask"
            fail(400, "image must be one picture as a file, and mask another or left out", setting=what)
        with _about("image"):
            given["init"] = await asyncio.to_thread(context.uploads.keep, await image.read())
        if mask is not None:
            with _about("mask"):
                given["mask"] = await asyncio.to_thread(_keep_mask, context, await mask.read())
        return await answer(request, given, "image_edit")

    @router.post("/images/variations", summary="Pictures like a picture", openapi_extra=body_of(_form_body("image")))
    async def variations(request: Request) -> Response:
        given = _numbers(await read_form(request))
        image = given.pop("image", None)
        if "mask" in given:
            fail(400, "variations take no mask; /v1/images/edits does", setting="mask")
        if not isinstance(image, UploadFile):
            fail(400, "image must be one picture as a file", setting="image")
        data = await image.read()
        words = await asyncio.to_thread(_words_of, data)
        if "prompt" in given:
            words.pop("guidance", None)  # of a picture that no words are known of
        given = {**words, **given}
        with _about("image"):
            given["init"] = await asyncio.to_thread(context.uploads.keep, data)
        return await answer(request, given, "image_edit")

    @router.get("/models", summary="Models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(name, began) for name in context.sources]})

    @router.get("/models/{id}", summary="A model")
    async def model(id: str) -> JSONResponse:
        if id not in context.sources:
            fail(404, "there is no such model", "model_not_found", setting="model")
        return JSONResponse(_model(id, began))

    async def answer(request: Request, given: dict[str, Any], kind: str) -> Response:
        user = given.get("user") or ""
        if not isinstance(user, str):
            fail(400, "user must be text", setting="user")
        client = user if 0 < len(user) <= 100 and user.isprintable() else client_of(request)
        with _their_names(given):
            form, settings, name = _read(context, given, kind)
            job = await context.submit("openai", client, settings, name)
        if form.stream:
            return EventStream(_events(context, job, form))
        job = await outcome(context, request, job)
        base = context.settings.public_url or str(request.base_url)
        data = [await _item(context, p["id"], form, base) for p in job.pictures]
        size = _size(context, job)
        told = {"warnings": job.warnings} if job.warnings else {}
        return JSONResponse(
            {"created": int(job.created), "data": data, "size": size, "output_format": form.output_format, **told}
        )

    return router


@contextmanager
def _about(setting: str) -> Iterator[None]:
    """Say of a picture that cannot be taken which one it is."""
    try:
        yield
    except BadData as e:
        fail(400, f"{setting}: {e}", "invalid_value", setting=setting)


@contextmanager
def _their_names(given: dict[str, Any]) -> Iterator[None]:
    """Call settings by the names that the client gave them."""
    names = {"init": "image"} | ({"width": "size", "height": "size"} if "size" in given else {})
    try:
        yield
    except (ApiError, BadRequest) as e:
        if e.setting not in names:
            raise
        setting, e.setting = e.setting, names[e.setting]
        if setting == "init" and isinstance(e, BadRequest):
            raise type(e)(str(e).replace("init", "image", 1), "image") from None
        raise


def _read(context: Context, given: dict[str, Any], kind: str) -> tuple[Form, dict[str, Any], str | None]:
    """Divide a body into how to answer, the settings of a request, and the model's name; raises ApiError."""
    given = {k: v for k, v in given.items() if v is not None}
    given.pop("user", None)
    name = given.pop("model", None)
    if isinstance(name, str) and name.startswith(THEIR_MODELS):
        name = None
    if isinstance(name, str) and name not in context.sources:
        known = ", ".join(context.sources)
        fail(404, f"no model {name[:60]!r}; there are {known}", "model_not_found", setting="model")
    facts = context.facts(name)
    for what, allowed in NO_EFFECT.items():
        if given.pop(what, allowed[0]) not in allowed:
            fail(400, f"{what} can only be {' or '.join(allowed)} here", setting=what)
    compressed = "output_compression" in given
    form = Form(
        kind,
        _one_of("response_format", given.pop("response_format", None), ("url", "b64_json", None)),
        _one_of("output_format", given.pop("output_format", "png"), FORMATS),
        _whole("output_compression", given.pop("output_compression", 90), 0, 100),
        _one_of("stream", given.pop("stream", False), (True, False)),
        _whole("partial_images", given.pop("partial_images", 0), 0, 3),
        _one_of("quality", given.pop("quality", "auto"), tuple(QUALITY)),
    )
    if compressed and form.output_format == "png" and form.compression != 100:
        fail(400, "PNG files are whole: output_compression is for jpeg and webp", setting="output_compression")
    if form.partial_images and not form.stream:
        fail(400, "partial_images come only in a stream: ask for stream, too", setting="partial_images")
    if form.response_format == "url" and form.stream:
        fail(400, "a stream carries its pictures as base64; leave response_format out", setting="response_format")
    if form.response_format == "url" and form.output_format != "png":
        fail(400, "pictures at a URL are PNG files; ask for response_format b64_json", setting="output_format")
    size = given.pop("size", "auto")
    if size != "auto":
        width, x, height = str(size).partition("x")
        if not (x and width.isdecimal() and height.isdecimal() and len(str(size)) < 20):
            fail(400, 'size must be "WxH" in pixels, or "auto"', setting="size")
        if "width" in given or "height" in given:
            fail(400, "give size, or the width and height that the network draws, not both", setting="size")
        given = drawn(facts, {**given, "width": int(width), "height": int(height)})
    if "steps" not in given and QUALITY[form.quality] != 1:
        given["steps"] = max(1, round(facts.defaults.steps * QUALITY[form.quality]))
    if unknown := [k for k in given if k not in OURS]:
        fail(400, f"unknown setting {unknown[0][:60]!r}", "unknown_parameter", setting=unknown[0][:60])
    if "prompt" not in given:
        fail(400, "prompt is missing", "missing_required_parameter", setting="prompt")
    return form, given, name


async def _events(context: Context, job: Job, form: Form) -> AsyncGenerator[str, None]:
    """What happens to a job as OpenAI's events; closing the generator before it is over cancels the job."""
    about = {
        "created_at": int(job.created), "size": _size(context, job),
        "quality": form.quality, "background": "opaque", "output_format": form.output_format,
    }  # fmt: skip
    shown, following = 0, context.watch(job.id, previews=form.partial_images > 0)
    over = False
    try:
        async for event, data in following:
            due = (shown + 1) * job.request["steps"] / (form.partial_images + 1)
            if event == "preview" and shown < form.partial_images and data["picture"] == 0 and data["step"] >= due // 1:
                image = Image.open(io.BytesIO(base64.b64decode(data["image"].partition(",")[2])))
                event_data = {"b64_json": _encoded(image.convert("RGB"), form), "partial_image_index": shown}
                shown += 1
                yield _event(f"{form.kind}.partial_image", {**event_data, **about})
            else:
                yield ""
        ended = await context.db(context.queue.find, job.id)
        assert ended is not None
        try:
            about |= {"warnings": ended.warnings} if ended.warnings else {}
            for picture in succeeded(ended).pictures:
                item = await _item(context, picture["id"], form, "")
                usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                details = {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
                about |= {"b64_json": item["b64_json"], "usage": {**usage, **details}}
                yield _event(f"{form.kind}.completed", about)
        except ApiError as e:
            yield f"event: error\ndata: {json.dumps(openai_error(e)[1])}\n\n"
        over = True  # a job that waits while the server stops is kept, as it was told
    finally:
        await following.aclose()
        if not over:
            with suppress(ApiError):  # it had ended
                await context.cancel(job.id)


def _size(context: Context, job: Job) -> str:
    return "{}x{}".format(*finished(job.request, context.facts(job.model)))


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


async def _item(context: Context, id: str, form: Form, base: str) -> dict[str, str]:
    """A picture as the client wants it, at its own size."""
    item: dict[str, str] = {}
    if form.response_format != "url":
        path = context.gallery.path(id) or fail(404, "the picture was deleted meanwhile")
        picture = await asyncio.to_thread(Picture.open, path)
        item["b64_json"] = (
            base64.b64encode(await asyncio.to_thread(picture.encode)).decode()
            if form.output_format == "png"
            else await asyncio.to_thread(_encoded, picture.image, form)
        )
    if form.response_format != "b64_json" and form.output_format == "png":
        item["url"] = f"{base.rstrip('/')}/pictures/{id}.png?scale=1"
    return item


def _encoded(image: Image.Image, form: Form) -> str:
    file = io.BytesIO()
    image.save(
        file, form.output_format.upper(), **({} if form.output_format == "png" else {"quality": form.compression})
    )
    return base64.b64encode(file.getvalue()).decode()


def _keep_mask(context: Context, data: bytes) -> Any:
    """OpenAI's mask is transparent where to repaint; ours is white there."""
    image = open_picture(data)
    if image.mode != "RGBA":
        fail(400, "the mask must be transparent where the picture is to be redrawn", setting="mask")
    if image.getchannel("A").getextrema() == (255, 255):
        fail(400, "the mask is opaque everywhere: make transparent what is to be redrawn", setting="mask")
    file = io.BytesIO()
    image.getchannel("A").point([255 - a for a in range(256)]).convert("RGB").save(file, "PNG")
    return context.uploads.keep(file.getvalue())


def _words_of(data: bytes) -> dict[str, Any]:
    """The words that a picture was made by; without any, no words guide at all."""
    try:
        request = describe_png(data)["request"]
        return {"prompt": request["prompt"], "negative": request.get("negative", "")}
    except Exception:  # not ours: any picture may be varied
        return {"prompt": "a variation", "guidance": 0.0}


def _numbers(form: dict[str, Any]) -> dict[str, Any]:
    """A form's fields, which are all text, with the types that JSON would have given them."""

    def value(text: Any) -> Any:
        if isinstance(text, str):
            with suppress(ValueError, RecursionError):
                plain = json.loads(text)
                return plain if isinstance(plain, (int, float, bool)) else text
        return text

    return {k: v if k in TEXTS else value(v) for k, v in form.items()}


def _one_of(what: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        fail(400, f"{what} must be one of {', '.join(str(a).lower() for a in allowed if a is not None)}", setting=what)
    return value


def _whole(what: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        fail(400, f"{what} must be a whole number from {low} to {high}", setting=what)
    return value


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "sfumato"}


def _json_body() -> tuple[str, dict[str, Any]]:
    properties = {
        **request_properties(),
        "model": {"type": "string"},
        "size": {"type": "string", "description": '"WxH" of the picture that comes out, or "auto"'},
        "quality": {"enum": list(QUALITY)},
        "response_format": {"enum": ["url", "b64_json"], "description": "both if left out"},
        "output_format": {"enum": list(FORMATS)},
        "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
        "stream": {"type": "boolean"},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
        "user": {"type": "string"},
    }
    return "application/json", {"type": "object", "properties": properties, "required": ["prompt"]}


def _form_body(*files: str) -> tuple[str, dict[str, Any]]:
    _, schema = _json_body()
    properties = {**schema["properties"], **{f: {"type": "string", "format": "binary"} for f in (*files, "mask")}}
    return "multipart/form-data", {"type": "object", "properties": properties, "required": list(files)}
