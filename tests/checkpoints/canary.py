"""Run by ``test_canary`` in a process of its own: offers hostile files to the command and notes what it does besides.

python canary.py GOOD_FOLDER    (in an empty folder; prints a JSON record: kind → exit code, lines said, events)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import FOLDERS, HOSTILE, MARK, PICKLES

import sfumato
from sfumato.checkpoints import unpickle
from sfumato.cli import main

NAMES = [
    "../../etc/passwd", "a/../../b", "..", "../x", "a/..", "%2e%2e/x", "a/b/../../../c", "~root/x", "file:///etc/passwd",
    "https://localhost/x", "a/b@../../c", "\\\\host\\share", "a\0b", "a" * 5000, "\u202ea/b", "",
    CLIMBS := os.path.relpath("/etc/passwd"),
]  # fmt: skip

FORBIDDEN = {
    "exec", "compile", "os.system", "os.posix_spawn", "os.fork", "os.rename", "os.symlink", "subprocess.Popen",
    "ctypes.dlopen",
}  # fmt: skip
# How much memory there is, which --memory auto asks for.
MEMORY = ("/proc/meminfo", "/proc/self/maps", "/sys/fs/cgroup/")
events: list[str] = []
watching = False
HERE = os.getcwd()


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event == "import" and arguments[0] not in sys.modules and not arguments[0].startswith("sfumato."):
        events.append(f"import {arguments[0]}")
    elif event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3)
        if isinstance(path, int) or str(path) == os.devnull:
            return
        absolute = os.path.abspath(os.fspath(path) if not isinstance(path, bytes) else os.fsdecode(path))
        if writes and not (os.path.basename(absolute).startswith(".sfumato-") and absolute.endswith(".part")):
            events.append(f"open {absolute} for writing")
        if not writes and absolute.startswith(MEMORY):
            return
        if not absolute.startswith((HERE, str(Path(sfumato.__file__).parent), sys.prefix, sys.base_prefix)):
            events.append(f"open {absolute}")
    elif event in FORBIDDEN or event.startswith(("socket.", "os.exec", "shutil.", "pickle.")):
        events.append(event)


def watched(run: Callable[[], int]) -> dict[str, Any]:
    global watching
    said = io.StringIO()
    events.clear()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        watching = True
        try:
            code = run()
        finally:
            watching = False
    return {"code": code, "said": said.getvalue(), "events": sorted(set(events)), "mark": Path(MARK).exists()}


def generate(model: object, *more: str) -> int:
    asked = ["generate", "a fox", "--steps", "1", "--model", str(model), "--size", "16x16", "--out", "made.png", *more]
    return main(asked)


def unpickled(path: Path) -> int:
    """What the child that reads pickles does, here where it is watched."""
    try:
        unpickle.read(str(path))
    except Exception as e:
        sys.stderr.write(f"{path}: {unpickle._reason(e)}\n")
        return 3
    return 0


def run(good: Path) -> dict[str, Any]:
    import torch.utils.serialization.config  # noqa: F401  torch imports it when it first reads a pickle

    results: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        main(["generate", "a fox", "--steps", "1", "--model", str(good), "--size", "16x16", "--out", "warm.png"])
    file = Path("model.safetensors")
    for content in (b"", HOSTILE["key twice"], HOSTILE["gguf: cut tensor"]):  # what refusing imports by itself
        file.write_bytes(content)
        watched(lambda: generate(file))
    for kind, spoil in FOLDERS.items():
        shutil.rmtree("model", ignore_errors=True)
        shutil.copytree(good, "model")
        spoil(Path("model"))
        if kind == "python and auto_map":  # warm: errors of torch's import their own modules
            watched(lambda: generate("model"))
        results[f"folder: {kind}"] = watched(lambda: generate("model"))
    for kind, content in HOSTILE.items():
        file.write_bytes(content)
        results[kind] = watched(lambda: generate(file))
    for kind, content in PICKLES.items():
        file.write_bytes(content)
        results[f"pickle, not allowed: {kind}"] = watched(lambda: generate(file))
        results[f"pickle, allowed: {kind}"] = watched(lambda: unpickled(file))
    watched(lambda: main(["info", "warm"]))  # it is imported when it is first asked for
    for name in NAMES:
        results[f"name: {name[:40]!a}"] = watched(lambda name=name: generate(name))  # type: ignore[misc]
        results[f"name: {name[:40]!a} for info"] = watched(lambda name=name: main(["info", name]))  # type: ignore[misc]
    for flag in ("--lora", "--vae", "--denoiser", "--control", "--ip-adapter"):
        results[f"addition: {flag}"] = watched(lambda flag=flag: generate(good, flag, CLIMBS))  # type: ignore[misc]
    results["addition: --embedding"] = watched(lambda: generate(good, "--embedding", f"<a>={CLIMBS}"))
    return results


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2)  # what allocates without bound fails
    sys.addaudithook(hook)
    print(json.dumps(run(Path(sys.argv[1]).resolve())))
