"""``sfumato train``: a recipe, or a folder of captioned pictures, into a model file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.console import Parser
from sfumato.errors import BadRequest

if TYPE_CHECKING:
    from sfumato.training.loop import Watch
    from sfumato.training.progress import Progress
    from sfumato.training.recipe import Recipe
    from sfumato.training.world import World


def main(argv: list[str]) -> int:
    """Run ``sfumato train`` with its arguments and return the exit code; raises SfumatoError for bad input."""
    parser = Parser(
        prog="sfumato train",
        description="Train a model. The same command resumes a run that was stopped.",
    )
    parser.add_argument("recipe", nargs="?", help="a YAML recipe; left out, a small pixel model")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as steps=2000")
    parser.add_argument("--data", metavar="PATH", help="folder of captioned pictures, .parquet or .tar")
    parser.add_argument("--run", metavar="DIR", help="where the run lives, also as run=DIR (default: runs/NAME)")
    args = parser.parse_intermixed_args(argv)
    overrides = list(args.overrides)
    if args.recipe and "=" in args.recipe:
        overrides.insert(0, args.recipe)
        args.recipe = None
    keys = [o.partition("=")[0] for o in overrides]
    keys += ["run"] if args.run is not None else []
    keys += ["data.path"] if args.data is not None else []
    if twice := next((k for k in keys if keys.count(k) > 1), None):
        raise BadRequest(f"{twice} is given twice: leave one of them out")
    for place in [o for o in overrides if o.startswith("run=")]:  # torchrun takes --run for an option of its own
        overrides.remove(place)
        args.run = place.removeprefix("run=")

    from sfumato.files import check_writable
    from sfumato.training.recipe import build_recipe, load_recipe

    if args.recipe is None and args.data is None:
        raise BadRequest("name a recipe (such as recipes/tiny.yaml) or pictures by --data FOLDER")
    if args.recipe is not None and Path(args.recipe).is_dir():
        raise BadRequest(f"{args.recipe} is a folder, not a recipe: train on its pictures with --data {args.recipe}")
    if args.recipe is None:
        recipe, root = build_recipe({}, overrides, "settings"), Path()
    else:
        recipe, root = load_recipe(Path(args.recipe), overrides), Path(args.recipe).parent
    if args.data is not None:
        path = args.data if args.data == "sample" else str(Path(args.data).resolve())
        recipe = replace(recipe, data=replace(recipe.data, path=path))
    run = Path(args.run) if args.run else Path("runs") / recipe.name
    check_writable(run)

    from sfumato.training.world import joined

    with joined(recipe.device) as world:
        final = _train(recipe, root, run, world)
        if world.main:
            print(final)
    return 0


def _train(recipe: Recipe, root: Path, run: Path, world: World) -> Path:
    import torch

    from sfumato.training.allocator import keep_freed_memory
    from sfumato.training.loop import train
    from sfumato.training.progress import Progress
    from sfumato.training.tasks import build_task

    keep_freed_memory()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    progress = Progress(recipe.log_every, quiet=not world.main)
    task = build_task(recipe, root, run, world, progress)
    parameters = sum(p.numel() for p in task.module.parameters())
    progress.note(f"{parameters / 1e6:.2f} million parameters; run in {run}")
    watch = world.together(lambda: _watch(task.recipe, root, progress) if world.main else None)
    return train(task, recipe, run, progress, world, watch)


def _watch(recipe: Recipe, root: Path, progress: Progress) -> Watch | None:
    if not recipe.evaluate_every:
        return None
    from sfumato.training.watch import build_watch

    return build_watch(recipe, root, progress.note)
