"""AUTOMATIC1111's dialect, ``/sdapi/v1``: the settings that many tools send.

What would change the picture and is not there is refused, unless it is off. What has no meaning here is listed in the
answer's ``info.ignored``. ``progress`` and ``interrupt`` speak of the caller's own newest job, ``options`` of the
model that the caller chose.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

from fastapi import APIRouter, Request
from PIL import ImageFilter
from starlette.responses import JSONResponse

from sfumato.errors import BadData, BadRequest
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.request import Request as PictureRequest
from sfumato.server.answers import read_json
from sfumato.server.context import Context
from sfumato.server.errors import ApiError, fail
from sfumato.server.following import outcome
from sfumato.server.metadata import describe_png, text_of
from sfumato.server.queue import Job
from sfumato.server.routes import client_of
from sfumato.server.schema import body_of
from sfumato.server.sizes import drawn, finished
from sfumato.server.uploads import open_picture

OURS = {f.name for f in fields(PictureRequest)}
SAME = {  # their names of our settings
    "prompt": "prompt", "negative_prompt": "negative", "steps": "steps", "cfg_scale": "guidance", "width": "width",
    "height": "height", "eta": "eta", "subseed": "variation_seed", "subseed_strength": "variation_strength",
}  # fmt: skip
THEIRS = {ours: theirs for theirs, ours in SAME.items() if theirs != ours} | {
    "sampler": "sampler_name", "spacing": "scheduler", "n": "batch_size × n_iter", "hires": "hr_scale",
    "hires_strength": "denoising_strength", "strength": "denoising_strength", "init": "init_images",
}  # fmt: skip
OFF: Mapping[str, tuple[Any, ...]] = {  # settings that are not there, and the values by which they ask for nothing
    "restore_faces": (False,), "tiling": (False,), "script_name": ("",), "alwayson_scripts": ({},), "styles": ([],),
    "refiner_checkpoint": ("",), "seed_resize_from_w": (-1, 0), "seed_resize_from_h": (-1, 0), "s_churn": (0,),
    "s_noise": (1,), "s_tmin": (0,), "firstpass_image": ("",), "enable_hr": (False,), "hr_prompt": ("",),
    "hr_negative_prompt": ("",), "image_cfg_scale": (1.5, 1), "include_init_images": (False,), "infotext": ("",),
    "hr_second_pass_steps": (0,), "hr_resize_x": (0,), "hr_resize_y": (0,), "hr_scheduler": ("", "Use same scheduler"),
    "hr_sampler_name": ("", "Use same sampler"), "hr_checkpoint_name": ("", "Use same checkpoint"),
    "latent_mask": ("",), "initial_noise_multiplier": (1,), "s_min_uncond": (0,),
}  # fmt: skip
OVERRIDES_OFF: Mapping[str, tuple[Any, ...]] = {  # the same, of override_settings
    "CLIP_stop_at_last_layers": (1,), "sd_vae": ("Automatic", "None", ""), "eta_noise_seed_delta": (0,),
}  # fmt: skip
LISTS: Mapping[str, Any] = {  # what tools look for when they connect, and there is none of
    "loras": [], "hypernetworks": [], "sd-vae": [], "prompt-styles": [], "face-restorers": [], "upscalers": [],
    "latent-upscale-modes": [], "embeddings": {"loaded": {}, "skipped": {}}, "scripts": {"txt2img": [], "img2img": []},
    "cmd-flags": {},
}  # fmt: skip
CLIENTS = 1000  # whose chosen model is remembered
MAX_BLUR = 256  # pixels


def routes(context: Context) -> APIRouter:
    """The routes of AUTOMATIC1111's dialect."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    shown: dict[str, str] = {}  # job → newest preview, while its client asks for them
    watching: set[asyncio.Task[None]] = set()
    chosen: OrderedDict[str, str] = OrderedDict()  # client → model

    async def make(request: Request, given: dict[str, Any], settings: dict[str, Any]) -> JSONResponse:
        echo = {k: v for k, v in given.items() if k not in ("init_images", "mask")}
        client = client_of(request)
        with _their_names():
            settings, model, ignored, send = _read(context, given, settings)
            model = chosen.get(client) if model is None else model
            settings = drawn(context.facts(model), settings)
            job = await context.submit("a1111", client, settings, model)
        job = await outcome(context, request, job)
        return JSONResponse(await _result(context, job, echo, ignored, send))

    @router.post("/txt2img", summary="Pictures from words", openapi_extra=body_of(_body("prompt")))
    async def txt2img(request: Request) -> JSONResponse:
        return await make(request, await read_json(request), {})

    @router.post("/img2img", summary="Pictures from a picture", openapi_extra=body_of(_body("prompt", "init_images")))
    async def img2img(request: Request) -> JSONResponse:
        given = await read_json(request)
        settings = await asyncio.to_thread(_read_pictures, context, given)
        return await make(request, given, settings)

    @router.get("/progress", summary="How far the caller's newest job is")
    async def progress(request: Request, skip_current_image: bool = False) -> JSONResponse:
        job = await context.db(context.queue.newest, "a1111", client_of(request))
        if job is None:
            return JSONResponse(_progress(None, {}, None))
        if not skip_current_image and job.id not in shown and len(shown) < 100:
            shown[job.id] = ""
            task = asyncio.create_task(follow(job.id))
            watching.add(task)
            task.add_done_callback(watching.discard)
        return JSONResponse(_progress(job, await context.describe(job), shown.get(job.id) or None))

    async def follow(id: str) -> None:
        try:
            async for event, data in context.watch(id, previews=True):
                if event == "preview":
                    shown[id] = data["image"].partition(",")[2]
        finally:
            shown.pop(id, None)

    @router.post("/interrupt", summary="Cancel the caller's newest job")
    async def interrupt(request: Request) -> JSONResponse:
        job = await context.db(context.queue.newest, "a1111", client_of(request))
        if job is not None:
            with suppress(ApiError):  # it ended meanwhile
                await context.cancel(job.id)
        return JSONResponse({})

    @router.post("/png-info", summary="The text inside a PNG", openapi_extra=body_of(_body("image")))
    async def png_info(request: Request) -> JSONResponse:
        data = _base64("image", (await read_json(request)).get("image"))
        text, _, _ = await asyncio.to_thread(text_of, data)
        settings: dict[str, Any] = {}
        with suppress(BadData):
            settings = (await asyncio.to_thread(describe_png, data))["request"]
        return JSONResponse({"info": text.get("parameters", ""), "items": text, "parameters": settings})

    @router.get("/samplers", summary="Samplers")
    async def samplers() -> JSONResponse:
        from sfumato.pipeline.menu import menu

        return JSONResponse([{"name": s["name"], "aliases": s["aliases"], "options": {}} for s in menu()["samplers"]])

    @router.get("/schedulers", summary="Timestep spacings")
    async def schedulers() -> JSONResponse:
        from sfumato.pipeline.menu import menu

        return JSONResponse(
            [
                {"name": s["name"], "label": s["name"].capitalize(), "aliases": s["aliases"], "default_rho": -1.0}
                for s in menu()["spacings"]
            ]
        )

    @router.get("/sd-models", summary="Models")
    async def models() -> JSONResponse:
        known = [context.models[n] for n in context.sources if n in context.models]
        return JSONResponse(
            [
                {
                    "title": f"{m.name} [{m.hash[:10]}]", "model_name": m.name, "hash": m.hash[:10], "sha256": m.hash,
                    "filename": m.name, "config": None,
                }
                for m in known
            ]
        )  # fmt: skip

    @router.get("/options", summary="The model that is used where none is named")
    async def options(request: Request) -> JSONResponse:
        return JSONResponse({"sd_model_checkpoint": chosen.get(client_of(request), context.default_model)})

    @router.post("/options", summary="Choose the caller's model", openapi_extra=body_of(_body("sd_model_checkpoint")))
    async def choose(request: Request) -> JSONResponse:
        model = _model_of(context, await read_json(request), "options")
        if model is not None:
            chosen[client_of(request)] = context.facts(model).name
            chosen.move_to_end(client_of(request))
            if len(chosen) > CLIENTS:
                chosen.popitem(last=False)
        return JSONResponse({})

    def add_list(name: str, answer: Any) -> None:
        @router.get(f"/{name}", summary="None", name=name)
        async def nothing() -> JSONResponse:
            return JSONResponse(answer)

    for name, answer in LISTS.items():
        add_list(name, answer)

    return router


