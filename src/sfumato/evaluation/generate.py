"""A model's pictures for captions. What is made is kept, so an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BadRequest
from sfumato.evaluation.cache import Cache, content_hash
from sfumato.families.clip import Critic
from sfumato.pipeline.lockstep import Lockstep
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request
from sfumato.pixels import Pixels

PART = 16  # pictures kept at a time


def base_request(
    pipe: Pipeline,
    *,
    seed: int = 0,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    best_of: int = 1,
) -> Request:
    """Return the resolved request that every picture shares, but for prompt and seed; raises BadRequest."""
    asked = Request("any", seed=seed, steps=steps, sampler=sampler, guidance=guidance, best_of=best_of, upscale=1)
    request = asked.resolve(pipe.model)
    if request.width != request.height:
        raise BadRequest(f"model {pipe.model.name!r} makes {request.width}x{request.height}; only squares are compared")
    return request


def generate(
    pipe: Pipeline,
    request: Request,
    captions: Sequence[str],
    cache: Cache,
    on_pictures: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Return one picture per caption, uint8 (N, 3, H, W); picture i is the request's nth.

    ``on_pictures`` is told how many more there are, 0 at every step between; what it raises ends it all.
    """
    assert request.seed is not None
    shared = {k: v for k, v in request.to_dict().items() if k not in ("prompt", "seed")}
    made_by = made_of(pipe, request)
    parts: list[Tensor] = []
    for first in range(0, len(captions), PART):
        words = list(captions[first : first + PART])
        requests = [replace(request.nth(first + i), prompt=w) for i, w in enumerate(words)]
        # Batch and threads change pictures by rounding alone.
        key = content_hash(pipe.model.hash, made_by, shared, words, requests[0].seed)
        parts.append(
            cache.get_or_make("pictures", key, lambda of=requests: {"pictures": _make(pipe, of, on_pictures)})[
                "pictures"
            ]
        )
        on_pictures(len(words))
    return torch.cat(parts)


def made_of(pipe: Pipeline, request: Request) -> dict[str, Any]:
    """What decides a model's pictures beside its file and the request, empty for a plain model's.

    The files that it was made of besides, what it computes in, and the CLIP that chooses if one does.
    """
    model, found = pipe.model, {}
    if model.ingredients:
        found["ingredients"] = [i.to_dict() for i in model.ingredients]
    if (dtype := next(model.network.parameters()).dtype) != torch.float32:
        found["dtype"] = str(dtype).removeprefix("torch.")
    if request.best_of > 1 and isinstance(model.critic, Critic):
        found["chosen by"] = model.critic.clip.hash
    return found


def _make(pipe: Pipeline, requests: Sequence[Request], on_pictures: Callable[[int], None]) -> Tensor:
    together = Lockstep(pipe.model, PART)
    places = {together.start(request): i for i, request in enumerate(requests)}
    pixels: dict[int, Pixels] = {}
    while len(together):
        for run, event in together.advance():
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Picture):
                pixels[places[run]] = event.pixels
        on_pictures(0)
    return torch.from_numpy(np.stack([pixels[i] for i in range(len(requests))])).permute(0, 3, 1, 2).contiguous()


def fit_size(images: Tensor, size: int) -> Tensor:
    """Bring uint8 pictures (N, 3, H, W) to size × size as the real ones are, by Lanczos."""
    if images.shape[-2:] == (size, size):
        return images
    fitted = [
        np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.LANCZOS))
        for p in images
    ]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()
