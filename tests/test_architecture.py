"""Arrows between the rooms of the house point down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sfumato"

LEAVES = {"errors", "console", "files", "config", "decode", "pixels"}  # modules that any room may use
ROOMS: dict[str, set[str]] = {
    "diffusion": set(),
    "networks": set(),
    "checkpoints": set(),
    "text": {"networks"},
    "data": set(),
    "families": {"diffusion", "networks", "text", "checkpoints"},
    "pipeline": {"families", "networks", "diffusion"},
    "inside": {"pipeline", "families", "networks", "text", "diffusion"},
    "training": {"diffusion", "networks", "text", "checkpoints", "families", "data", "evaluation", "pipeline"},
    "evaluation": {"pipeline", "families", "checkpoints", "data", "networks"},
    "search": {"evaluation", "families", "data"},
    "server": {"inside", "pipeline", "families", "diffusion"},
    "cli": {
        "pipeline",
        "training",
        "evaluation",
        "search",
        "inside",
        "server",
        "families",
        "checkpoints",
        "diffusion",
        "data",
    },
    "__init__": {"pipeline"},
    "__main__": {"cli"},
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of sfumato that a file imports, anywhere in it; type annotations count too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where an arrow points"
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sfumato."):
            names.add(node.value)  # given to import_module
    rooms = {n.split(".")[1] for n in names if n.startswith("sfumato.")}
    return {r for r in rooms if (SOURCE / r).is_dir() or (SOURCE / f"{r}.py").is_file()}


def test_every_room_is_known() -> None:
    rooms = {room_of(p) for p in SOURCE.rglob("*.py")}
    assert rooms <= ROOMS.keys() | LEAVES, f"say in ROOMS which arrows may leave {rooms - ROOMS.keys() - LEAVES}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_down(path: Path) -> None:
    room = room_of(path)
    allowed = ({"errors"} if room in LEAVES else ROOMS[room] | LEAVES) | {room}
    assert imported_rooms(path) <= allowed


def test_the_rooms_themselves_have_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ROOMS):
        ready = {r for r, arrows in ROOMS.items() if r not in done and arrows <= done}
        assert ready, f"a circle among {ROOMS.keys() - done}"
        done |= ready


@pytest.mark.parametrize("room", ["diffusion", "errors", "checkpoints"])
def test_torch_is_not_imported_at_the_top_of(room: str) -> None:
    """These rooms may name torch's types, and import it inside functions."""
    files = [p for p in SOURCE.rglob("*.py") if room_of(p) == room]
    assert files
    for path in files:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("torch", "safetensors", "tokenizers") for n in names), path


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their names alone."""
    names = [p.name for p in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
