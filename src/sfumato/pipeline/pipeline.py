"""From a request to pictures: words encoded, noise drawn, a sampler's loop over a guided denoiser, pixels.

Shapes: n pictures; x (n, C, h, w); pictures (n, 3, H, W) in [−1, 1]; a guided batch is 2k rows, words first.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.diffusion import GUIDANCE, SAMPLERS, SPACINGS, Denoiser, NoiseLevel, Pair, Path, Prediction, Step
from sfumato.diffusion.level import NO_PICTURE
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families import public_name
from sfumato.families.additions import Lora
from sfumato.families.model import Conditioning, Model
from sfumato.pipeline.noise import FreshNoise, start
from sfumato.pipeline.picture import Picture, Pixels
from sfumato.pipeline.request import Request


class Pipeline:
    """A model, ready to serve requests; it keeps nothing of them, so threads may share it.

    Args:
        model: the model; its network is put into evaluation mode.
        batch: how many pictures the network sees at once. 1 makes each picture the same to the last bit
            whatever it is made beside; more may be faster, and differ by rounding (about 2e-5).
    """

    def __init__(self, model: Model, batch: int = 1) -> None:
        if batch < 1:
            raise BadRequest(f"batch must be at least 1, not {batch}")
        self.model, self.batch = model, batch
        model.network.eval()

    def generate(self, prompt: str, **settings: Any) -> list[Picture]:
        """Make pictures; the settings are the fields of ``Request``."""
        request = Request.from_dict({"prompt": prompt, **settings})
        return [event for event in self.run(request) if isinstance(event, Picture)]

    def run(self, request: Request) -> Iterator[Step | Picture]:
        """Check a request at once, then yield a sampler's steps, all n pictures in each, then the pictures.

        A step's ``preview`` is the predicted picture as the network sees it; ``pixels`` makes it visible.
        """
        request = request.resolve(self.model)
        return self._run(request, self.path(request))

    def path(self, request: Request) -> Path:
        """Return the noise levels that a request's pictures visit; BadRequest for one that cannot be served."""
        request = request.resolve(self.model)
        assert request.spacing is not None
        assert request.steps is not None
        assert request.width is not None
        assert request.height is not None
        settings = self.model.spacings(request.width, request.height).get(request.spacing, {})
        path = SPACINGS[request.spacing](self.model.schedule, request.steps, **settings)
        if self.model.parameterization.det(path[0]) == 0:
            raise BadRequest(NO_PICTURE)
        return path

    def initial_noise(self, request: Request) -> Tensor:
        """Return the unit-variance noise that the pictures start from, float32 (n, C, h, w)."""
        request = request.resolve(self.model)
        return torch.from_numpy(start(_seeds(request), self._shape(request))).to(self.device)

    def pixels(self, x: Tensor) -> list[Pixels]:
        """Decode x (n, C, h, w) into uint8 pictures (H, W, 3).

        Raises BadCheckpoint if the decoder overflows even in a wider type.
        """
        pictures = torch.cat([self._decode(part) for part in x.split(self.batch)])
        scaled = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return list(np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy()))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.network.parameters()).device

    def _run(self, request: Request, path: Path) -> Iterator[Step | Picture]:
        assert request.sampler is not None
        seeds, first = _seeds(request), path[0]
        x = self.initial_noise(request) * math.sqrt(first.alpha**2 + first.sigma**2)
        settings = {} if request.eta is None else {"eta": request.eta}
        for step in SAMPLERS[request.sampler](self.denoiser(request), x, path, FreshNoise(seeds), **settings):
            x = step.x
            yield step
        name, made_with = public_name(self.model), self._made_with()
        for seed, pixels in zip(seeds, self.pixels(x), strict=True):
            one = replace(request, seed=seed, n=1)
            yield Picture(pixels, one, name, self.model.hash, made_with, self.model.ingredients)

    def denoiser(self, request: Request) -> Denoiser:
        """Bind the network to the words of a resolved request, and guide it."""
        assert request.width is not None
        assert request.height is not None
        assert request.guidance is not None
        plain = request.guidance == 1 or self.model.distilled
        with torch.inference_mode():
            words = dict(self.model.encode([request.prompt] if plain else [request.prompt, request.negative]))
            rows = 1 if plain else 2
            for key, value in self.model.situate(request.width, request.height, request.guidance).items():
                words[key] = value.to(self.device).expand(rows, *value.shape[1:])

        def predict(x: Tensor, level: NoiseLevel, rows: int) -> list[Prediction]:
            """The predictions for x under each of the first rows of words, from one batch."""
            parts: list[list[Prediction]] = []
            for part in x.split(self.batch):
                conditioning = {k: v[:rows].repeat_interleave(len(part), 0) for k, v in words.items()}
                out = self._predict(part.repeat(rows, 1, 1, 1), level, conditioning)
                parts.append([Prediction(*both) for both in zip(*(y.split(len(part)) for y in out), strict=True)])
            return [Prediction(*(torch.cat(y) for y in zip(*row, strict=True))) for row in zip(*parts, strict=True)]

        def strong(x: Tensor, level: NoiseLevel) -> Prediction:
            return predict(x, level, 1)[0]

        def weak(x: Tensor, level: NoiseLevel) -> Prediction:
            return predict(x, level, 2)[1]

        def batch(x: Tensor, level: NoiseLevel) -> tuple[Prediction, Prediction]:
            first, second = predict(x, level, 2)
            return first, second

        if plain:
            return strong
        guidance = GUIDANCE["cfg"](request.guidance)
        if request.guidance_rescale > 0:
            guidance = GUIDANCE["rescale"](guidance, request.guidance_rescale)
        if request.guidance_interval is not None:
            guidance = GUIDANCE["interval"](guidance, *request.guidance_interval)
        return guidance(Pair(strong, weak, batch))

    def _predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning) -> Prediction:
        """Call the network on x (B, C, h, w) with conditioning of B rows, and split x by what it says."""
        p = self.model.parameterization
        clock = torch.full((len(x),), p.clock(level), dtype=torch.float32, device=x.device)
        out = self._call(self.model.network, p.gain(level) * x, clock, conditioning)
        if not out.isfinite().all():
            if not x.isfinite().all():
                raise BadRequest("the picture grew beyond all numbers: try less guidance, or another sampler")
            out = self._call(self._wide_network, p.gain(level) * x, clock, conditioning)
            if not out.isfinite().all():
                raise BadCheckpoint(
                    f"model {self.model.name!r} gives NaN, also in a wider type: its weights are damaged"
                )
        return p(x, level, out)

    def _call(self, network: nn.Module, x: Tensor, clock: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = next(network.parameters()).dtype
        words = {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditioning.items()}
        with torch.inference_mode():  # closed before anything is yielded: a caller's own mode is never touched
            return network(x.to(dtype), clock, **words).to(x.dtype)

    @cached_property
    def _wide_network(self) -> nn.Module:
        """The network in the next wider type, for numbers that overflow its own."""
        narrow = next(self.model.network.parameters()).dtype
        return copy.deepcopy(self.model.network).to(_wider(narrow))

    def _decode(self, x: Tensor) -> Tensor:
        for dtype in (x.dtype, _wider(x.dtype)):
            with torch.inference_mode():
                pictures = self.model.decode(x.to(dtype))
            if x.isfinite().all() and pictures.isfinite().all():
                return pictures.float()
        raise BadCheckpoint(f"model {self.model.name!r} made NaN instead of a picture, also in a wider type")

    def _shape(self, request: Request) -> tuple[int, int, int]:
        assert request.width is not None
        assert request.height is not None
        m = self.model
        return m.channels, request.height // m.factor, request.width // m.factor

    def _made_with(self) -> dict[str, str | int]:
        return {
            "sfumato": version("sfumato"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }


def load(
    path_or_name: str | os.PathLike[str] | None = None,
    *,
    batch: int = 1,
    loras: Sequence[Lora] = (),
    embeddings: Mapping[str, str | os.PathLike[str]] | None = None,
    vae: str | os.PathLike[str] | None = None,
    controlnets: Sequence[str | os.PathLike[str]] = (),
    variant: str | None = None,
    allow_pickle: bool = False,
    partial: bool = False,
) -> Pipeline:
    """Load a model by its weight file's path or its name, by default the one built in, as a pipeline.

    Args:
        batch: how many pictures the network sees at once; see ``Pipeline``.
        loras: files of LoRAs to add, alone (at weight 1) or as pairs of path and weight.
        embeddings: words learned by textual inversion: how each is written in prompts → its file.
        vae: an autoencoder to use instead of the model's own.
        controlnets: files or folders of ControlNets, one for each control picture.
        variant: which files of a folder to take, such as "fp16".
        allow_pickle: read .ckpt, .pt and .bin files too, in a child process that may build tensors alone.
        partial: let missing, extra and misshaped tensors pass; the model's card tells which.

    Raises BadRequest if there is no such model, BadCheckpoint if a file is damaged, foreign or does not fit.
    """
    from sfumato import families

    name = None if path_or_name is None else os.fspath(path_or_name)
    additions = families.Additions.of(loras, embeddings, vae, controlnets)
    return Pipeline(families.load(name, additions, variant=variant, allow_pickle=allow_pickle, partial=partial), batch)


def _seeds(request: Request) -> list[int]:
    assert request.seed is not None
    return [request.seed + i for i in range(request.n)]


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32
