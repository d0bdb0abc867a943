"""The command: what it writes, what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.cli.flags import GROUPS, add_request_flags, request_of
from sfumato.families.additions import Ingredient
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import load
from sfumato.pipeline.request import Request

COMMAND = [sys.executable, "-m", "sfumato"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, in a folder of its own; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> tuple[int, str, str]:
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return call


def one_line(err: str) -> bool:
    return err.startswith("sfumato: ") and err.count("\n") == 1 and "Traceback" not in err


def test_words_become_a_picture_that_can_be_made_again(run: Run, tiny_file: Path, tmp_path: Path) -> None:
    code, out, err = run("generate", "a red apple!", "--model", tiny_file, "--seed", 7, "--steps", 3)
    assert (code, err) == (0, "")
    path = tmp_path / "outputs" / "a-red-apple-7.png"
    picture = Picture.open(path)
    assert picture.request.prompt == "a red apple!"
    assert (picture.request.seed, picture.request.steps) == (7, 3)
    assert Image.open(path).size == (256, 256)
    assert out.splitlines()[0] == "outputs/a-red-apple-7.png  seed 7"
    assert tiny_file.name in out
    assert " s" in out.splitlines()[1]

    code, out, _ = run("replay", path, "--model", tiny_file, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["equal"] is True
    again = tmp_path / report["pictures"][0]["path"]
    assert again != path
    assert again.read_bytes() == path.read_bytes()


def test_a_models_name_may_hold_brackets(run: Run, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal shows the name while the model is loaded."""
    Path("old [").mkdir()
    os.link(tiny_file, "old [/one].safetensors")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = run("generate", "a", "--model", "old [/one].safetensors", "--seed", 1, "--steps", 1)
    assert code == 0, err


def test_words_that_do_not_fit_are_told(run: Run, tiny_file: Path) -> None:
    _, _, fits = run("generate", "fox", "--model", tiny_file, "--negative", "a " * 100, "--seed", 1, "--steps", 1)
    assert fits.startswith("negative: too long for this model: its last ")
    _, _, none = run("generate", "fox", "--model", tiny_file, "--negative", "a", "--seed", 1, "--steps", 1)
    assert none == ""
    _, _, tag = run("generate", "fox <lora:ink:0.8> <3", "--model", tiny_file, "--seed", 1, "--steps", 1)
    assert tag.startswith("prompt: <lora:ink:0.8> is read as plain words: ")


def test_several_pictures_grid_film_and_json(run: Run, tiny_file: Path, tmp_path: Path) -> None:
    _, out, _ = run("generate", "fox", "--model", tiny_file, "--seed", 1, "-n", 3, "--json", "--scale", 1)
    report = json.loads(out)
    assert [p["seed"] for p in report["pictures"]] == [1, 2, 3]
    assert report["request"] == Request("fox", seed=1).to_dict() | report["request"]
    assert len(report["model"]["hash"]) == 64
    assert report["seconds"] > 0
    singles = [Picture.open(p["path"]).pixels for p in report["pictures"]]

    code, out, _ = run(
        "generate", "fox", "--model", tiny_file, "--seed", 1, "-n", 3, "--grid", "--trajectory", "film.gif",
        "--out", "page.png", "--scale", 2, "--steps", 4,
    )  # fmt: skip
    assert code == 0
    assert "film.gif" in out
    page = Picture.open("page.png")
    assert page.pixels.shape == (32, 32, 3)
    assert np.array_equal(page.pixels[:16, 16:], singles[1])
    film = Image.open("film.gif")
    assert (film.n_frames, film.size) == (4, (64, 64))  # type: ignore[attr-defined]
    assert run("replay", "page.png", "--model", tiny_file, "--out", "page-2.png")[0] == 0
    assert Path("page.png").read_bytes() == Path("page-2.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.gif", "outputs", "page-2.png", "page.png"]


