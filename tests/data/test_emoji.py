"""The corpus' rules, on packages small enough to read: joins, repeats, splits, hashes and pinned bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from sfumato.data.emoji import build
from sfumato.data.emoji.build import (
    Drawing,
    SplitConfig,
    StyleConfig,
    build_style,
    draw,
    finish,
    hold_out,
    load_config,
    svg,
    tidy,
)
from sfumato.data.emoji.names import Names, fold, has_skin_tone, normal_code
from sfumato.data.emoji.packages import Package, fetch, read_members
from sfumato.errors import BadData, NoResources

RECIPE = Path(__file__).parents[2] / "recipes" / "emoji.yaml"

EMOJI = [
    {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit"], "group": 4, "subgroup": 33},
    {"hexcode": "1F98A", "label": "fox", "tags": ["animal"], "group": 3, "subgroup": 20},
    {"hexcode": "1F1E8-1F1ED", "label": "flag: Switzerland", "tags": ["CH"], "group": 9, "subgroup": 99},
    {"hexcode": "1F44D", "label": "thumbs up", "tags": [], "group": 1, "subgroup": 10},
    {"hexcode": "1F550", "label": "one o’clock", "tags": [], "group": 5, "subgroup": 40},
]
MESSAGES = {
    "groups": [{"order": o, "key": k} for o, k in ((1, "people-body"), (3, "animals-nature"), (4, "food-drink"),
                                                  (5, "travel-places"), (9, "flags"))],
    "subgroups": [{"order": 99, "key": "country-flag"}, {"order": 20, "key": "animal-mammal"}],
}  # fmt: skip


def archive(path: Path, files: dict[str, bytes]) -> str:
    """Write an npm archive and return its integrity."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def write_emojibase(path: Path) -> str:
    shortcodes = {"1F98A": ["fox_face"], "1F44D-1F3FB": ["thumbs_up_light"]}
    files: dict[str, Any] = {"data": EMOJI, "messages": MESSAGES}
    files |= {f"shortcodes/{n}": shortcodes for n in ("cldr", "emojibase", "github", "iamcal", "joypixels")}
    return archive(path, {f"en/{name}.json": json.dumps(value).encode() for name, value in files.items()})


@pytest.fixture
def names(tmp_path: Path) -> Names:
    write_emojibase(tmp_path / "e.tgz")
    icons = {"chars": {"1f98a": "fox-noto"}, "aliases": {"reynard": {"parent": "fox-noto"},
             "fox-left": {"parent": "fox-noto", "hFlip": True}}}  # fmt: skip
    return Names(tmp_path / "e.tgz", [icons])


def style(**settings: Any) -> StyleConfig:
    defaults = dict.fromkeys(("package", "version", "integrity", "licence", "attribution"), "x")
    return StyleConfig(**{"style": "flat", "phrase": "flat style", "family": "flat", **defaults, **settings})


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(drawings: list[Drawing], names: Names, **settings: Any) -> tuple[list[build.Row], Counter[str]]:
    counts: Counter[str] = Counter()
    config = load_config(RECIPE)
    rows = build_style(style(**settings), drawings, names, config, counts)
    return rows, counts


def test_codes() -> None:
    assert normal_code("2764-FE0F") == "2764"
    assert normal_code("1f3f3_fe0f_200d_1f308") == "1f3f3-200d-1f308"
    assert has_skin_tone("1F44D-1F3FB")
    assert not has_skin_tone("1f3fb")
    assert fold("Piñata (party)") == "pinataparty"


def test_names_lead_to_emoji(names: Names) -> None:
    for name in ("fox", "Fox!", "fox_face", "fox-noto", "reynard"):
        found = names.find(name)
        assert found is not None, name
        assert found.code == "1f98a"
    assert names.find("fox-left") is None
    assert names.find("thumbs up light") is None
    assert names.find("thumbs up sign").label == "thumbs up"  # by Unicode's own name
    for name in ("flag for switzerland", "switzerland flag", "switzerland"):
        assert names.find(name).label == "flag: Switzerland"


