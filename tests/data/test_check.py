"""``sfumato data``: what it counts, what it prints, and how it refuses."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three different pictures, one copied, one packed anew, one broken."""
    root = tmp_path / "data"
    root.mkdir()
    for i, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (20 + i, 20), colour).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a {colour} square")
    (root / "copy.png").write_bytes((root / "0.png").read_bytes())
    (root / "copy.txt").write_text("a red square")
    Image.open(root / "1.png").save(root / "again.bmp")
    (root / "again.txt").write_text("a green square, again")
    (root / "broken.png").write_bytes((root / "2.png").read_bytes()[:50])
    (root / "broken.txt").write_text("a broken\x1b[31m square")
    return root


def test_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(folder), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["total"], found["ok"]) == (6, 5)
    assert [b["file"] for b in found["bad"]] == ["broken.png"]
    assert found["duplicates"] == {"same_file": [["0.png", "copy.png"]], "same_pixels": [["1.png", "again.bmp"]]}
    assert found["sizes"]["width"] == {"min": 20, "median": 21, "max": 22}
    assert found["sizes"]["square"] == 2
    assert (found["captions"]["count"], found["captions"]["different"]) == (5, 4)
    assert found["captions"]["words"] == {"min": 3, "median": 3.0, "max": 4}
    assert found["captions"]["commonest_words"][:2] == [["a", 5], ["square", 5]]


def test_what_is_too_long_is_bad_wherever_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(202):  # every second goes on the sheet
        Image.new("RGB", (200, 2) if i == 201 else (4, 4)).save(tmp_path / f"{i:03}.png")
        (tmp_path / f"{i:03}.txt").write_text("a square")
    assert main(["data", "check", str(tmp_path), "--json"]) == 4
    assert [b["file"] for b in json.loads(capsys.readouterr().out)["bad"]] == ["201.png"]


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "evil\x1b[2J.png").write_bytes(b"<html>")
    (folder / "evil\x1b[2J.txt").write_text("words")
    assert main(["data", "check", str(folder)]) == 4
    out = capsys.readouterr().out
    assert "7: 5 good, 2 bad" in out
    assert "broken.png: damaged" in out
    assert "\x1b" not in out


def test_words_that_cannot_be_read_are_bad_however_many_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "p"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "a.png")
    assert main(["data", "check", str(root)]) == 0  # a folder of pictures alone
    assert "captions      none" in capsys.readouterr().out
    (root / "a.txt").write_bytes(b"caf\xe9")
    assert main(["data", "check", str(root)]) == 4
    assert "a.txt is not UTF-8 text" in capsys.readouterr().out
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for file in root.iterdir():
            tar.add(file, file.name)
    assert main(["data", "check", str(tmp_path / "p.tar")]) == 4


def test_all_well_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "sample", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == 324
    assert found["duplicates"] == {"same_file": [], "same_pixels": []}
    assert found["columns"]["licence"] == {"Apache-2.0": 162, "MIT": 162}


def test_contact_sheet(folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    main(["data", "check", str(folder), "--sheet", str(sheet)])
    image = np.asarray(Image.open(io.BytesIO(sheet.read_bytes())))
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (image == colour).all(-1).sum() >= 400
    before = sheet.read_bytes()
    assert main(["data", "check", str(folder), "--sheet", str(sheet)]) == 2
    assert sheet.read_bytes() == before
    assert main(["data", "check", str(folder), "--sheet", str(sheet), "--force"]) == 4


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["check"], 2, "PATH"),
        (["check", "nowhere/at/all"], 4, "no data at"),
        (["check", "sample", "--captions", "plian"], 4, "did you mean 'plain'"),
        (["check", "sample", "--sheet", "x.jpg"], 2, "must end in .png"),
        (["check", "sample", "--sheet", "/dev/null/x.png"], 2, "cannot write"),
        (["chekc", "sample"], 2, "chekc"),
        (["prepare", "nowhere.yaml", "--out", "x"], 4, "nowhere.yaml"),
        (["prepare", "recipes/emoji.yaml"], 2, "--out"),
        (["prepare", "recipes/emoji.yaml", "--out", "x", "--workers", "0"], 2, "workers"),
        ([], 2, "COMMAND"),
    ],
)
def test_refusals(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *argv]) == code
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
