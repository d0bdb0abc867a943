"""``sfumato search``: what it finds, what it keeps, and what it says of pictures that it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from sfumato.cli import main
from sfumato.data.sources import Record, open_source
from sfumato.evaluation.cache import Cache
from sfumato.families.clip import CLIP, EMBEDDED, TwoTowers, TwoTowersConfig, clip_metadata, clip_tensors, load_clip
from sfumato.networks.efficientnet import EfficientNetLite0
from sfumato.networks.towers import PictureHeadConfig
from sfumato.search import Index, index
from sfumato.text.tokenizer import VOCABULARY, packaged_clip
from sfumato.text.tower import TextTowerConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "grey": (120, 120, 120)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP file of random weights."""
    torch.manual_seed(0)
    text = TextTowerConfig(vocabulary=VOCABULARY, tokenizer="clip", token_dim=4, dim=16, layers=1, heads=2)
    config = TwoTowersConfig(size=16, dim=8, text=text, picture=PictureHeadConfig(hidden=16))
    towers, trunk = TwoTowers(config, packaged_clip()), EfficientNetLite0()
    path = tmp_path_factory.mktemp("clip") / "small.safetensors"
    path.write_bytes(save(clip_tensors(towers.state_dict(), trunk), clip_metadata(config, packaged_clip(), {})))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 16), colour).save(folder / f"{name}.png")
    return folder


class Counted(CLIP):
    """A CLIP that counts the pictures that it looks at."""

    seen = 0

    def embed_pictures(self, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
        self.seen += len(images)
        return super().embed_pictures(images, batch)


def test_words_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "sample", "a\udcff fox"]) == 2
    assert "WORDS is not valid Unicode" in capsys.readouterr().err


def counted(path: Path) -> Counted:
    clip = load_clip(path)
    return Counted(clip.towers, clip.trunk, clip.card, clip.hash).eval()


def test_pictures_are_looked_at_once_whatever_they_are_called(small: Path, pictures: Path, tmp_path: Path):
    clip, cache = counted(small), Cache(tmp_path / "cache")
    first = index(open_source(pictures), clip, cache)
    assert clip.seen == 4
    (pictures / "red.png").rename(pictures / "scarlet.png")
    Image.new("RGB", (16, 16), (0, 0, 0)).save(pictures / "black.png")
    again = index(open_source(pictures), clip, cache)
    assert clip.seen == 5
    of = {r.name: v for r, v in zip(again.records, again.vectors, strict=True)}
    before = {r.name: v for r, v in zip(first.records, first.vectors, strict=True)}
    assert torch.equal(of["scarlet.png"], before["red.png"])
    assert not torch.equal(of["black.png"], before["red.png"])


def test_the_order_is_that_of_the_cosines(small: Path, pictures: Path, tmp_path: Path):
    clip = counted(small)
    found = index(open_source(pictures), clip, Cache(None))
    words = clip.embed_words(["a red square"])[0]
    best = found.best(words, 3)
    scores = {r.name: float(v @ words) for r, v in zip(found.records, found.vectors, strict=True)}
    assert [r.name for r, _ in best] == sorted(scores, key=lambda n: -scores[n])[:3]
    assert all(score == pytest.approx(scores[r.name]) for r, score in best)


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_found(
    small: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (pictures / "cut.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    sheet = tmp_path / "sheet.png"
    common = [str(pictures), "red", "--model", str(small), "--cache", str(tmp_path / "cache")]
    assert main(["search", *common, "--json", "--sheet", str(sheet), "-k", "9"]) == 0
    out = capsys.readouterr()
    assert {row["path"] for row in json.loads(out.out)} == {f"{name}.png" for name in COLOURS}
    assert "1 of 5 pictures cannot be read (cut.png" in out.err
    assert Image.open(sheet).size[1] > 0
    assert main(["search", *common, "--sheet", str(sheet)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_picture_that_vanishes_before_the_sheet_is_named(
    small: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    best = Index.best

    def gone(self: Index, words: torch.Tensor, count: int) -> list[tuple[Record, float]]:
        (pictures / "red.png").unlink()
        return best(self, words, count)

    monkeypatch.setattr(Index, "best", gone)
    flags = ["--model", str(small), "--cache", str(tmp_path / "cache"), "--sheet", str(tmp_path / "sheet.png")]
    assert main(["search", str(pictures), "red", *flags]) == 4
    error = capsys.readouterr().err
    assert "red.png cannot be drawn on the sheet" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sheet.png").exists()


def test_words_that_do_not_fit_are_told(small: Path, pictures: Path, tmp_path: Path, capsys):
    common = ["--model", str(small), "--cache", str(tmp_path / "cache")]
    for words, told in (("red", ""), ("red " * 200, "WORDS: too long for this model: its last ")):
        assert main(["search", str(pictures), words, *common]) == 0
        error = capsys.readouterr().err
        assert error.startswith(told)
        assert error.count("\n") == bool(told)


def test_all_captions_of_a_picture_are_shown(small: Path, pictures: Path, tmp_path: Path, capsys):
    (pictures / "metadata.jsonl").write_text(
        json.dumps({"file_name": "red.png", "caption": ["a red square", "warm"]}) + "\n"
    )
    common = ["--model", str(small), "--cache", str(tmp_path / "cache"), "--json", "-k", "9"]
    assert main(["search", str(pictures), "red", *common]) == 0
    captions = {row["path"]: row["caption"] for row in json.loads(capsys.readouterr().out)}
    assert captions["red.png"] == "a red square, warm"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{pictures}", " "], 2, "words are empty"),
        (["{pictures}", "red", "-k", "0"], 2, "-k must be at least 1"),
        (["{pictures}", "red", "--force"], 2, "leave it out, or add --sheet"),
        (["{pictures}", "red", "--sheet", "x.jpg"], 2, "must end in .png"),
        (["nowhere", "red"], 4, "no data at"),
        (["{empty}", "red"], 4, "no "),
        (["{pictures}", "red", "--model", "{pictures}/red.png"], 3, "red.png"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    arguments: list[str], code: int, message: str, small: Path, pictures: Path, tmp_path: Path, capsys
):
    (tmp_path / "empty").mkdir()
    filled = [a.format(pictures=pictures, empty=tmp_path / "empty") for a in arguments]
    if "--model" not in filled:
        filled += ["--model", str(small)]
    assert main(["search", *filled, "--cache", str(tmp_path / "cache")]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not EMBEDDED.exists(), reason="no CLIP is built in")
def test_the_clip_built_in_finds_the_samples_pictures_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hits = 0
    asked = ("fox", "rocket", "pizza", "umbrella", "rainbow", "violin")
    for name in asked:
        assert main(["search", "sample", name, "-k", "3", "--json", "--cache", str(tmp_path)]) == 0
        hits += any(name in row["caption"] for row in json.loads(capsys.readouterr().out))
    assert hits >= len(asked) - 1