def test_files_are_never_replaced_unasked(run: Run, tiny_file: Path, tmp_path: Path) -> None:
    words = ("generate", "a", "--model", tiny_file, "--steps", 1)
    for _ in range(3):
        assert run(*words, "--seed", 1)[0] == 0
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == ["a-1-2.png", "a-1-3.png", "a-1.png"]
    assert run(*words, "--seed", 1, "--out", "a.png")[0] == 0
    before = Path("a.png").read_bytes()
    code, _, err = run(*words, "--seed", 2, "--out", "a.png")
    assert code == 2
    assert one_line(err)
    assert "exists already; --force" in err
    assert Path("a.png").read_bytes() == before
    assert run(*words, "--seed", 2, "--out", "a.png", "--force")[0] == 0
    assert Picture.open("a.png").request.seed == 2
    assert run(*words, "--seed", 1, "-n", 2, "--out", "b.png")[0] == 0
    assert Path("b-1.png").exists()
    assert Path("b-2.png").exists()
    assert run(*words, "--seed", 1, "-n", 3, "--out", "b.png")[0] == 2
    assert not Path("b-3.png").exists()
    assert run(*words, "--seed", 1, "--out", "C.PNG")[0] == 0
    assert Path("C.PNG").exists()
    assert not Path("C.png").exists()
    assert run(*words, "--seed", 1, "--out", "some/folder")[0] == 0
    assert Path("some/folder/a-1.png").exists()


def test_a_replay_tells_what_differs(
    run: Run, tiny_file: Path, make_tiny_file: Callable[[int], Path], tmp_path: Path
) -> None:
    run("generate", "a", "--model", tiny_file, "--seed", 1, "--out", "a.png", "--scale", 3)
    code, _, err = run("replay", "a.png", "--model", make_tiny_file(1))
    assert code == 3
    assert one_line(err)
    assert "point at the right file with --model" in err
    code, _, err = run("replay", "a.png")  # the name in the file is looked up here only
    assert code == 2
    assert one_line(err)

    image = Image.open("a.png")
    text = image.text["sfumato"]  # type: ignore[attr-defined]
    image.putpixel((0, 0), (1, 2, 3))
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("sfumato", text.replace(f'"{np.__version__}"', '"1.0"'))
    image.save("a.png", pnginfo=info)
    code, out, _ = run("replay", "a.png", "--model", tiny_file)
    assert code == 1
    assert f"pixels differ (numpy 1.0 is now {np.__version__})" in out