@contextmanager
def _their_names() -> Iterator[None]:
    """Call settings by the names that the client gave them."""
    try:
        yield
    except BadRequest as e:
        if theirs := THEIRS.get(e.setting or ""):
            said = re.sub(rf"\b{e.setting}\b", theirs, str(e), count=1)
            raise type(e)(said, theirs) from None
        raise


def _model_of(context: Context, given: Any, what: str) -> str | None:
    """The name of the model in their options, by which other options may only be off; raises ApiError."""
    given = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {"": given}
    title = given.pop("sd_model_checkpoint", None)
    for name, value in given.items():
        if value not in OVERRIDES_OFF.get(name, ()):
            fail(422, f"{what} can only name sd_model_checkpoint, not {name[:60]!r}")
    titles = {f"{name} [{facts.hash[:10]}]": name for name, facts in context.models.items()}
    if not isinstance(title, str | None):
        fail(422, "sd_model_checkpoint must be a name")
    return None if title is None else titles.get(title, title)


def _read(
    context: Context, given: dict[str, Any], settings: dict[str, Any]
) -> tuple[dict[str, Any], str | None, list[str], bool]:
    """Their settings as ours; returns them, the model, what was ignored, and whether to send the pictures back."""
    left = {k: v for k, v in given.items() if v is not None}
    for theirs, ours in SAME.items():
        if theirs in left and ours in OURS:
            settings[ours] = left.pop(theirs)
    settings.setdefault("prompt", "")
    if settings.get("guidance") == 1:
        settings.pop("negative", None)  # which has no effect there, in their program too
    if settings.get("eta") == 0:
        settings.pop("eta")
    if not settings.get("variation_strength"):
        settings.pop("variation_seed", None)
    elif settings.get("variation_seed") == -1:
        del settings["variation_seed"]
    if (seed := left.pop("seed", -1)) != -1:
        settings["seed"] = seed
    settings["n"] = _count(left.pop("batch_size", 1)) * _count(left.pop("n_iter", 1))
    _read_sampler(left, settings)
    if not isinstance(left.get("enable_hr", False), bool):
        fail(422, "enable_hr must be true or false")
    if "hires" in OURS and left.get("enable_hr") is True:
        del left["enable_hr"]
        settings |= {"hires": left.pop("hr_scale", 2.0), "hires_strength": left.pop("denoising_strength", 0.75)}
    model = _model_of(context, left.pop("override_settings", {}), "override_settings")
    left.pop("override_settings_restore_afterwards", None)  # nothing of it stays
    for name, allowed in OFF.items():
        if name in left and left.pop(name) not in allowed:
            fail(422, f"{name} is not there: leave it out, or off")
    if not isinstance(send := left.pop("send_images", True), bool):
        fail(422, "send_images must be true or false")
    for name in ("save_images", "do_not_save_samples", "do_not_save_grid"):
        left.pop(name, None)  # pictures are always kept, grids never made
    return settings, model, sorted(k[:60] for k in left), send


