"""`sfumato explain`: one file, of real values, that asks nobody for anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.families.model import Model
from sfumato.inside.plot import BOTTOM, H, Series, axis, chart
from sfumato.inside.report import lit, report
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.pipeline import Pipeline, load

PROMPT = '<script>alert(1)</script> a "red" apple & onerror='


class Links(HTMLParser):
    """All that a page refers to, and the tags it is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]
        assert not [k for k, _ in attrs if k.startswith("on") or k == "style"]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""


@pytest.fixture(scope="module")
def explained(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("explain")
    picture, page = folder / "apple.png", folder / "report.html"
    flags = ["--model", str(tiny_file)]
    larger = ["--upscale", "4"]  # as the embedded model's pictures are
    assert main(["generate", PROMPT, "--seed", "3", "--steps", "3", "--out", str(picture), *larger, *flags]) == 0
    assert main(["explain", str(picture), "--out", str(page), "--steps", "3,6", *flags]) == 0
    assert main(["explain", str(picture), "--out", str(page), "--steps", "3,6", *flags]) == 2, "it exists already"
    return page.read_text()


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_of_the_prompt(explained: str) -> None:
    page = Links(explained)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.tags.count("script") == 1, "its own; none of the prompt's"
    assert "&lt;script&gt;alert(1)" in explained
    assert "default-src 'none'" in page.policy
    assert "unsafe" not in page.policy


def test_the_page_shows_every_part_with_the_models_values(explained: str) -> None:
    assert "equal in every pixel" in explained
    assert "not equal" not in explained
    assert explained.count("<figure data-frame") == 4, "three steps and the end"
    for head in ("Its path", "Where each word looked", "What guidance does", "Samplers side by side", "The schedule"):
        assert f"<h2>{head}" in explained
    assert "the words of the first prompt" not in explained
    assert "the first 6 words" in explained, "others have no curve"
    heads = re.findall(r'<th scope="col">(\d+): σ', explained)
    assert heads == ["0", "1", "2"], "each step once, the last among them"
    words = re.search(r"<table>.*?</table>", explained, re.S)
    assert words is not None
    shares = [float(v) for v in re.findall(r"<figcaption>([\d.]+)%", words[0])]
    rows = words[0].count('<th scope="row">')
    steps = len(shares) // rows
    for step in range(steps):
        assert sum(shares[step::steps]) == pytest.approx(100, abs=0.05 * rows + 0.01)


def test_the_page_tells_what_was_asked_for_zeros_too_and_nothing_else(tiny: Model) -> None:
    start = PictureFile.of("init", Image.new("RGB", (16, 16), "red"))
    settings = {"init": replace(start, name="red.png"), "strength": 0.5, "mix": 0.0}
    (picture,) = Pipeline(tiny).generate("apple", prompt_to="pear", seed=0, steps=2, guidance=0.0, **settings)
    page = report(Pipeline(tiny), picture, picture.pixels, samplers=["euler"], steps=[2], weights=[1])
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert (facts["seed"], facts["guidance"], facts["mix"]) == ("0", "0.0", "0.0")
    assert "the words of the first prompt" in page
    assert facts["init"] == f"red.png ({start.sha256[:12]})"
    assert not {"negative", "n", "best of", "eta", "guidance rescale", "control range"} & set(facts)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["missing.png"], 4, "no such file"),
        (["grid.png"], 2, "grid of 2"),
        (["one.png", "--out", "x.txt"], 2, "must end in .html"),
        (["one.png", "--steps", "0"], 2, "from 1 to 500"),
        (["one.png", "--noise", "notes.html"], 2, "not a picture but an SVG drawing"),
        (["one.png", "--noise", "long.png"], 2, "100x2 is too long and narrow"),
        (["plain.png"], 4, "no request inside"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], code: int, told: str, tiny_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_file)]
    for name in {"grid.png", "one.png"} & set(arguments):
        more = ["-n", "2", "--grid"] if name == "grid.png" else []
        assert (
            main(["generate", "apple", "--seed", "1", "--steps", "1", "--out", str(tmp_path / name), *more, *model])
            == 0
        )
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (100, 2)).save(tmp_path / "long.png")
    (tmp_path / "notes.html").write_text("<svg/>")
    capfd.readouterr()
    paths = [str(tmp_path / a) if "." in a else a for a in arguments]
    assert main(["explain", *paths, *model]) == code
    error = capfd.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_what_stops_an_explanation_is_told_on_a_line_of_its_own(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, tell: Callable[[str, int, int], None], **__: Any) -> str:
        tell("its path", 3, 50)
        raise MemoryError

    load(tiny_file).generate("apple", seed=1, steps=1)[0].save(tmp_path / "a.png")
    monkeypatch.setattr("sfumato.inside.report.report", stopped)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["explain", str(tmp_path / "a.png"), "--model", str(tiny_file)]) == 5
    assert capsys.readouterr().err.endswith("its path: 3 of 50 steps\r\033[Ksfumato: out of memory\n")


