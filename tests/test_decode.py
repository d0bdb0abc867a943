"""Every colour mode and orientation comes out right; what is no picture is refused with its reason."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from sfumato.decode import ORIENTATION, PictureError, decode, decode_and_tell, fit, to_array

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noisy(w: int = 40, h: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(w: int, h: int) -> bytes:
    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def test_rgb_is_unchanged() -> None:
    assert decode(encode(noisy())).tobytes() == noisy().tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "HSV", "YCbCr", "CMYK"])
@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG", "GIF", "WEBP"])
def test_colour_modes_keep_white_and_black(mode: str, kind: str) -> None:
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 16, 32))
    try:
        data = encode(image.convert(mode), kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no {mode}")
    pixels = np.asarray(decode(data)).astype(int)
    assert pixels.shape == (32, 32, 3)
    assert pixels[:, :12].max() < 12
    assert pixels[:, 20:].min() > 243


def test_lab_red() -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), RED), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert np.abs(np.asarray(decode(encode(lab, "TIFF"))).astype(int) - RED).max() < 8


@pytest.mark.parametrize(("value", "want"), [(0, 0), (257 * 100, 100), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits(value: int, want: int, kind: str) -> None:
    image = Image.fromarray(np.full((4, 4), value, np.uint16))
    assert decode(encode(image, kind)).getpixel((1, 1)) == (want,) * 3


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats(top: float) -> None:
    image = Image.fromarray(np.array([[0, top / 2, top]], np.float32))
    assert np.asarray(decode(encode(image, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_whole_numbers_up_to_one_are_dark() -> None:
    pixels = np.asarray(decode(b"P5 2 1 65535\n\x00\x00\x00\x01"))
    assert pixels.max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_shows_the_background(mode: str) -> None:
    image = Image.new("LA" if mode == "LA" else "RGBA", (4, 4), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    data = encode(
        image.convert(mode), "TIFF" if mode == "PA" else "PNG", **({"transparency": 0} if mode == "P" else {})
    )
    assert decode(data).getpixel((0, 0)) == WHITE
    assert decode(data, "#0000ff").getpixel((0, 0)) == BLUE


def test_half_transparent_black_is_grey() -> None:
    assert decode(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 127)))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste(RED, (0, 0, 16, 16))  # red at the top left
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # Pillow's transpose that the orientation takes back
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(stored, "PNG", exif=exif))
    assert image.tobytes() == upright.tobytes()


def test_animated_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert decode(data).getpixel((4, 4)) == RED


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b'{"error": 404}', "JSON"),
        (b"%PDF-1.7", "PDF"),
        (bytes(1000), "zero"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known kind"),
        (png_of_size(60_000, 60_000), "million pixels"),
        (png_of_size(12_000, 9_000), "million pixels"),
        (png_of_size(0, 5), "damaged|known kind|no pixels"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(PictureError, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncation_is_noticed(kind: str) -> None:
    data = encode(noisy(200, 200), kind)
    for share in (0.02, 0.3, 0.7, 0.95):
        with pytest.raises(PictureError):
            decode(data[: int(len(data) * share)])


def test_flipped_bytes_raise_nothing_but_picture_errors() -> None:
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = np.frombuffer(encode(noisy(), kind), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
            with suppress(PictureError):
                assert decode(data.tobytes()).mode == "RGB"


def test_fit_to_the_same_size_changes_nothing() -> None:
    for crop in ("center", "random", "pad"):
        assert fit(noisy(16, 16), 16, crop).tobytes() == noisy(16, 16).tobytes()


def test_center_crop_takes_the_middle() -> None:
    image = Image.new("RGB", (60, 20), WHITE)
    image.paste(RED, (20, 0, 40, 20))
    assert fit(image, 10, "center").getcolors() == [(100, RED)]


def test_pad_frames_without_enlarging() -> None:
    image = fit(Image.new("RGB", (28, 28), WHITE), 32, "pad", "black")
    pixels = np.asarray(image)[..., 0]
    assert (pixels[2:30, 2:30] == 255).all()
    assert pixels.sum() == 255 * 28 * 28
    assert fit(Image.new("RGB", (100, 50), RED), 32, "pad").getpixel((0, 0)) == WHITE
    assert fit(Image.new("RGB", (100, 50), RED), 32, "pad").getpixel((16, 16)) == RED


def test_random_leaves_the_longer_side_for_later() -> None:
    assert fit(noisy(90, 30), 16, "random").size == (48, 16)
    assert fit(noisy(30, 90), 16, "random").size == (16, 48)


def test_a_line_is_no_picture() -> None:
    with pytest.raises(PictureError, match="narrow"):
        fit(Image.new("RGB", (1000, 2)), 16, "center")


def test_arrays_are_channels_first() -> None:
    assert to_array(noisy(5, 7)).shape == (3, 7, 5)
    assert to_array(Image.new("RGB", (5, 7), (9, 9, 9)), 1).tolist() == np.full((1, 7, 5), 9).tolist()


def test_what_was_done_to_a_picture_is_told() -> None:
    turned, clear = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (8, 4), "red").save(turned, "JPEG", exif=exif)
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(clear, "PNG")
    image, told = decode_and_tell(turned.getvalue())
    assert (image.size, told) == ((4, 8), ("turned upright as its EXIF says",))
    image, told = decode_and_tell(clear.getvalue())
    assert (image.getpixel((0, 0)), told) == ((255, 255, 255), ("transparency laid on white",))
