"""Words into pictures by diffusion.

    import sfumato
    pipe = sfumato.load()
    pictures = pipe.generate("a red fox", seed=0, steps=20, n=2)

Names are imported when they are first used: ``import sfumato`` alone loads neither torch nor NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.errors import BadCheckpoint, BadData, BadRequest, NoResources, SfumatoError
    from sfumato.pipeline.picture import Picture
    from sfumato.pipeline.pipeline import Pipeline, load
    from sfumato.pipeline.request import Request

__all__ = [
    "BadCheckpoint",
    "BadData",
    "BadRequest",
    "NoResources",
    "Picture",
    "Pipeline",
    "Request",
    "SfumatoError",
    "load",
]

_HOME = {
    "BadCheckpoint": "sfumato.errors",
    "BadData": "sfumato.errors",
    "BadRequest": "sfumato.errors",
    "NoResources": "sfumato.errors",
    "Picture": "sfumato.pipeline.picture",
    "Pipeline": "sfumato.pipeline.pipeline",
    "Request": "sfumato.pipeline.request",
    "SfumatoError": "sfumato.errors",
    "load": "sfumato.pipeline.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sfumato")
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
