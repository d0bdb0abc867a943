"""Our own dialect: a job from its words to its picture, and the gallery that keeps it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from serving import START, Server

from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import load
from sfumato.pipeline.request import Request
from sfumato.server.answers import TOKEN, check_nesting
from sfumato.server.gallery import Gallery
from sfumato.server.metadata import parse_parameters

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def events_of(server: Server, id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with server.http.stream("GET", f"/jobs/{id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                yield kind, json.loads(value)


def png(image: Image.Image, **text: str) -> bytes:
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_text(key, value)
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def test_a_job_from_words_to_pictures(shared: Server, model_file: Path, tmp_path: Path) -> None:
    job = shared.submit("a red apple", seed=7, n=2, steps=12, guidance=2.0)
    assert job["steps"] == 12
    seen = list(events_of(shared, job["id"]))
    kinds = [kind for kind, _ in seen]
    assert kinds[-1] == "done"
    assert {"step", "preview"} <= set(kinds) <= {"place", "step", "preview", "done"}
    steps = [data["step"] for kind, data in seen if kind == "step"]
    assert steps == sorted(steps)
    levels = [data["level"]["sigma"] for kind, data in seen if kind == "step" and data["level"]]
    assert levels == sorted(levels, reverse=True)
    assert {data["picture"] for kind, data in seen if kind == "preview"} <= {0, 1}
    assert all(data["image"].startswith("data:image/png;base64,") for kind, data in seen if kind == "preview")

    done = seen[-1][1]
    assert done == shared.job(job["id"])
    assert [p["seed"] for p in done["pictures"]] == [7, 8]
    alone = load(model_file).generate("a red apple", seed=7, n=2, steps=12, guidance=2.0)
    for p, expected in zip(done["pictures"], alone, strict=True):
        answer = shared.http.get(p["url"])
        assert answer.headers["content-type"] == "image/png"
        (tmp_path / "p.png").write_bytes(answer.content)
        picture = Picture.open(tmp_path / "p.png")
        assert picture.request == expected.request
        assert np.abs(picture.pixels.astype(int) - expected.pixels).max() <= 1
        own = Image.open(io.BytesIO(shared.http.get(p["url"] + "?scale=1").content))
        assert np.array_equal(np.asarray(own), picture.pixels)
    assert list(events_of(shared, job["id"])) == [("done", done)]


def test_words_that_do_not_fit_are_told_in_every_dialect(shared: Server) -> None:
    long = "a red apple in the rain " * 9
    job = shared.ended(shared.submit(long, steps=1, n=2)["id"])
    (told,) = job["warnings"]
    assert re.fullmatch(r"prompt: too long for this model: its last \d+ tokens are left out", told)
    assert shared.http.get(f"/pictures/{job['id']}-1").json()["warnings"] == [told]
    assert shared.ended(shared.submit("a", steps=1)["id"])["warnings"] == []
    openai = shared.http.post("/v1/images/generations", json={"prompt": long, "steps": 1}).json()
    assert openai["warnings"] == [told]
    a1111 = shared.http.post("/sdapi/v1/txt2img", json={"prompt": long, "steps": 1}).json()
    assert json.loads(a1111["info"])["warnings"] == [told]


def test_the_documents_first_five_minutes(
    shared: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/api.md as somebody types it in, at the tiny model's size."""
    text = DOCUMENT.read_text().partition("## Rules")[0].replace("http://127.0.0.1:7860", shared.url)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "teal").save("me.jpg")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example.replace("256x256", "16x16"), DOCUMENT, "exec"), {})
    assert Image.open("fox.png").size == (16, 16)
    assert capsys.readouterr().out.splitlines()[-1].startswith("image_generation.completed")
    if not all(map(shutil.which, ("bash", "curl", "jq"))):
        pytest.skip("no bash, curl or jq")
    lines = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    script = "\n".join(["set -euo pipefail", *(line for line in lines if not line.startswith("pip install"))])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=START)
    assert done.returncode == 0, done.stderr
    assert "event: done" in done.stdout
    id = json.loads(done.stdout[done.stdout.rindex('{"id"') :])["id"]
    assert shared.ended(id)["state"] == "done"
    Image.open("fox.png").load()


