"""AUTOMATIC1111's dialect, as tools send it."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image
from serving import Serve, Server, until

API = "/sdapi/v1"
WHOLE: dict[str, Any] = {  # what a tool sends that fills in every default
    "prompt": "a red apple", "negative_prompt": "rain", "styles": [], "seed": 7, "subseed": -1, "subseed_strength": 0,
    "seed_resize_from_h": -1, "seed_resize_from_w": -1, "sampler_name": "DPM++ 2M Karras", "scheduler": "Automatic",
    "batch_size": 2, "n_iter": 1, "steps": 3, "cfg_scale": 4, "width": 16, "height": 16, "restore_faces": False,
    "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False, "eta": None, "denoising_strength": None,
    "s_min_uncond": None, "s_churn": None, "override_settings": {}, "enable_hr": False, "hr_scale": 2,
    "sampler_index": "Euler", "script_args": [], "send_images": True, "save_images": False, "alwayson_scripts": {},
}  # fmt: skip


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_txt2img_understands_what_tools_send(shared: Server) -> None:
    answer = shared.http.post(f"{API}/txt2img", json=WHOLE).json()
    assert [picture(i).size for i in answer["images"]] == [(16, 16)] * 2
    info = json.loads(answer["info"])
    assert (info["seed"], info["all_seeds"], info["sampler_name"], info["cfg_scale"]) == (7, [7, 8], "dpmpp-2m", 4.0)
    assert "Schedule type: Karras" in info["infotexts"][0]
    assert {"hr_scale", "script_args", "sampler_index"} <= set(info["ignored"])
    assert answer["parameters"]["prompt"] == "a red apple"

    told = shared.http.post(f"{API}/png-info", json={"image": answer["images"][1]}).json()
    assert told["info"] == info["infotexts"][1]
    assert told["parameters"]["seed"] == 8
    assert told["parameters"]["negative"] == "rain"


def test_lists(shared: Server) -> None:
    names = [s["name"] for s in shared.http.get(f"{API}/samplers").json()]
    assert "dpmpp-2m" in names
    assert any(s["name"] == "karras" for s in shared.http.get(f"{API}/schedulers").json())
    (model,) = shared.http.get(f"{API}/sd-models").json()
    assert "/" not in model["filename"]
    override = {"override_settings": {"sd_model_checkpoint": model["title"]}}
    assert shared.http.post(f"{API}/txt2img", json={"prompt": "a", "steps": 1, **override}).status_code == 200
    assert shared.http.get(f"{API}/options").json()["sd_model_checkpoint"] == model["model_name"]
    for name in ("loras", "upscalers", "embeddings", "sd-vae", "cmd-flags"):
        assert shared.http.get(f"{API}/{name}").status_code == 200, "tools ask for it when they connect"
    for wrong in ({"sd_model_checkpoint": "other"}, {"samples_format": "jpg"}, {"sd_model_checkpoint": 3}):
        assert shared.http.post(f"{API}/options", json=wrong).status_code == 422


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"restore_faces": True}, "restore_faces is not there"),
        ({"enable_hr": 1}, "enable_hr must be true or false"),
        ({"alwayson_scripts": {"controlnet": {}}}, "alwayson_scripts is not there"),
        ({"sampler_name": "best"}, "unknown sampler 'best'"),
        ({"cfg_scale": "4"}, "cfg_scale must be a number"),
        ({"negative_prompt": [1]}, "negative_prompt must be text, not [1]"),
        ({"batch_size": 101}, "batch_size × n_iter must be a whole number from 1 to 100"),
        ({"scheduler": "best"}, "unknown scheduler 'best'"),
        ({"width": 17}, "the nearest is"),
        ({"prompt": " "}, "prompt is empty"),
        ({"batch_size": 0}, "batch_size"),
        ({"send_images": "no"}, "send_images must be true or false"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "override_settings"),
        ({"override_settings": ["a"]}, "override_settings"),
    ],
)
def test_what_cannot_be_served_is_an_error_in_their_form(
    shared: Server, settings: dict[str, Any], message: str
) -> None:
    answer = shared.http.post(f"{API}/txt2img", json={**WHOLE, **settings})
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert answer.json()["error"] == "bad_request"


def test_pictures_are_taken_in_lines_and_refused_by_their_names(shared: Server) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(file, "PNG")
    body = {"prompt": "a", "steps": 1, "init_images": [base64.encodebytes(file.getvalue()).decode()]}
    assert shared.http.post(f"{API}/img2img", json=body).status_code == 200
    gif = base64.b64encode(b"GIF89a").decode()
    for wrong, message in (
        ({"init_images": [gif]}, "init_images: not a whole PNG"),
        ({"mask": gif}, "mask: not a whole PNG"),
        ({"inpainting_mask_invert": "no"}, "inpainting_mask_invert must be 0 or 1"),
    ):
        answer = shared.http.post(f"{API}/img2img", json={**body, **wrong})
        assert answer.status_code == 422
        assert message in answer.json()["detail"]


def test_progress_and_interrupt_are_of_the_callers_own_job_and_options_of_his_model(
    serve: Serve, make_tiny_file: Callable[[int], Path]
) -> None:
    server = serve("engines:sleepy", "--batch", "4", "--model", str(make_tiny_file(1)))
    answers: dict[str, httpx.Response] = {}

    def make(name: str, steps: int) -> None:
        settings = {"prompt": "a red apple", "steps": steps}
        answers[name] = httpx.post(
            f"{server.url}{API}/txt2img", json=settings, headers={"X-Client-Id": name}, timeout=60
        )

    def progress(name: str) -> dict[str, Any]:
        return httpx.get(f"{server.url}{API}/progress", headers={"X-Client-Id": name}).json()

    threads = [threading.Thread(target=make, args=("one", 150)), threading.Thread(target=make, args=("two", 20))]
    for thread in threads:
        thread.start()
    until(lambda: progress("one")["progress"] > 0 and progress("two")["progress"] > 0)
    seen = until(lambda: (p := progress("one"))["current_image"] and p)
    assert picture(seen["current_image"]).size == (16, 16)
    assert seen["state"]["sampling_steps"] == 150
    assert progress("nobody")["progress"] == 0

    for name in ("nobody", "one"):
        assert httpx.post(f"{server.url}{API}/interrupt", headers={"X-Client-Id": name}).status_code == 200
    for thread in threads:
        thread.join(60)
    assert json.loads(answers["one"].json()["info"])["interrupted"] is True
    assert answers["one"].json()["images"] == []
    assert len(answers["two"].json()["images"]) == 1
    assert server.check_sum() == {"done": 1, "cancelled": 1, "failed": 0, "queued": 0, "running": 0}

    def options(name: str, **chosen: str) -> str:
        headers = {"X-Client-Id": name}
        if chosen:
            assert httpx.post(f"{server.url}{API}/options", headers=headers, json=chosen).status_code == 200
        return httpx.get(f"{server.url}{API}/options", headers=headers).json()["sd_model_checkpoint"]

    first, second = (m["title"] for m in server.http.get(f"{API}/sd-models").json())
    assert options("two", sd_model_checkpoint=second) == "tiny-1"
    assert options("one") == "tiny-0"
    for name in ("one", "two"):
        make(name, 1)
        assert json.loads(answers[name].json()["info"])["sd_model_name"] == options(name)
    assert options("two", sd_model_checkpoint=first) == "tiny-0"
