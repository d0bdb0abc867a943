"""docs/training.md names settings and recipes that exist, and its recipe can be read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from sfumato.training.recipe import Recipe, build_recipe, load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/training.md").read_text()


def group(kind: Any) -> Any:
    """The dataclass that a field holds, optional or not; None for a plain value."""
    return next((k for k in (kind, *get_args(kind)) if dataclasses.is_dataclass(k)), None)


def exists(key: str) -> bool:
    kind: Any = Recipe
    for part in key.split("."):
        hints = get_type_hints(kind) if kind else {}
        if part not in hints:
            return False
        kind = group(hints[part])
    return True


def test_every_setting_named_exists() -> None:
    groups = {name for name, kind in get_type_hints(Recipe).items() if group(kind)}
    named = {key for key in re.findall(r"[`\s]([a-z_]+(?:\.[a-z_]+)+)", PAGE) if key.split(".")[0] in groups}
    named |= set(re.findall(r"`([a-z_]+): ", PAGE))
    assert len(named) > 15
    assert {key for key in named if not exists(key)} == set()


def test_its_recipes_and_those_it_names_can_be_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    recipes = [build_recipe(yaml.safe_load(block), [], "the guide") for block in blocks]
    assert [recipe.task for recipe in recipes] == ["denoiser", "distill"]
    assert all(recipe.model.build_schedule() is not None for recipe in recipes)
    names = set(re.findall(r"recipes/[\w-]+\.yaml", PAGE)) - {"recipes/emoji.yaml"}  # that one makes the corpus
    assert len(names) >= 5
    for name in names:
        load_recipe(ROOT / name, [])