def test_a_picture_that_no_network_follows_is_refused(shared: Server) -> None:
    picture = base64.b64encode(png(Image.new("RGB", (16, 16)))).decode()
    for name in ("control_image", "image_prompt"):
        answer = shared.http.post("/jobs", json={"prompt": "a", name: picture})
        assert answer.status_code == 422
        assert f"{name} has no effect" in answer.json()["error"]["message"]


def test_what_is_no_picture_is_refused_in_words_of_the_api(shared: Server) -> None:
    for value in (5, ["a"], "no base64!", ""):
        answer = shared.http.post("/jobs", json={"prompt": "a", "init": value})
        assert answer.status_code == 422
        assert "init must be a picture: the id of an upload" in answer.json()["error"]["message"]
    dot = base64.b64encode(png(Image.new("RGB", (1, 1)))).decode()
    assert re.fullmatch(r"\w{80,100}", dot), "it looks like an id, and is none"
    assert shared.submit(init=dot, steps=1)["request"]["init"]["sha256"]
    picture = f"{shared.ended(shared.submit(steps=1)['id'])['id']}-0"
    answer = shared.http.post("/inside/samplers", json={"picture": picture, "steps": [2.5]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "steps must be whole numbers")


def test_a_picture_goes_into_the_noise_at_its_own_size(shared: Server) -> None:
    """Its file is drawn larger than it is; so it is noised as its own pixels are that are sent again."""
    picture = f"{shared.ended(shared.submit(steps=1)['id'])['id']}-0"
    own = shared.http.get(f"/pictures/{picture}.png", params={"scale": 1}).content
    upload = shared.http.post("/uploads", content=own, headers={"content-type": "image/png"}).json()["id"]
    asked = ({"picture": picture}, {"picture": picture, "upload": upload})
    kept, sent = (shared.http.post("/inside/forward", json=one).text for one in asked)
    assert kept.count("noised") == 1
    assert kept == sent


def test_an_answer_may_wait_for_the_end(shared: Server) -> None:
    def wait(id: str, seconds: Any) -> httpx.Response:
        return shared.http.get(f"/jobs/{id}", params={"wait": seconds})

    assert wait(shared.submit(steps=2)["id"], 60).json()["state"] == "done"
    long = shared.submit(steps=200, n=8)["id"]
    assert wait(long, 0.01).json()["state"] in ("queued", "running")
    shared.http.delete(f"/jobs/{long}")
    assert wait(long, 60).json()["state"] == "cancelled"
    assert wait("none", 1).status_code == 404
    for wrong in (61, -1, "nan", "long"):
        assert wait(long, wrong).status_code == 422


def test_lists_of_jobs(shared: Server) -> None:
    ids = [shared.submit("a", seed=i, steps=1)["id"] for i in range(3)]
    for id in ids:
        shared.ended(id)
    page = shared.http.get("/jobs", params={"limit": 2}).json()
    assert [j["id"] for j in page["jobs"]] == ids[:0:-1]
    rest = shared.http.get("/jobs", params={"limit": 2, "before": page["next"]}).json()
    assert rest["jobs"][0]["id"] == ids[0]
    assert shared.http.get("/jobs", params={"state": "queued"}).json() == {"jobs": [], "next": None}
    for wrong in ({"state": "lost"}, {"limit": 0}, {"limit": "x"}):
        assert shared.http.get("/jobs", params=wrong).status_code == 422
    assert shared.http.get("/jobs/none").json()["error"]["code"] == "not_found"
    assert shared.http.get("/jobs/none/events").status_code == 404
    assert shared.http.delete("/jobs/none").status_code == 404
    assert shared.http.delete(f"/jobs/{ids[0]}").json()["error"]["code"] == "conflict"


def test_the_gallery_is_its_folder(shared: Server, model_file: Path) -> None:
    job = shared.ended(shared.submit("a yellow submarine", negative="hailstones", seed=41, steps=1)["id"])
    (id,) = [p["id"] for p in job["pictures"]]

    def found(**query: Any) -> list[str]:
        return [p["id"] for p in shared.http.get("/pictures", params=query).json()["pictures"]]

    for words in ("submarine", "SUBMARINE yellow", "41 hailstones", "dpmpp-2m submarine"):
        assert found(q=words) == [id]
    assert found(q="submarine green") == []
    assert id in found(model=job["model"])
    assert found(model="other") == []
    known = shared.http.get(f"/pictures/{id}").json()
    assert (known["request"]["seed"], known["width"], known["scale"]) == (41, 16, 16)

    picture = load(model_file).generate("put here by hand", seed=1, steps=1)[0]
    picture.save(shared.folder / "pictures" / "by-hand.png")
    (shared.folder / "pictures" / "foreign.png").write_bytes(b"no picture")
    assert found(q="by hand") == ["by-hand"]
    assert found()[0] == "by-hand"
    total = shared.http.get("/pictures").json()["total"]
    assert len(found(limit=1)) == 1
    assert found(limit=100, before="by-hand")[0] == found()[1]
    assert shared.http.delete("/pictures/by-hand").status_code == 204
    assert shared.http.delete("/pictures/by-hand").status_code == 404
    assert shared.http.get("/pictures/by-hand.png").status_code == 404
    assert shared.http.get("/pictures").json()["total"] == total - 1
    assert not (shared.folder / "pictures" / "by-hand.png").exists()
    (shared.folder / "pictures" / "foreign.png").unlink()


def test_what_there_is(shared: Server) -> None:
    (model,) = shared.http.get("/models").json()["models"]
    assert model["default"] is True
    assert model["defaults"]["width"] == 16
    menu = shared.http.get("/samplers").json()
    assert {"samplers", "spacings", "guidance"} == menu.keys()
    assert shared.http.get("/limits").json()["queue"] == 256
    assert shared.http.get("/livez").status_code == 200


def test_the_schema_is_the_requests(shared: Server) -> None:
    """A field of ``Request`` needs nothing here to be taken and described."""
    from dataclasses import fields

    paths = shared.http.get("/openapi.json").json()["paths"]
    for path in ("/jobs", "/v1/images/generations"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {f.name for f in fields(Request)} <= body["properties"].keys()
    everything = {k: v for k, v in Request("a", seed=1, steps=1, guidance=1.0).to_dict().items() if k != "prompt"}
    assert shared.submit("a", **everything)["request"]["steps"] == 1


A1111 = (
    "a fox, (red:1.2)\nin snow\nNegative prompt: blurry, rain\n"
    "Steps: 12, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 99, Size: 16x32, Model hash: abc, "
    'Model: other, Note: "a, b"'
)


def test_the_request_inside_a_picture_is_read(shared: Server) -> None:
    job = shared.ended(shared.submit("a red apple", seed=3, steps=1)["id"])
    data = shared.http.get(job["pictures"][0]["url"]).content

    def info(data: bytes) -> httpx.Response:
        return shared.http.post("/pictures/info", content=data, headers={"content-type": "image/png"})

    told = info(data).json()
    assert (told["source"], told["request"]["seed"], told["width"]) == ("sfumato", 3, 16)
    told = info(png(Image.new("RGB", (16, 32)), parameters=A1111)).json()
    assert told["source"] == "a1111"
    assert told["request"] == {
        "prompt": "a fox, (red:1.2)\nin snow", "negative": "blurry, rain", "steps": 12, "sampler": "dpmpp-2m",
        "spacing": "karras", "guidance": 6.5, "seed": 99, "width": 16, "height": 32,
    }  # fmt: skip
    assert told["model"] == {"name": "other", "hash": "abc"}
    assert told["ignored"]["Note"] == "a, b"
    plain = {"prompt": told["request"]["prompt"], "steps": 1}
    assert shared.http.post("/jobs", json=plain).status_code == 202
    for bad in (png(Image.new("RGB", (4, 4))), b"", b"GIF89a", data[:100], *map(recorded, BAD_RECORDS)):
        assert info(bad).status_code == 422
        sent = {"image": base64.b64encode(bad).decode()}
        assert shared.http.post("/sdapi/v1/png-info", json=sent).status_code < 500


def recorded(record: str) -> bytes:
    return png(Image.new("RGB", (4, 4)), sfumato=record)


MODEL = '"model": {"name": "a", "hash": "b"}'
BAD_RECORDS = (
    "{}",
    "[1]",
    f'{{"request": {{"prompt": "a"}}, "scale": 1e999, {MODEL}}}',
    f'{{"request": ["prompt"], "scale": 1, {MODEL}}}',
    '{"request": {"prompt": "a"}, "scale": 1, "model": []}',
)


def test_no_file_keeps_the_gallery_from_being_seen(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    none = f'{{"request": {{"prompt": "a"}}, "scale": 0, {MODEL}}}'
    for i, data in enumerate((bomb(), *map(recorded, (*BAD_RECORDS, none)))):
        (tmp_path / f"bad-{i}.png").write_bytes(data)
    for _ in range(2):  # the second time by what is known of them
        entries, total = gallery.search()
        assert (list(entries), total) == ([], 0)


def test_text_of_any_length_is_read_in_one_pass() -> None:
    """Each of these took hours where a search began anew at every character."""
    size = 1 << 20
    assert [m[0] for m in TOKEN.finditer('{"a\\"[[[')] == ["{", '"a\\"[[[']
    assert check_nesting('{"prompt": "' + '\\"' * (size // 2))
    for line in ("a" * size, "x" + " " * size + "x", 'a:"' + '\\"' * (size // 2)):
        assert parse_parameters(line)[0]["prompt"] == line


def bomb() -> bytes:
    """A PNG of 60,000 × 60,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (60_000).to_bytes(4, "big")
    head = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def test_uploads(shared: Server) -> None:
    def send(data: bytes, kind: str = "image/png") -> httpx.Response:
        return shared.http.post("/uploads", content=data, headers={"content-type": kind})

    image = Image.effect_noise((20, 10), 50).convert("RGB")
    first = send(png(image)).json()
    assert (first["width"], first["height"]) == (20, 10)
    assert send(png(image, note="other bytes, same picture")).json() == first
    back = Image.open(io.BytesIO(shared.http.get(f"/uploads/{first['id']}.png").content))
    assert np.array_equal(np.asarray(back), np.asarray(image))

    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(turned, "JPEG", exif=exif)
    assert (send(turned.getvalue(), "image/jpeg").json()["width"], first["width"]) == (10, 20)

    film = io.BytesIO()
    image.save(film, "WEBP", save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)])
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
    for bad in (b"", b"text", svg, bomb(), png(image)[:-30], film.getvalue()):
        answer = send(bad)
        assert answer.status_code == 422, bad[:20]
        assert answer.json()["error"]["code"] == "bad_request"
    assert shared.http.get("/uploads/none.png").status_code == 404
    for path in ("/uploads", "/pictures/info"):
        form = shared.http.post(path, files={"file": png(image)})
        assert form.status_code == 415
        assert "the picture's file itself" in form.json()["error"]["message"]


def test_the_page_of_the_api(shared: Server) -> None:
    text = shared.http.get("/docs").text
    for path in shared.http.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in text
    assert "steps from noise to picture" in text
    assert "//" not in text.replace("<!doctype html>", ""), "a third party"
    assert "<script" not in text
    assert shared.http.get("/docs/style.css").headers["content-type"].startswith("text/css")