def test_drawings_become_rows(names: Names) -> None:
    drawings = [
        Drawing("red-apple", "1f34e", "", png("red")),
        Drawing("apple-again", "1f34e", "", png("maroon")),
        Drawing("fox-face", None, "", png("orange")),
        Drawing("rouge", None, "Odd & Ends", png("red")),
        Drawing("thumbs-up-light-skin-tone", None, "", png("tan")),
        Drawing("thumb", "1f44d-1f3fb", "", png("tan")),
        Drawing("nothing", None, "", png("white")),
        Drawing("gadget", None, "Odd & Ends", png("blue")),
        Drawing("broken", None, "", b"<html>"),
    ]
    rows, counts = rows_of(drawings, names)
    assert [(r["id"], r["name"], r["group"]) for r in rows] == [
        ("flat/red-apple", "red apple", "food-drink"),
        ("flat/fox-face", "fox", "animals-nature"),
        ("flat/gadget", "gadget", "odd-ends"),
    ]
    assert rows[0]["alt_names"] == ["rouge"]
    assert sum(counts.values()) == len(drawings)
    assert counts["skin tones"] == 2
    assert {"blank", "repeated emoji", "repeated pictures"} <= counts.keys()
    assert [k for k in counts if k.startswith("failed (broken")] != []
    kept, counts = rows_of(drawings, names, nameless="drop")
    assert [r["name"] for r in kept] == ["red apple", "fox"]


def test_variants_keep_several_drawings_of_one_emoji(names: Names) -> None:
    drawings = [Drawing(f"fox-{i}", None, "", png(c)) for i, c in ((1, "red"), (2, "orange"))]
    rows, _ = rows_of(drawings, names, variants=True)
    assert [(r["id"], r["name"]) for r in rows] == [("flat/fox-1", "fox"), ("flat/fox-2", "fox")]


def test_captions_and_core(names: Names) -> None:
    drawings = [Drawing(e["hexcode"], normal_code(str(e["hexcode"])), "", png(c))
                for e, c in zip(EMOJI, ["red", "orange", "pink", "tan", "gray"], strict=True)]  # fmt: skip
    config = load_config(RECIPE)
    rows = build_style(config.styles[0], drawings, names, config, Counter())
    finish(rows, config)
    assert [r["caption"] for r in rows][:3] == [
        "red apple, noto style",
        "fox, noto style",
        "flag of switzerland, noto style",
    ]
    assert [r["core"] for r in rows] == [True, True, False, True, False]
    assert {r["split"] for r in rows} == {"train"}
    assert tidy("keycap: “5”") == "keycap 5"


def test_splits_hold_out_whole_families() -> None:
    rows = [{"concept": f"c{i}", "family": f, "group": "objects", "core": True} for i in range(40) for f in "abcde"]
    rows += [{"concept": "rare", "family": f, "group": "objects", "core": True} for f in "ab"]
    rows += [{"concept": "man", "family": f, "group": "people-body", "core": True} for f in "abcde"]
    config = SplitConfig(1, 4, 5, {"a": 6, "b": 7}, {"a": 3}, ("people-body",))
    held = hold_out(rows, config)
    kinds = Counter((family, split) for (_, family), split in held.items())
    assert kinds == {("", "test_concept"): 5, ("a", "test_combo"): 6, ("b", "test_combo"): 7, ("a", "val_combo"): 3}
    concepts = [c for c, _ in held]
    assert len(concepts) == len(set(concepts))
    assert not {"rare", "man"} & set(concepts)
    assert held == hold_out(rows[::-1], config)


def test_svg_and_rendering() -> None:
    pytest.importorskip("resvg_py")
    icons = {"width": 10, "height": 10}
    text = svg(icons, {"body": '<rect x="5" width="5" height="10" fill="currentColor"/>', "left": 0}, 64)
    drawn = draw(text, 16)
    assert drawn is not None
    image = Image.frombytes("RGB", (16, 16), drawn.pixels)
    assert image.getpixel((2, 8)) == (255, 255, 255)
    assert image.getpixel((13, 8)) == (26, 26, 26)
    assert draw(svg(icons, {"body": ""}, 64), 16) is None


