"""A picture's file: its request inside, written whole or not at all, read with suspicion."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sfumato.errors import BadData, BadRequest, NoResources
from sfumato.pipeline.picture import Picture, check_readable, enlarge, grid, is_png, read, sheet
from sfumato.pipeline.request import Request

REQUEST = Request(
    'a "red" fox, 🦊\nin the snow',
    seed=3,
    steps=4,
    sampler="dpmpp-2m",
    spacing="karras",
    guidance=2.5,
    width=8,
    height=6,
)


def picture(seed: int = 3) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Picture(pixels, replace(REQUEST, seed=seed), "tiny", "ab" * 32, {"torch": "2.13.0", "threads": 2})


def test_warnings_stay_with_the_picture(tmp_path: Path) -> None:
    told = replace(picture(), warnings=("prompt: too long for this model: its last 3 tokens are left out",))
    path = told.save(tmp_path / "fox.png")
    assert Picture.open(path).warnings == told.warnings
    assert Picture.open(picture().save(tmp_path / "plain.png")).warnings == ()
    path.write_bytes(path.read_bytes().replace(b'"warnings": ["', b'"warnings": {"'))
    with pytest.raises(BadData):
        read(path)


@pytest.mark.parametrize("scale", [1, 5])
def test_what_is_saved_is_read_again(tmp_path: Path, scale: int) -> None:
    path = picture().save(tmp_path / "fox.png", scale=scale)
    again = Picture.open(path)
    assert np.array_equal(again.pixels, picture().pixels)
    assert (again.request, again.model, again.model_hash, again.made_with) == (
        REQUEST, "tiny", "ab" * 32, {"torch": "2.13.0", "threads": 2},
    )  # fmt: skip
    assert Image.open(path).size == (8 * scale, 6 * scale)
    assert is_png(path)
    assert again.encode(scale) == path.read_bytes()


def test_other_tools_find_their_line(tmp_path: Path) -> None:
    p = replace(picture(), request=replace(REQUEST, negative="rain"))
    text = Image.open(p.save(tmp_path / "fox.png")).text["parameters"]  # type: ignore[attr-defined]
    assert text.startswith(
        f"{REQUEST.prompt}\nNegative prompt: rain\nSteps: 4, Sampler: DPM++ 2M, Schedule type: Karras,"
    )
    assert "CFG scale: 2.5, Seed: 3, Size: 8x6, Model hash: abababab" in text


def test_a_files_pixels_are_counted_before_they_are_drawn() -> None:
    """What is saved must be readable again."""
    whole = replace(REQUEST, width=512, height=512, upscale=4, n=1)
    check_readable(whole, 8)
    check_readable(replace(whole, n=30), 8, together=True)  # 6 × 5 of 2048²
    for one, how in (
        (replace(whole, n=36), {"together": True}),
        (whole, {"scale": 6}),
        (replace(whole, hires=6.0), {}),
    ):
        with pytest.raises(BadRequest, match="read again"):
            check_readable(one, 8, **how)


def test_a_notebook_shows_it_large() -> None:
    shown = Image.open(io.BytesIO(picture()._repr_png_()))
    assert shown.width >= 256
    assert picture().image.size == (8, 6)


def test_files_are_replaced_only_when_asked(tmp_path: Path) -> None:
    path = picture(1).save(tmp_path / "fox.png")
    with pytest.raises(BadRequest, match="exists already"):
        picture(2).save(path, overwrite=False)
    assert Picture.open(path).request.seed == 1
    picture(2).save(path)
    assert Picture.open(path).request.seed == 2
    assert [p.name for p in tmp_path.iterdir()] == ["fox.png"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(1).save(tmp_path / "fox.png")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoResources, match="No space left"):
        picture(2).save(path)
    with pytest.raises(NoResources):
        picture(2).save(tmp_path / "new.png", overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["fox.png"]
    assert Picture.open(path).request.seed == 1


def test_a_path_that_cannot_be_written_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = ("file/fox.png", "missing/fox.png", "x" * 300, "fox.jpg", "fox.WEBP")
    for path in (tmp_path / place for place in places):
        with pytest.raises(BadRequest, match="cannot write"):
            picture().save(path)


def test_a_grid_is_one_request(tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in (3, 4, 5)]
    page = grid(pictures)
    assert page.pixels.shape == (12, 16, 3)
    assert (page.request.n, page.request.seed) == (3, 3)
    assert np.array_equal(page.pixels[6:, :8], pictures[2].pixels)
    assert (page.pixels[6:, 8:] == 255).all()
    assert np.array_equal(Picture.open(page.save(tmp_path / "page.png", scale=2)).pixels, page.pixels)
    for wrong in ([], [picture(3), picture(5)], [picture(3), replace(picture(4), model_hash="cd" * 32)]):
        with pytest.raises(BadRequest):
            grid(wrong)
    assert sheet([np.zeros((2, 2, 3), np.uint8)] * 10).shape == (6, 8, 3)


@pytest.mark.parametrize("scale", [0, -1, 65, True, 2.0])
def test_a_bad_scale_is_refused(scale: int) -> None:
    with pytest.raises(BadRequest, match="scale"):
        enlarge(picture().pixels, scale)


def test_changed_pixels_are_noticed(tmp_path: Path) -> None:
    path = picture().save(tmp_path / "fox.png", scale=3)
    stored = read(path)
    changed = stored.pixels.copy()
    changed[1, 1] ^= 1  # none of the picture's own pixels
    info = PngImagePlugin.PngInfo()
    info.add_text("sfumato", Image.open(path).text["sfumato"])  # type: ignore[attr-defined]
    Image.fromarray(changed).save(path, pnginfo=info)
    with pytest.raises(BadData, match="changed after it was made"):
        Picture.open(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def with_record(text: str, mode: str = "RGB") -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("sfumato", text)
    file = io.BytesIO()
    Image.new(mode, (8, 6)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


RECORD = {
    "format": 1, "request": REQUEST.to_dict(), "model": {"name": "m", "hash": "h"}, "made_with": {}, "scale": 1,
}  # fmt: skip


def test_the_record_used_below_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(with_record(json.dumps(RECORD)))
    assert Picture.open(tmp_path / "a.png").request == REQUEST


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "web page": b"<!DOCTYPE html><html></html>",
    "jpeg": b"\xff\xd8\xff\xe0" + bytes(100),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "signature only": b"\x89PNG\r\n\x1a\n",
    "bomb of size": png(100_000, 100_000, bytes(1000)),
    "bomb of zeros": png(6_000, 6_000, bytes(6_000 * 18_001)),
    "bomb of text": png(8, 6, bytes(25 * 6), chunk(b"zTXt", b"sfumato\0\0" + zlib.compress(bytes(50 << 20)))),
    "no data": png(8, 6),
    "zero size": png(0, 0),
    "cut": picture().encode(4)[:-30],
    "flipped": (lambda d: d[:-40] + bytes([d[-40] ^ 255]) + d[-39:])(picture().encode(4)),
    "no request": png(8, 6, bytes(25 * 6)),
    "grey": with_record(json.dumps(RECORD), "L"),
    "palette": with_record(json.dumps(RECORD), "P"),
    "no json": with_record("{"),
    "deep json": with_record("[" * 100_000),
    "json list": with_record("[]"),
    "other format": with_record(json.dumps(RECORD | {"format": 2})),
    "no model": with_record(json.dumps({k: v for k, v in RECORD.items() if k != "model"})),
    "model is text": with_record(json.dumps(RECORD | {"model": "m"})),
    "hash is a number": with_record(json.dumps(RECORD | {"model": {"name": "m", "hash": 3}})),
    "scale zero": with_record(json.dumps(RECORD | {"scale": 0})),
    "scale huge": with_record(json.dumps(RECORD | {"scale": 10**9})),
    "scale does not divide": with_record(json.dumps(RECORD | {"scale": 4})),
    "request is text": with_record(json.dumps(RECORD | {"request": "prompt"})),
    "unknown setting": with_record(json.dumps(RECORD | {"request": {"prompt": "a", "run": "x"}})),
    "bad steps": with_record(json.dumps(RECORD | {"request": {"prompt": "a", "steps": 10**9}})),
    "made with a list": with_record(json.dumps(RECORD | {"made_with": {"torch": []}})),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(BadData) as caught:
        Picture.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_things_than_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(BadData):
            Picture.open(path)
