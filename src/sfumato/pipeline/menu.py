"""What a request can choose from: samplers, spacings, guidance, as plain data."""

from __future__ import annotations

import math
from typing import Any


def menu() -> dict[str, list[dict[str, Any]]]:
    """Samplers, spacings and guidance with their settings and other programs' names for them."""
    from sfumato.diffusion import GUIDANCE, SAMPLERS, SPACINGS

    samplers = [
        {
            "name": s.name,
            "order": s.order,
            "calls": s.calls,
            "stochastic": s.stochastic,
            "settings": _plain(s.settings),
            "aliases": list(s.aliases),
            "summary": s.summary,
        }
        for s in SAMPLERS.values()
    ]
    spacings = [
        {"name": s.name, "settings": _plain(s.settings), "aliases": list(s.aliases), "summary": s.summary}
        for s in SPACINGS.values()
    ]
    guidance = [{"name": name, "summary": _first_sentence(g.__doc__)} for name, g in GUIDANCE.items()]
    return {"samplers": samplers, "spacings": spacings, "guidance": guidance}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON can say them: without bound is None."""
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in settings.items()}


def _first_sentence(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0].rstrip(".")