def test_a_replay_takes_as_many_threads_as_its_picture_did(run: Run, tiny_file: Path) -> None:
    """The order of sums depends on their number, and the last bits on the order."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run("generate", "a", "--model", tiny_file, "--seed", 1, "--out", "a.png")
        torch.set_num_threads(1)
        code, out, _ = run("replay", "a.png", "--model", tiny_file)
        assert code == 0
        assert "pixels equal" in out
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def record_again(part: str, key: str, value: object) -> None:
    """Write a.png as b.png, its record changed in one place."""
    from PIL import PngImagePlugin

    image, info = Image.open("a.png"), PngImagePlugin.PngInfo()
    record = json.loads(image.text["sfumato"])  # type: ignore[attr-defined]
    record[part][key] = value
    info.add_text("sfumato", json.dumps(record))
    image.save("b.png", pnginfo=info)


def test_a_recorded_model_name_opens_nothing_elsewhere(run: Run, tiny_file: Path, tmp_path: Path) -> None:
    run("generate", "a", "--model", tiny_file, "--seed", 1, "--out", "a.png")
    record_again("model", "name", str(tiny_file))
    code, _, err = run("replay", "b.png")
    assert code == 2
    assert f"'{tiny_file.name}'" in err


@pytest.mark.parametrize(("what", "value"), [("dtype", "fp7"), ("dtype", 16), ("tile", "wide"), ("tile", -1)])
def test_a_damaged_record_is_blamed_itself(run: Run, tiny_file: Path, what: str, value: object) -> None:
    run("generate", "a", "--model", tiny_file, "--seed", 1, "--out", "a.png")
    record_again("made_with", what, value)
    code, _, err = run("replay", "b.png", "--model", tiny_file)
    assert code == 4
    assert f"b.png: its record of the {what} is damaged ({str(value)!r}): say it with --{what}" in err
    good = {"dtype": "fp32", "tile": "0"}[what]
    assert run("replay", "b.png", "--model", tiny_file, f"--{what}", good, "--out", "c.png")[0] == 0


def test_info_of_a_picture_and_of_a_model(run: Run, tiny_file: Path) -> None:
    run("generate", "a red fox", "--model", tiny_file, "--seed", 1, "--out", "a.png")
    _, out, _ = run("info", "a.png")
    assert "a red fox" in out
    _, out, _ = run("info", "a.png", "--json")
    assert json.loads(out)["request"]["prompt"] == "a red fox"
    for flags in (["--variant", "fp16"], ["--allow-pickle"]):
        code, out, err = run("info", "a.png", *flags)
        assert (code, out) == (2, "")
        assert f"{flags[0]} says how weights are read" in err
    _, out, _ = run("info", tiny_file)
    assert "licence" in out
    _, out, _ = run("info", tiny_file, "--json")
    assert json.loads(out)["card"]["licence"] == "none"


def test_info_of_a_folder_of_no_known_family_is_refused(run: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "sd" / "unet").mkdir(parents=True)
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    save_file({"a": torch.ones(2, 3)}, tmp_path / "sd" / "unet" / "model.safetensors")
    code, out, _ = run("info", "sd", "--json")
    assert code == 3
    assert out == ""


def test_info_prints_nothing_that_a_terminal_obeys(run: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors", {"note": "\x1b[2Jgone"})
    code, out, _ = run("info", "m.safetensors")
    assert code == 0
    assert "\x1b" not in out


def test_info_shows_what_is_deep_inside(run: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = {"depth": 12}
    for _ in range(12):
        config = {"in": config}  # type: ignore[assignment]
    save_file(
        {"a": torch.ones(1)}, tmp_path / "m.safetensors", {"sfumato-1": json.dumps({"card": {}, "config": config})}
    )
    code, out, err = run("info", "m.safetensors")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].split() == ["depth", "12"]


def test_samplers_are_listed(run: Run) -> None:
    from sfumato.diffusion import GUIDANCE, SAMPLERS, SPACINGS

    _, out, _ = run("samplers")
    assert all(name in out for name in [*SAMPLERS, *SPACINGS, *GUIDANCE, "DPM++ 2M", "DPMSolverMultistepScheduler"])
    _, out, _ = run("samplers", "--json")
    listed = json.loads(out)
    assert [s["name"] for s in listed["samplers"]] == list(SAMPLERS)


def photo(path: str, width: int = 16, height: int = 16, seed: int = 0, **settings: Any) -> Path:
    """A file with a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return Path(path)


def test_a_picture_from_a_picture_can_be_made_again(run: Run, tiny_file: Path, tmp_path: Path) -> None:
    Path("in").mkdir()
    photo("in/me.png", 18, 17)
    words = ("generate", "fox", "--model", tiny_file, "--seed", 1, "--init", "in/me.png", "--strength", 0.6)
    code, _, err = run(*words, "--out", "a.png", "--trajectory", "a.gif")
    assert code == 0
    assert err == "me.png: 18x17 cut to 18x16\n"
    assert Image.open("a.png").size == (18 * 15, 16 * 15)
    assert run("replay", "a.png", "--model", tiny_file, "--mask", "in/me.png")[::2] == (
        2,
        "sfumato: a.png was made without mask: leave out --mask\n",
    )
    code, out, _ = run("replay", "a.png", "--model", tiny_file, "--out", "b.png")
    assert code == 0
    assert "pixels equal" in out
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()

    Path("in/me.png").rename("other.png")
    code, _, err = run("replay", "a.png", "--model", tiny_file)
    assert code == 2
    assert one_line(err)
    assert "made from a picture that is not here: me.png" in err
    assert "say where it lies with --init" in err
    assert run("replay", "a.png", "--model", tiny_file, "--init", "other.png")[0] == 0
    photo("in/me.png", 18, 17, seed=2)
    code, _, err = run("replay", "a.png", "--model", tiny_file)
    assert code == 2
    assert one_line(err)
    assert "me.png is not the picture that was used" in err
    Path("in/me.png").unlink()
    Path("other.png").rename("me.png")  # beside the result
    assert run("replay", "a.png", "--model", tiny_file)[0] == 0
    Path("in/me.png").write_bytes(b"no picture")  # where it lay
    assert run("replay", "a.png", "--model", tiny_file)[0] == 0