def test_a_long_and_narrow_picture_is_explained(tiny_file: Path, tmp_path: Path) -> None:
    (made,) = load(tiny_file).generate("apple", seed=1, steps=1, width=80, height=2, upscale=4)
    picture = made.save(tmp_path / "a.png")
    assert main(["explain", str(picture), "--model", str(tiny_file), "--steps", "1"]) == 0


def test_a_picture_that_the_model_cannot_encode_is_refused(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(Pipeline(tiny).generate("apple", seed=1, steps=1)[0].save(tmp_path / "a.png"))
    blind = Pipeline(replace(tiny, encode_picture=None))
    monkeypatch.setattr("sfumato.cli.explain.load_recorded", lambda _, old: (blind, old.request))
    assert main(["explain", file, "--noise", file]) == 2
    assert "--noise has no effect" in capsys.readouterr().err


def test_a_picture_is_lit_where_the_map_is_bright() -> None:
    pixels = np.full((8, 8, 3), 240, np.uint8)
    map = np.zeros((2, 2), np.float32)
    map[0, 0] = 0.2  # its peak, whatever its size
    out = lit(pixels, map)
    assert out[0, 0, 0] == 240
    assert out[-1, -1, 0] == round(240 * 0.16)


def test_charts_place_values_on_their_axes() -> None:
    log = axis("x", [1, 100], log=True)
    assert log.at(log.low) == 0
    assert log.at((log.low * log.high) ** 0.5) == pytest.approx(0.5)
    assert {1, 10, 100} <= set(log.ticks())
    narrow = axis("y", [2.8, 3.6], log=True)
    assert len(narrow.ticks()) == 2, "no round value lies within"
    assert axis("y", [0, 1]).low == 0
    drawn = chart("a & b", [Series("s", [(1, 1), (2, float("inf")), (4, 0), (3, 2)])], "x", "y", ylog=True)
    assert drawn.count("L") == 1, "what cannot be drawn is left out"
    assert "a &amp; b" in drawn
    low = chart(
        "many", [Series(f"n{i}", [(0, 0), (1, 0)]) for i in range(6)] + [Series("", [(1, 9)], dots=True)], "x", "y"
    )
    names = [float(y) for y in re.findall(r'class="name[^>]* y="([\d.]+)"', low)]
    assert np.diff(names).tolist() == [15] * 5, "each below the other"
    assert names[-1] == H - BOTTOM + 4, "and none below the axis"
    assert chart("nothing", [Series("s", [])], "x", "y") == ""


def test_names_in_charts_can_be_read_on_either_ground() -> None:
    """A contrast of 4.5 (WCAG 2.2, 1.4.3), in the report and in the studio."""

    def luminance(colour: str) -> float:
        values = [b / 255 for b in bytes.fromhex(colour)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    page = (files("sfumato.inside") / "report.css").read_text()
    studio = (files("sfumato.server") / "static" / "studio.css").read_text()
    grounds = [re.findall(r"--ground: ?#(\w{6})", css) for css in (page, studio)]  # light, dark
    hues = [re.findall(rf"--{name}:#(\w{{6}})", page) for name in "abcdef"]
    first = re.findall(r"--accent: #(\w{6})", studio)
    others = [re.findall(rf"\.s{i} {{ --hue: #(\w{{6}})", studio) for i in range(1, 6)]
    for ground, of in zip(grounds, (hues, [first, *others]), strict=True):
        for pair in of:
            for back, hue in zip(ground, pair, strict=True):
                light, dark = sorted((luminance(back), luminance(hue)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) > 4.5, f"{hue} on {back}"
