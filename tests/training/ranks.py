"""What two ranks do in the tests, all in one process group: run by torchrun on a folder, one subfolder per scenario.

Each rank writes ``rank-R.json``: what its steps learned from, or the error that ended it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import Taught, Watched, few, run

from faults import write_pictures
from sfumato.data.config import DataConfig
from sfumato.data.pictures import load_pictures
from sfumato.errors import SfumatoError
from sfumato.training.denoiser import DenoiserTask
from sfumato.training.world import World, joined

FSDP = ("parallel=fsdp", "accumulate=3")


def learn(world: World, folder: Path, *overrides: str, task: type[DenoiserTask] = Watched, pictures: Any = None) -> Any:
    made: list[Any] = []

    class Kept(task):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(self)

    run(pictures or few(), folder, *overrides, task=Kept, world=world)
    return {"seen": getattr(made[0], "seen", [])}


def faulty(world: World, folder: Path, how: str) -> Any:
    """Something goes wrong on rank 1 alone, in its third step."""

    class Faulty(DenoiserTask):
        def fetch(self, places: range) -> Any:
            batch = super().fetch(places)
            if world.rank == 1 and places.start // self.recipe.batch == 2:
                if how == "memory":
                    raise MemoryError
                batch.x0[0] = float("nan")
            return batch

    return learn(world, folder, "steps=5", task=Faulty)


def lazy(world: World, folder: Path) -> Any:
    """A picture of rank 1's third step has gone bad since the run began; in the whole order it is not yet due."""
    root = folder.parent / "lazy-data"
    if world.main:
        write_pictures(root, 40)
    world.barrier()
    pictures = load_pictures(DataConfig(path=str(root), lazy=True, dropout=0.0), 8, Path())
    world.barrier()  # all have seen it whole
    place = 2 * 6 + 4  # rank 0 takes 12, 13, 14, rank 1 takes 15, 16, 17
    if world.main:
        (root / f"{pictures.order(0, 0)[place]:03}.png").write_bytes(b"<html>")
    world.barrier()
    return learn(world, folder, "data.captions=plain", pictures=pictures)


def full_disk(world: World, folder: Path, *overrides: str) -> Any:
    """After a whole checkpoint the disk is full."""
    from test_loop import files_of_at_most

    learn(world, folder, "steps=3", *overrides)
    with files_of_at_most(9_000):
        return learn(world, folder, *overrides)


def sharded_damaged(world: World, folder: Path) -> Any:
    """A byte of rank 1's last file changes: both fall back to the checkpoint before."""
    sharded = (*FSDP, "sharded=true", "steps=6")
    learn(world, folder, *sharded)
    world.barrier()
    if world.main:
        file = folder / "checkpoints/step-00000006/shard-00002-model-00001-of-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    world.barrier()
    return learn(world, folder, *sharded)


def other_data(world: World, folder: Path) -> Any:
    return learn(world, folder, pictures=few(20 + world.rank))


SCENARIOS: dict[str, Callable[[World, Path], Any]] = {
    "order": lambda world, folder: learn(world, folder),
    "order-workers": lambda world, folder: learn(world, folder, "workers=2"),
    "from-two": lambda world, folder: learn(world, folder, "steps=5"),
    "from-one": lambda world, folder: learn(world, folder, "workers=2"),
    "fsdp": lambda world, folder: learn(world, folder, *FSDP),
    "fsdp-from-two": lambda world, folder: learn(world, folder, "steps=5", *FSDP),
    "sharded": lambda world, folder: learn(world, folder, *FSDP, "sharded=true"),
    "sharded-from-two": lambda world, folder: learn(world, folder, "steps=5", *FSDP, "sharded=true"),
    "sharded-from-one": lambda world, folder: learn(world, folder, *FSDP, "sharded=true"),
    "sharded-damaged": sharded_damaged,
    "sharded-full-disk": lambda world, folder: full_disk(world, folder, *FSDP, "sharded=true"),
    "distill": lambda world, folder: learn(world, folder, "steps=4", task=Taught),
    "distill-fsdp": lambda world, folder: learn(world, folder, "steps=4", *FSDP, task=Taught),
    "nan": lambda world, folder: faulty(world, folder, "nan"),
    "memory": lambda world, folder: faulty(world, folder, "memory"),
    "lazy": lazy,
    "full-disk": full_disk,
    "other-data": other_data,
}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for name, scenario in SCENARIOS.items():
            folder = root / name
            try:
                found = scenario(world, folder)
            except (SfumatoError, MemoryError) as e:
                found = {"error": f"{type(e).__name__}: {e}", "code": getattr(e, "exit_code", None)}
            folder.mkdir(exist_ok=True)
            (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
            world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
