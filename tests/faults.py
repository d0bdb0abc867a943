"""Folders of captioned pictures, and how they go bad."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image


def write_pictures(root: Path, count: int, size: tuple[int, int] = (20, 20)) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (i, 2 * i % 256, 3 * i % 256)).save(root / f"{i:03}.png")
        (root / f"{i:03}.txt").write_text(f"picture number {i}")
    return root


def spoil(root: Path, i: int) -> None:
    """Spoil picture i in one of ten ways."""
    picture, text = root / f"{i:03}.png", root / f"{i:03}.txt"
    bomb = picture.read_bytes()[:16] + struct.pack(">II", 20_000, 20_000) + b"\x08\x02\0\0\0"
    bomb += struct.pack(">I", zlib.crc32(bomb[12:])) + picture.read_bytes()[33:]  # a new size in the header
    [
        lambda: picture.write_bytes(picture.read_bytes()[:40]),
        lambda: picture.write_text("<html>404 not found</html>"),
        lambda: picture.write_bytes(bomb),
        lambda: picture.write_bytes(b""),
        lambda: text.write_text(""),
        lambda: text.write_bytes(b"x" * 1_000_000),
        lambda: text.write_bytes(b"a\0b"),
        lambda: text.write_bytes(b"\xed\xa0\x80"),  # a lone surrogate
        lambda: text.unlink(),
        lambda: picture.unlink(),
    ][i // 20 % 10]()
