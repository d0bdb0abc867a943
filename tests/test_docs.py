"""What the documents show runs, and names what there is."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.cli import COMMANDS, main
from sfumato.diffusion import SCHEDULES, SPACINGS, NoiseLevel, Prediction, samplers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ["README.md", "docs/diffusion.md"]  # the others' blocks want data, or are parts of something larger


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", RUN)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = blocks(ROOT / page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)


def test_the_sampler_that_contributors_are_shown_works() -> None:
    loop, row = blocks(ROOT / "CONTRIBUTING.md", "python")
    names = dict(vars(samplers))
    exec(loop, names)
    sampler = eval(row.strip().rstrip(","), names)
    rng = np.random.default_rng(0)

    def gaussian(x: Any, level: NoiseLevel) -> Prediction:  # the best denoiser of N(2, 0.5²)
        gain = level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.sigma**2)
        return Prediction.from_x0(x, level, 2 + gain * (x - 2 * level.alpha))

    start = rng.standard_normal((10_000, 1))
    path = SPACINGS["trailing"](SCHEDULES["flow"](), 50)
    *_, last = sampler(gaussian, start, path, lambda x: rng.standard_normal(x.shape))
    assert last.x.mean() == pytest.approx(2, abs=0.05)
    assert last.x.std() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_examples_import_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        if block.startswith("Sampler("):
            continue  # a row of a table
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sfumato"):
                assert all(hasattr(import_module(str(node.module)), a.name) for a in node.names), ast.unparse(node)


def test_commands_take_the_flags_that_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    shown = 0
    for page in PAGES:
        for line in re.findall(r"^(?: {4})?sfumato (.*)$", page.read_text(), re.MULTILINE):
            command, _, rest = line.partition(" #")[0].partition(" ")
            assert command in COMMANDS, f"{page.name}: sfumato {line}"
            if command == "data":
                continue  # its flags are those of its own commands
            if command not in helps:
                assert main([command, "--help"]) == 0
                helps[command] = capsys.readouterr().out
            for flag in re.findall(r"(?<!\S)--[\w-]+", rest):
                assert re.search(rf"{flag}\b", helps[command]), f"{page.name}: sfumato {line}"
                shown += 1
    assert shown > 10


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gives_its_own_arguments_to_the_picture_alone() -> None:
    def last(*words: str) -> str:
        ours = ("MAKE", "MFLAGS", "ARGS", "PROMPT", "DATA")  # `make test` tells the tests of its own
        env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        told = subprocess.run(["make", "-n", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return told.stdout.splitlines()[-1]

    assert last("image").endswith('generate "a red apple" --best-of 4')
    assert last("image", "ARGS=-n 4").endswith('generate "a red apple" -n 4')
    assert last("fashion-mnist", "DATA=x").split()[-1] == "x"
    assert last("fashion-mnist", "DATA=x", "ARGS=--n 100").endswith("x --n 100")


@pytest.mark.parametrize("path", [*ROOT.glob("bench/*.py"), *ROOT.glob("tools/*.py")], ids=lambda p: p.name)
def test_benches_and_tools_answer_to_help(path: Path) -> None:
    text = path.read_text()
    assert "__main__" not in text or "ArgumentParser(" in text