# ── packages ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_archive_that_is_there_is_taken(tmp_path: Path) -> None:
    package = Package("@a/b", "1.0.0", archive(tmp_path / "a-b-1.0.0.tgz", {"x/y.json": b"1", "z.txt": b"2"}))
    assert read_members(fetch(package, tmp_path), r"x/.*") == {"x/y.json": b"1"}


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm that puts one archive where it is asked to."""
    store, bin_ = tmp_path / "store", tmp_path / "bin"
    store.mkdir()
    bin_.mkdir()
    script = f'#!/bin/sh\n[ "$1" = pack ] && cp {store}/* "$6"/ || {{ echo "npm error 404" >&2; exit 1; }}\n'
    (bin_ / "npm").write_text(script)
    (bin_ / "npm").chmod((bin_ / "npm").stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    return store


def test_npm_fetches_what_is_missing(npm: Path, tmp_path: Path) -> None:
    integrity = archive(npm / "b-1.0.0.tgz", {"x.json": b"1"})
    path = fetch(Package("b", "1.0.0", integrity), tmp_path / "out")
    assert path == tmp_path / "out" / "b-1.0.0.tgz"


def test_other_bytes_than_pinned_are_refused(npm: Path, tmp_path: Path) -> None:
    archive(npm / "b-1.0.0.tgz", {"x.json": b"1"})
    with pytest.raises(BadData, match="not the package that was pinned"):
        fetch(Package("b", "1.0.0", "sha512-AAAA"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_npm_that_fails_says_why(npm: Path, tmp_path: Path) -> None:
    with pytest.raises(NoResources, match=r"npm could not fetch b@1\.0\.0: .*404"):
        fetch(Package("b", "1.0.0", "sha512-AAAA"), tmp_path / "out")


def test_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoResources, match="npm is needed"):
        fetch(Package("b", "1.0.0", "sha512-AAAA"), tmp_path)


@pytest.mark.parametrize("name", ["--help", "../x", "a b", "@a/b/c", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(BadData, match="no npm package"):
        Package(name, "1.0.0", "")


# ── the recipe ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_recipe_pins_everything() -> None:
    config = load_config(RECIPE)
    assert len(config.styles) == 11
    for source in (*config.styles, config.names):
        assert len(base64.b64decode(source.integrity.removeprefix("sha512-"))) == 64
        assert source.licence in ("MIT", "Apache-2.0", "CC-BY-4.0")
    assert set(config.sample.styles) <= {s.style for s in config.styles if s.licence != "CC-BY-4.0"}
    assert config.expect.keys() == {"columns_sha256", "pixels_sha256"}


def test_a_small_corpus_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of ``sfumato data prepare``, its packages lying ready."""
    pytest.importorskip("resvg_py")
    from sfumato.cli import main

    packages = tmp_path / "out" / "packages"
    packages.mkdir(parents=True)
    body = '<circle cx="8" cy="8" r="{r}" fill="{c}"/>'
    icons = {"icons": {"red-apple": {"body": body.format(r=6, c="red")}, "fox": {"body": body.format(r=5, c="orange")},
                       "old": {"body": body.format(r=5, c="gray"), "hidden": True}}}  # fmt: skip
    files = {"icons.json": json.dumps(icons).encode(), "chars.json": b'{"1f34e": "red-apple"}'}
    integrity = archive(packages / "icons-1.0.0.tgz", files)
    emojibase = write_emojibase(packages / "emojibase-data-1.0.0.tgz")
    recipe = tmp_path / "tiny.yaml"
    text = f"""
name: tiny
renderer: {load_config(RECIPE).renderer}
size: 16
core_groups: [food-drink, animals-nature]
names: {{package: emojibase-data, version: 1.0.0, integrity: {emojibase}, licence: MIT, styles: [flat]}}
styles:
  - {{style: flat, phrase: flat style, family: flat, package: icons, version: 1.0.0, integrity: {integrity},
     licence: MIT, attribution: Someone}}
split: {{seed: 0, families: 9, test_concept: 0, test_combo: {{}}, val_combo: {{}}}}
sample: {{styles: [flat], concepts: [fox]}}
"""
    recipe.write_text(text)
    assert main(["data", "prepare", str(recipe), "--out", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    rows = pq.read_table(tmp_path / "out" / "tiny16.parquet").to_pylist()
    assert sorted(r["caption"] for r in rows) == ["fox, flat style", "red apple, flat style"]
    assert manifest["file"]["sha256"] == hashlib.sha256((tmp_path / "out" / "tiny16.parquet").read_bytes()).hexdigest()
    assert pq.read_table(tmp_path / "out" / "sample.parquet")["name"].to_pylist() == ["fox"]
    assert "Someone" in (tmp_path / "out" / "ATTRIBUTION.md").read_text()
    assert manifest["file"]["sha256"] in capsys.readouterr().out

    recipe.write_text(text + f"expect: {{columns_sha256: {manifest['columns_sha256']}, pixels_sha256: '0'}}\n")
    assert main(["data", "prepare", str(recipe), "--out", str(tmp_path / "out")]) == 4
    said = capsys.readouterr()
    assert "as expected" in said.out
    assert "pixels_sha256 are not those" in said.err