def test_a_phone_s_picture_is_turned_upright_and_that_is_said(run: Run, tiny_file: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo("me.jpg", 20, 14, exif=exif)
    code, _, err = run("generate", "fox", "--model", tiny_file, "--seed", 1, "--init", "me.jpg", "--scale", 1)
    assert (code, err) == (0, "me.jpg: turned upright as its EXIF says\n")
    assert Picture.open("outputs/fox-1.png").pixels.shape == (20, 14, 3)


def test_pictures_on_the_way_from_one_prompt_to_another(run: Run, tiny_file: Path) -> None:
    words = ("interpolate", "fox", "--prompt-to", "house", "--model", tiny_file, "--seed", 1, "--scale", 1)
    code, out, _ = run(*words, "--frames", 3, "--out", "m.png", "--film", "m.gif", "--json")
    assert code == 0
    paths = [p["path"] for p in json.loads(out)["pictures"]]
    assert json.loads(out)["film"] == "m.gif"
    assert paths == ["m-1.png", "m-2.png", "m-3.png"]
    pictures = [Picture.open(p) for p in paths]
    assert [p.request.mix for p in pictures] == [0.0, 0.5, 1.0]
    steps = [np.abs(a.pixels.astype(int) - b.pixels).mean() for a, b in itertools.pairwise(pictures)]
    assert min(steps) > 0
    assert Image.open("m.gif").n_frames == 3  # type: ignore[attr-defined]
    assert run("replay", "m-2.png", "--model", tiny_file)[0] == 0


def test_a_film_of_a_picture_that_is_enlarged_on_its_way(run: Run, tiny_file: Path) -> None:
    words = ("generate", "fox", "--model", tiny_file, "--seed", 1, "--hires", 2, "-n", 2, "--grid", "--scale", 1)
    assert run(*words, "--trajectory", "a.gif", "--out", "a.png")[0] == 0
    film = Image.open("a.gif")
    assert film.size == (64, 32)
    assert film.n_frames == 4 + 2  # type: ignore[attr-defined]
    assert run("replay", "a.png", "--model", tiny_file)[0] == 0


def test_a_picture_of_any_name_stays_in_a_record_that_is_read_again(run: Run, tiny_file: Path) -> None:
    """Systems put narrow spaces into their screenshots' names, and folders may lie deep."""
    deep = "/".join(["a" * 60] * 6)
    Path(deep).mkdir(parents=True)
    for i, name in enumerate(("Screenshot 9.41\u202fAM.png", f"{deep}/me.png", "a\tb.png")):
        photo(name, 16, 16)
        words = ("generate", "fox", "--model", tiny_file, "--seed", 1, "--steps", 2, "--init", name)
        assert run(*words, "--out", f"{i}.png")[0] == 0
        more = () if "\t" not in name else ("--init", name)  # a control is kept as "?", and not found by that
        assert run("replay", f"{i}.png", "--model", tiny_file, *more)[0] == 0


def test_a_replay_finds_the_right_one_of_two_files_of_a_name(run: Run, tiny_file: Path) -> None:
    Path("results").mkdir()
    photo("results/me.png", 16, 16)
    photo("me.png", 16, 16)
    words = ("generate", "fox", "--model", tiny_file, "--seed", 1, "--steps", 2, "--init", "me.png")
    assert run(*words, "--out", "results/a.png")[0] == 0
    photo("me.png", 16, 16, seed=2)  # another one now
    assert run("replay", "results/a.png", "--model", tiny_file)[0] == 0


def test_a_replay_tells_of_files_whose_names_no_system_takes(run: Run, tiny_file: Path) -> None:
    init = PictureFile.of("init", photo("me.png"))
    made = load(tiny_file).generate("fox", seed=1, steps=1, init=replace(init, name="x" * 3000))
    made[0].save("a.png")
    code, _, err = run("replay", "a.png", "--model", tiny_file)
    assert code == 2
    assert "say where it lies with --init" in err
    lora = Ingredient("lora", "y" * 300, "0" * 64, 1.0)
    replace(made[0], request=Request("fox", seed=1), ingredients=(lora,)).save("b.png")
    code, _, err = run("replay", "b.png", "--model", tiny_file)
    assert code == 3
    assert "name it with --lora FILE" in err


def test_files_that_could_not_be_read_again_are_refused_before_they_are_drawn(run: Run, tiny_file: Path) -> None:
    more = ("--model", tiny_file, "--size", "64x64", "--steps", 1, "--seed", 1)
    assert run("generate", "fox", *more, "--upscale", 4, "--out", "a.png")[0] == 0
    for command in (
        ("interpolate", "fox", "--prompt-to", "house", "--upscale", 4, "--scale", 64, *more),
        ("generate", "fox", "-n", 9, "--trajectory", "a.gif", "--scale", 64, *more),  # 3 × 3 of 4096²
        ("replay", "a.png", "--model", tiny_file, "--scale", 64),
    ):
        code, _, err = run(*command)
        assert code == 2
        assert "read again" in err
    assert [p.name for p in Path().iterdir()] == ["a.png"]


def test_pictures_that_were_done_are_there_when_a_later_one_fails(
    run: Run, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.pipeline.pipeline import Pipeline

    enlarge, done = Pipeline._upscale, []

    def enlarge_two(self: Pipeline, pixels: Any) -> Any:
        if len(done) == 2:
            raise MemoryError
        done.append(pixels)
        return enlarge(self, pixels)

    monkeypatch.setattr(Pipeline, "_upscale", enlarge_two)
    words = ("generate", "fox", "--model", tiny_file, "--seed", 1, "--steps", 1, "-n", 4, "--upscale", 4)
    assert run(*words)[0] != 0
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == ["fox-1.png", "fox-2.png"]


def test_runs_of_one_name_leave_each_other_s_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is taken between the look and the write: the picture goes under the next one."""
    from sfumato.cli.output import Target

    picture = Picture(np.zeros((4, 4, 3), np.uint8), Request("fox", seed=1, width=4, height=4), "m", "ab" * 32)
    target, looks = Target(tmp_path, None, 1, False), []
    there = os.path.lexists

    def look(path: Any) -> bool:
        if not looks:
            looks.append(path)
            Path(path).write_text("another run's")
            return False
        return there(path)

    monkeypatch.setattr("sfumato.cli.output.os.path.lexists", look)
    assert target.write(picture, 0, 1).name == "fox-1-2.png"
    assert (tmp_path / "fox-1.png").read_text() == "another run's"


def test_a_film_shows_the_pictures_that_were_chosen(run: Run, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    last = lambda pictures, words: torch.arange(float(len(pictures)))  # noqa: E731  the last is the best
    monkeypatch.setattr("sfumato.families._critic", lambda path, critic: last)
    words = ("generate", "fox", "--model", tiny_file, "--steps", 3, "--scale", 1)
    assert run(*words, "--seed", 1, "--best-of", 3, "--trajectory", "chosen.gif")[0] == 0
    assert run(*words, "--seed", 3, "--trajectory", "plain.gif")[0] == 0
    assert Path("chosen.gif").read_bytes() == Path("plain.gif").read_bytes()


BAD: list[tuple[list[str], int, str]] = [
    ([], 2, "a command is missing"),
    (["generate", "a", "--force"], 2, "names are new"),
    (["generate", "a", "-n", "100", "--grid", "--scale", "64", "--size", "64x64"], 2, "fewer pictures in a grid"),
    (["interpolate", "a", "--prompt-to", "b", "--critic", "file.txt"], 2, "leave it out"),
    (["explain", ""], 4, "no such file"),
    (["explain", "."], 4, "a folder, not a picture"),
    (["explain", "a.png", "--steps", "9" * 5000], 2, "from 1 to 500"),
    (["explain", "a.png", "--critic", "file.txt"], 2, "leave it out"),
    (["gnerate", "a"], 2, "no command 'gnerate'; did you mean 'generate'?"),
    (["generate"], 2, "required: PROMPT"),
    (["generate", ""], 2, "prompt is empty"),
    (["generate", "a", "--steps", "0"], 2, "steps must be a whole number from 1 to 1000, not 0"),
    (["generate", "a", "--steps", "many"], 2, "not 'many'"),
    (["generate", "a", "--steps", "9" * 5000], 2, "steps must be"),
    (["generate", "a", "--guidance", "nan"], 2, "guidance must be"),
    (["generate", "a", "--guidance-interval", "1"], 2, "two numbers"),
    (["generate", "a", "--sampler", "dpm++2m"], 2, "did you mean"),
    (["generate", "a", "--seed", "-1"], 2, "seed must be"),
    (["generate", "a", "-n", "1000"], 2, "n must be"),
    (["generate", "a", "--size", "large"], 2, "size must be WxH"),
    (["generate", "a", "--size", "17x16"], 2, "the nearest is 16x16"),
    (["generate", "a", "--size", "4096x4096"], 2, "too large"),
    (["generate", "a", "--size", "9999x9999"], 2, "too large"),
    (["generate", "a", "--size", "0x16"], 2, "width must be"),
    (["generate", "a", "--seed", "1_0"], 2, "seed must be a whole number"),
    (["generate", "a", "--guidance", "1_0"], 2, "guidance must be a number"),
    (["generate", "a", "--scale", "0"], 2, "scale must be"),
    (["generate", "a", "--stepz", "3"], 2, "--stepz"),
    (["generate", "a", "--init", "missing.png"], 2, "init missing.png: no such file"),
    (["generate", "a", "--init", "."], 2, "a folder, not a picture"),
    (["generate", "a", "--init", ""], 2, "a folder, not a picture"),
    (["generate", "a", "--init", "/dev/zero"], 2, "no such file"),
    (["generate", "a", "--init", "a\0b"], 2, "init"),
    (["generate", "a", "--init", "file.txt"], 2, "init file.txt: not a picture of a known kind"),
    (["generate", "a", "--init", "film.gif"], 2, "init film.gif is empty"),
    (["generate", "a", "--strength", "0.5"], 2, "strength has no effect without init"),
    (["generate", "a", "--mask", "film.gif"], 2, "mask film.gif is empty"),
    (["interpolate", "a"], 2, "needs --prompt-to"),
    (["interpolate", "a", "--prompt-to", "b", "--frames", "1"], 2, "frames must be a whole number from 2"),
    (["interpolate", "a", "--prompt-to", "b", "--mix", "0.5"], 2, "leave out --mix"),
    (["generate", "a", "--steps", "1", "--steps", "2"], 2, "argument --steps: is given twice"),
    (["generate", "a", "--critic", "file.txt"], 2, "ask for them with --best-of"),
    (["generate", "a", "--partial"], 2, "partial is for published models"),
    (["generate", "a", "--variant", "fp16"], 2, "variant is for published models"),
    (["generate", "a", "--memory", "low"], 2, "memory is for published models"),
    (["generate", "a", "--out", ""], 2, "empty"),
    (["generate", "a", "--out", "a.jpg"], 2, "must end in .png"),
    (["generate", "a", "--out", "a.png/"], 2, "must end in .png"),
    (["generate", "a", "--out", "file.txt/a.png"], 2, "cannot write"),
    (["generate", "a", "--out", "x" * 300 + ".png"], 2, "cannot write"),
    (["generate", "a", "--trajectory", "a.png"], 2, "must end in .gif"),
    (["generate", "a", "--trajectory", "film.gif"], 2, "exists already"),
    (["generate", "a", "--trajectory", "."], 2, "must end in .gif"),
    (["generate", "a\udcff"], 2, "no text"),
    (["train"], 2, "name a recipe"),
    (["train", "--run", "a", "run=b", "--data", "sample"], 2, "run is given twice"),
    (["train", "--data", "sample", "data.path=a"], 2, "data.path is given twice"),
    (["train", "--data", "sample", "seed=1", "seed=2"], 2, "seed is given twice"),
    (["train", "twice.yaml"], 4, "twice.yaml: not a readable YAML recipe (steps is given twice"),
    (["train", "."], 2, "train on its pictures with --data ."),
    (["train", "--data", "sample", "--run", "file.txt"], 2, "cannot write file.txt"),
    (["convert", "file.txt", "a.safetensors"], 3, "file.txt: not a safetensors file"),
    (["replay", "missing.png"], 4, "no such file"),
    (["replay", "file.txt"], 4, "not a whole PNG"),
    (["info", "missing"], 2, "no model"),
    (["info", "file.txt"], 3, "not a safetensors file"),
    (["generate", "a", "--model", "missing"], 2, "no model"),
    (["generate", "a", "--model", "file.txt"], 3, "not a safetensors file"),
    (["generate", "a", "--model", "cut.safetensors"], 3, "cut short"),
    (["generate", "a", "--model", "foreign.safetensors"], 3, "foreign.safetensors"),
]


@pytest.mark.parametrize(("argv", "expected", "message"), BAD, ids=[" ".join(a)[:40] for a, *_ in BAD])
def test_bad_input_is_one_line_an_exit_code_and_no_file(
    run: Run, tiny_file: Path, tmp_path: Path, argv: list[str], expected: int, message: str
) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "file.txt").write_text("some text of a foreign kind")
    (tmp_path / "film.gif").touch()
    (tmp_path / "twice.yaml").write_text("data: {path: sample}\nsteps: 5\nsteps: 7\n")
    (tmp_path / "cut.safetensors").write_bytes(tiny_file.read_bytes()[:-100])
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    before = sorted(tmp_path.iterdir())
    if argv[:1] == ["generate"] and "--model" not in argv:
        argv = [*argv, "--model", str(tiny_file)]
    code, out, err = run(*argv)
    assert (code, out) == (expected, "")
    assert one_line(err), err
    assert message in err
    assert len(err) < 500 + len(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_debug_shows_where(run: Run) -> None:
    with pytest.raises(Exception, match="prompt is empty"):
        run("generate", "", "--debug")


def test_an_unexpected_error_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("a fault\nof ours")

    monkeypatch.setattr("sfumato.cli.generate.request_of", fault)
    code, _, err = run("generate", "a")
    assert code == 1
    assert one_line(err)
    assert "a fault of ours" in err


def test_train_reads_its_own_flags(run: Run) -> None:
    code, out, _ = run("train", "--help")
    assert code == 0
    assert "recipe" in out
    assert run("train", "missing.yaml")[0] == 4


def test_every_field_of_a_request_has_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_request_flags(parser)
    words = (
        "words --negative rain --seed 1 -n 2 --steps 3 --sampler ddim --spacing karras --guidance 4 --eta 0.5 "
        "--guidance-rescale 0.25 --guidance-interval 0.5,3 --size 48x32 --init a.png --strength 0.6 --mask m.png "
        "--outpaint 1,2,3,4 --variation-seed 9 --variation-strength 0.1 --prompt-to hills --mix 0.3"
    )
    monkeypatch.chdir(tmp_path)
    init, mask = photo("a.png"), photo("m.png", seed=1)
    request = request_of(parser.parse_args(words.split()))
    assert request == Request(
        "words", "rain", 1, 2, 3, "ddim", "karras", 4.0, 0.25, (0.5, 3.0), 0.5, 48, 32, PictureFile.open("init", init),
        0.6, PictureFile.open("mask", mask), (1, 2, 3, 4), 9, 0.1, "hills", 0.3,
    )  # fmt: skip
    more = "words --hires 2 --hires-strength 0.4 --upscale 4 --control-image a.png --control-scale 0.5"
    more += " --image-prompt m.png --image-prompt-scale 0.7 --best-of 3 --control-range 0,0.5"
    assert request_of(parser.parse_args(more.split())) == Request(
        "words", hires=2.0, hires_strength=0.4, upscale=4, control_image=PictureFile.open("a", init), control_scale=0.5,
        image_prompt=PictureFile.open("m", mask), image_prompt_scale=0.7, best_of=3, control_range=(0.0, 0.5),
    )  # fmt: skip
    again = f"{more} --control-image m.png --control-scale 1 --control-range 0.25,1"
    several = request_of(parser.parse_args(again.split()))
    assert several.control_image == (PictureFile.open("a", init), PictureFile.open("m", mask))
    assert (several.control_scale, several.control_range) == ((0.5, 1.0), ((0.0, 0.5), (0.25, 1.0)))
    flags = {flag for f in fields(Request) for flag in f.metadata["flags"]}
    assert flags <= {*words.split(), *more.split()}
    assert {name for names in GROUPS.values() for name in names} <= {f.name for f in fields(Request)}


# ── as a process ───────────────────────────────────────────────────────────────────────────────────────


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}


@pytest.mark.parametrize("command", [["samplers"], ["--help"]])
def test_a_reader_that_leaves_early_is_no_error(command: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_output_to_a_full_disk_is_told(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "samplers"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 5
    assert one_line(done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_terminal_and_disk_whole(
    number: int, code: int, tiny_file: Path, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    argv = [*COMMAND, "generate", "a", "--model", str(tiny_file), "-n", "100", "--steps", "1000", "--out", "new/a.png"]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, env=environment(), preexec_fn=heed_signals
    )
    os.close(theirs)
    try:
        seen = read_until(ours, lambda text: b"drawing" in text, 180)
        assert b"drawing" in seen
        process.send_signal(number)
        seen += read_until(ours, lambda _: False, 60)
        assert process.wait(30) == code
    finally:
        process.kill()
    assert b"Traceback" not in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor was left hidden"
    assert list(tmp_path.iterdir()) == []


def heed_signals() -> None:
    """A shell has what it runs in the background ignore SIGINT, and whatever that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SWALLOWING = """
import sys, types
import sfumato.cli
module = types.ModuleType("swallowing")
exec(sys.argv[1], module.__dict__)
sys.modules["swallowing"] = module
sfumato.cli.COMMANDS["swallow"] = ("swallowing", "")
sfumato.cli.AGAIN = 0.1
sys.exit(sfumato.cli.main(["swallow"]))
"""
WRITE = {"x86_64": 1, "aarch64": 64}.get(platform.machine(), 1)  # write(2)'s number
BODIES = {  # what a library may do to the exception that a signal raises
    "drops it": "try: sleep()\n    except BaseException: pass\n    sleep()",
    "drops it many times": "for _ in range(3):\n        try: sleep()\n        except BaseException: pass\n    sleep()",
    "makes another of it": "try: sleep()\n    except BaseException: raise RecursionError('odd') from None",
    "lets it out of an exec": "exec('sleep()', globals())",
    "ends in peace": "try: sleep()\n    except BaseException: return 0",
    "cleans up slowly": "try: sleep()\n    finally:\n        time.sleep(0.5); print('cleaned', flush=True)",
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("what", BODIES)
def test_a_signal_is_never_lost(number: int, code: int, what: str) -> None:
    sleep = "import time\ndef sleep():\n    print('asleep', flush=True)\n    time.sleep(120)"
    library = f"{sleep}\ndef main(argv):\n    {BODIES[what]}"
    argv = [sys.executable, "-c", SWALLOWING, library]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heed_signals
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asleep\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    if what == "ends in peace":  # it was done all the same
        assert (process.returncode, err) == (0, "")
        return
    assert process.returncode == code
    assert err == f"sfumato: {'interrupted' if code == 130 else 'terminated'}\n"
    assert ("cleaned" in out) == (what == "cleans up slowly")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the size of a pipe can be set on Linux alone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_an_error_is_being_told_adds_no_words(number: int) -> None:
    """As when a launcher ends the ranks that are just saying why they end."""
    library = "import os\ndef main(argv):\n    os.write(1, b'here')\n    raise ValueError('odd')"
    reader, writer = os.pipe()
    full = os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)))  # who writes more must wait
    argv = [sys.executable, "-c", SWALLOWING, library]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=writer, env=environment(), preexec_fn=heed_signals
    ) as process:
        os.close(writer)
        assert process.stdout is not None
        assert process.stdout.read(4) == b"here"
        waiting = Path(f"/proc/{process.pid}/syscall")
        end = time.monotonic() + 60
        while not waiting.read_text().startswith(f"{WRITE} 0x2 "):
            assert time.monotonic() < end, "it never waited for its reader"
            time.sleep(0.01)
        process.send_signal(number)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()[full:]
        assert process.wait(timeout=60) == -number
    assert said in (b"", b"sfumato: unexpected ValueError: odd (--debug shows where)\n")


def test_a_signal_that_the_caller_ignored_stays_ignored() -> None:
    library = "import os, signal\ndef main(argv):\n    os.kill(os.getpid(), signal.SIGINT)\n    return 7"
    argv = [sys.executable, "-c", SWALLOWING, library]
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    assert subprocess.run(argv, env=environment(), preexec_fn=ignoring).returncode == 7


def read_until(fd: int, done: Callable[[bytes], Any], seconds: float) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and not done(seen):
        if not select.select([fd], [], [], 0.1)[0]:
            continue
        try:
            part = os.read(fd, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    return seen