def _read_sampler(left: dict[str, Any], settings: dict[str, Any]) -> None:
    """Their sampler and scheduler; older clients write both as one name."""
    from sfumato.server.metadata import read_sampler

    name = left.pop("sampler_name", None) or left.get("sampler_index")
    if left.get("sampler_index") == name:  # another one is their program's default, and ignored there as well
        left.pop("sampler_index", None)
    if name is not None:
        settings |= read_sampler(name)
    if (spacing := left.pop("scheduler", None)) is not None and str(spacing).lower() != "automatic":
        settings["spacing"] = spacing


def _read_pictures(context: Context, given: dict[str, Any]) -> dict[str, Any]:
    """The pictures of img2img, kept as uploads; raises ApiError, BadData."""
    pictures, mask = given.pop("init_images", None), given.pop("mask", None)
    if not isinstance(pictures, list) or len(pictures) != 1:
        fail(422, "init_images must be one picture in base64")
    if given.pop("resize_mode", 0) not in (0, 1):
        fail(422, "resize_mode can only be 0 or 1, which crops")
    settings = {"init": context.uploads.keep(_base64("init_images", pictures[0]), "init_images")}
    if (strength := given.pop("denoising_strength", None)) is not None:
        settings["strength"] = strength
    invert, blur = given.pop("inpainting_mask_invert", 0) or 0, given.pop("mask_blur", 0) or 0
    if invert not in (0, 1):
        fail(422, "inpainting_mask_invert must be 0 or 1")
    if mask is not None:
        if isinstance(blur, bool) or not isinstance(blur, (int, float)) or not 0 <= blur <= MAX_BLUR:
            fail(422, f"mask_blur must be a number from 0 to {MAX_BLUR}")
        image, file = open_picture(_base64("mask", mask), "mask").convert("L"), io.BytesIO()
        image = image.point([255 - v for v in range(256)]) if invert else image
        image.filter(ImageFilter.GaussianBlur(blur)).convert("RGB").save(file, "PNG")
        settings["mask"] = context.uploads.keep(file.getvalue())
    return settings


