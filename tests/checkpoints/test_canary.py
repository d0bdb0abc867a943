"""Hostile files and names offered to the command in a process that is watched by an audit hook."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sfumato
from sfumato.cli import main

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "families"))

from published import make  # noqa: E402


@pytest.fixture(scope="module")
def good(tmp_path_factory: Any) -> Path:
    """A small SD 1 model that loads."""
    folder = tmp_path_factory.mktemp("sd1") / "model"
    make("sd1", 0).save_pretrained(folder)
    return folder


def test_hostile_files_and_names_do_nothing_but_end_in_one_line(good: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "canary.py"), str(good)],
        capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    results = json.loads(done.stdout)
    assert len(results) >= 60
    wrong = {
        kind: r for kind, r in results.items()
        if r["code"] != (2 if kind.startswith("name: ") else 3) or r["events"] or r["mark"]
        or r["said"].count("\n") != 1 or len(r["said"]) > 700
    }  # fmt: skip
    assert not wrong, json.dumps(wrong, indent=1)
    files = [k for k in results if not k.startswith(("folder: ", "name: ", "addition: "))]
    assert all("model.safetensors: " in results[k]["said"] for k in files)


SPY = """
import os, sys
def hook(event, arguments):
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
        os.write(2, f"EVENT {event}\\n".encode())
        os._exit(9)
if "sfumato.checkpoints.unpickle" in sys.orig_argv:
    sys.addaudithook(hook)
    with open(os.environ["SPIED"], "a") as file:
        file.write("a child ran\\n")
"""


def test_pickles_are_read_by_a_child_that_can_do_nothing_else(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)
    log = tmp_path / "children"
    paths = [str(tmp_path / "spy"), *(p for p in sys.path if p)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("SPIED", str(log))

    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    bomb, vast = tmp_path / "bomb.safetensors", tmp_path / "vast.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Command()}, bomb)
    torch.save({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, vast)
    for path, reason in ((bomb, "posix.system"), (vast, "more memory")):
        assert main(["generate", "a", "--model", str(path)]) == 3
        assert "--allow-pickle" in capsys.readouterr().err
        before = log.read_text() if log.exists() else ""
        assert main(["generate", "a", "--model", str(path), "--allow-pickle"]) == 3
        said = capsys.readouterr().err
        assert log.read_text() == before + "a child ran\n"
        assert reason in said
        assert said.count("\n") == 1
    assert not (tmp_path / "owned").exists()


def calls(tree: ast.AST) -> list[tuple[str, dict[str, ast.expr]]]:
    """Every call's dotted name and its keywords."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [(ast.unparse(n.func), {k.arg: k.value for k in n.keywords if k.arg}) for n in nodes]


def test_no_call_unpickles_more_than_tensors() -> None:
    loads = 0
    for path in Path(sfumato.__file__).parent.rglob("*.py"):
        for name, keywords in calls(ast.parse(path.read_text())):
            where = f"{path}: {name}"
            for flag, safe in (("weights_only", True), ("allow_pickle", False)):
                if flag in keywords and (flag == "weights_only" or name.startswith("np.")):
                    value = keywords[flag]
                    assert isinstance(value, ast.Constant), where
                    assert value.value is safe, where
            if name == "torch.load":
                loads += 1
                assert "weights_only" in keywords, where
            assert name not in ("pickle.load", "pickle.loads", "eval", "exec", "os.system"), where
            assert "shell" not in keywords, where
    assert loads >= 2
    assert tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)
