"""The recipes in the repository: each can be read, and names a task that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.training.recipe import load_recipe
from sfumato.training.tasks import TASKS

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if p.name != "emoji.yaml")  # that one makes the corpus


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_a_recipe_can_be_read(path: Path) -> None:
    assert load_recipe(path, []).task in TASKS


def test_no_two_recipes_share_a_run() -> None:
    names = [load_recipe(path, []).name for path in RECIPES]
    assert sorted(names) == sorted(set(names))
