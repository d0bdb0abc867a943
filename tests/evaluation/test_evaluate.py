"""``sfumato evaluate`` as it is called."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shapes import drawings, needs_weights

from sfumato.cli import main

pytestmark = needs_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, rows = drawings(copies=2)
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
        files.append(file.getvalue())
    path = tmp_path_factory.mktemp("data") / "shapes.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": f, **r} for f, r in zip(files, rows, strict=True)]), path)
    return path


def test_a_model(data: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "evaluate",
        str(tiny_file),
        "--data",
        str(data),
        "--n",
        "12",
        "--steps",
        "1",
        "--seed",
        "7",
        "--cache",
        str(tmp_path),
    ]
    argv += ["--metrics", "kid,pr,nearest", "--json", str(tmp_path / "f.json"), "--grid", str(tmp_path / "g.png")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "KID" in out
    assert "real pictures" in out
    assert "seed 7" in out
    assert "steps 1" in out
    first = (tmp_path / "f.json").read_bytes()
    figures = json.loads(first)["figures"]
    assert {f["metric"] for f in figures} == {"KID", "precision", "recall", "too near"}
    assert all(f["seed"] == 7 and f["n"] == 12 for f in figures)
    assert Image.open(tmp_path / "g.png").width == 4 * (3 * 64 + 4) - 4
    assert main(argv) == 2  # before any work, and nothing is replaced
    assert "f.json exists already; --force replaces it" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0  # all from the cache
    assert (tmp_path / "f.json").read_bytes() == first


def test_real_pictures(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "--real", "--data", str(data), "--size", "16", "--n", "12", "--metrics", "fd,lpips"]
    assert main([*argv, "--cache", str(tmp_path), "--exclude", "style=dark"]) == 0
    captured = capsys.readouterr()
    assert "FD-lite0" in captured.out
    assert "LPIPS, another thing" in captured.out
    assert "60 more left out" in captured.err


@pytest.mark.parametrize("setting", [("--seed", "3"), ("--steps", "5"), ("--guidance", "2"), ("--sampler", "ddim")])
def test_settings_of_pictures_made_do_not_go_with_real_ones(
    setting: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--real", "--data", "sample", *setting]) == 2
    assert f"leave out {setting[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data"),
        (["--data", "sample", "--n", "2"], "n must be at least 10"),
        (["--data", "sample", "--metrics", "fid"], "--inception"),
        (["--data", "sample", "--metrics", "fdd"], "did you mean 'fd'"),
        (["--data", "sample", "--where", "style"], "COLUMN=VALUE"),
        (["--data", "sample", "--size", "4"], "--size must lie"),
        (["--data", "sample", "--steps", "0"], "steps must be a whole number"),
        (["--data", "sample", "--sampler", "ddmi"], "unknown sampler"),
        (["--data", "sample", "--json", "/no/such/folder/f.json"], "no folder"),
        (["--data", "sample", "--json", "f.txt"], "must end in .json"),
        (["--data", "sample", "--grid", "g.jpg"], "must end in .png"),
        (["--data", "sample", "--inception", "i.pth"], "--inception is for the metric fid"),
        (["--data", "sample", "--where", "style=noto", "--where", "style=blob"], "--where names style twice"),
        (["--data", "sample", "--real"], "leave out the model"),
        (["--data", "sample", "--stepz", "3"], "unrecognized arguments"),
    ],
)
def test_bad_requests(argv: list[str], message: str, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["evaluate", *([] if not argv else [str(tiny_file)]), *argv])
    captured = capsys.readouterr()
    assert code in (2, 5)
    assert message in captured.err
    assert captured.err.strip().count("\n") <= 2  # what was found in the data, and one line
    assert captured.out == ""