async def _result(context: Context, job: Job, echo: dict[str, Any], ignored: list[str], send: bool) -> dict[str, Any]:
    images: list[str] = []
    texts: list[str] = []
    for p in job.pictures:
        path = context.gallery.path(p["id"]) or fail(404, "the picture was deleted meanwhile")
        picture = await asyncio.to_thread(Picture.open, path)
        images.append(base64.b64encode(await asyncio.to_thread(picture.encode)).decode())
        texts.append(picture.parameters())
    r, seeds = job.request, [p["seed"] for p in job.pictures]
    width, height = finished({**r, "hires": None}, context.facts(job.model))  # theirs is that before hires, too
    info = {
        "prompt": r["prompt"], "all_prompts": [r["prompt"]] * len(images), "negative_prompt": r["negative"],
        "all_negative_prompts": [r["negative"]] * len(images), "seed": r["seed"], "all_seeds": seeds,
        "width": width, "height": height, "sampler_name": r["sampler"], "cfg_scale": r["guidance"],
        "steps": r["steps"], "batch_size": r["n"], "restore_faces": False, "sd_model_name": job.model,
        "sd_model_hash": context.facts(job.model).hash[:10], "infotexts": texts, "ignored": ignored,
        "warnings": job.warnings, "interrupted": job.state == "cancelled", "job_id": job.id,
    }  # fmt: skip
    return {"images": images if send else [], "parameters": echo, "info": json.dumps(info)}


def _progress(job: Job | None, now: dict[str, Any], image: str | None) -> dict[str, Any]:
    share = 0.0 if job is None else now["step"] / max(1, now["steps"])
    return {
        "progress": share,
        "eta_relative": now.get("seconds_left") or 0.0,
        "state": {
            "skipped": False, "interrupted": now.get("cancelling", False), "stopping_generation": False,
            "job": "" if job is None else job.id, "job_count": 0 if job is None else job.request["n"], "job_no": 0,
            "job_timestamp": now.get("created") or "0", "sampling_step": now.get("step", 0),
            "sampling_steps": now.get("steps", 0),
        },
        "current_image": image,
        "textinfo": "waiting" if now.get("state") == "queued" else None,
    }  # fmt: skip


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
        fail(422, "batch_size and n_iter must be whole numbers from 1 to 1000")
    return value


def _base64(what: str, text: Any) -> bytes:
    if not isinstance(text, str):
        fail(422, f"{what} must be base64 text")
    try:
        text = text.partition(",")[2] if text.startswith("data:") else text
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        fail(422, f"{what} is not base64")


def _body(*required: str) -> tuple[str, dict[str, Any]]:
    properties = {name: {} for name in (*SAME, "seed", "batch_size", "n_iter", "sampler_name", "scheduler", *required)}
    return "application/json", {"type": "object", "properties": properties, "required": list(required)}
