"""Synthetic pictures with splits."""

from __future__ import annotations

import pytest
from shapes import drawings

from sfumato.evaluation.truth import Truth, draw


@pytest.fixture(scope="session")
def truth() -> Truth:
    """Twenty-four captions drawn from either split."""
    return draw(*drawings(), n=24)
