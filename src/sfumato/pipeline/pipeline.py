"""From a request to pictures: words encoded, noise drawn, a sampler's loop over a guided denoiser, pixels.

Shapes: n pictures, with ``best_of`` all that are drawn; x (n, C, h, w); pictures (n, 3, H, W) in [−1, 1]; a guided
batch is 2k rows, words first.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.diffusion import (
    GUIDANCE,
    SAMPLERS,
    SPACINGS,
    Denoiser,
    NoiseLevel,
    Pair,
    Path,
    Prediction,
    Step,
    q_sample,
    repaint,
    slerp,
)
from sfumato.diffusion.level import NO_PICTURE
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families import public_name
from sfumato.families.additions import Lora
from sfumato.families.common import Way
from sfumato.families.model import Conditioning, Model
from sfumato.networks.stored import in_dtype
from sfumato.pipeline.canvas import MASKS_GROUND, Canvas, canvas_of, cover, covering, upright
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.noise import FreshNoise, normal, start
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.request import GUIDES, Request, each, each_range
from sfumato.pipeline.tiles import mosaic, tiled
from sfumato.pixels import Pixels, eight_bits, signed


@dataclass(frozen=True, eq=False)
class Scene:
    """A canvas as the network works on it.

    Args:
        known: the encoded picture (1, C, h, w).
        mask: 1 where to repaint (h, w).
    """

    canvas: Canvas | None = None
    known: Tensor | None = None
    mask: Tensor | None = None


NOTHING = Scene()
UNTILED, TILE = 1 << 22, 1024  # pixels of a picture, and of a tile's side
MIN_TILE = 8  # cells


class Pipeline:
    """A model, ready to serve requests; it keeps nothing of them, so threads may share it.

    Args:
        model: the model; its network is put into evaluation mode.
        batch: how many pictures the network sees at once. 1 makes each picture the same to the last bit
            whatever it is made beside; more is faster, and for most networks makes the same (``networks.blocks.
            of_vectors``), but a library beneath torch may round by a batch's size: 1e-5 at most was seen. Pictures
            go through the autoencoder one by one all the same.
        tile: side in pixels of the tiles in which larger pictures go through the autoencoder; 0 for none. By default
            pictures of more than ``UNTILED`` pixels go in tiles of ``TILE``.
    """

    def __init__(self, model: Model, batch: int = 1, tile: int | None = None) -> None:
        if batch < 1:
            raise BadRequest(f"batch must be at least 1, not {batch}")
        if tile is not None and tile != 0 and tile < MIN_TILE * model.factor:
            raise BadRequest(f"tile must be 0 or at least {MIN_TILE * model.factor} pixels, not {tile}")
        self.model, self.batch, self.tile = model, batch, tile
        model.network.eval()

    def generate(self, prompt: str, **settings: Any) -> list[Picture]:
        """Make pictures; the settings are the fields of ``Request``."""
        request = Request.from_dict({"prompt": prompt, **settings})
        return [event for event in self.run(request) if isinstance(event, Picture)]

    def run(self, request: Request) -> Iterator[Step | Picture]:
        """Check a request at once, then yield a sampler's steps, all drawn pictures in each, then the n pictures.

        A step's ``preview`` is the predicted picture as the network sees it; ``pixels`` makes it visible.
        """
        request = request.resolve(self.model)
        for name in GUIDES:  # before the first step
            for picture in each(getattr(request, name)):
                upright(name, picture)
        return self._run(request, self.paths(request), canvas_of(request, self.model))

    def paths(self, request: Request) -> list[Path]:
        """Return the noise levels that a request's pictures visit and, with ``hires``, those of the second round.

        Raises BadRequest for a request that cannot be served.
        """
        request = request.resolve(self.model)
        paths = [self._path(request, *one) for one in request.rounds(self.model.multiple)]
        for path in paths:
            control_spans(request, path)
        return paths

    def path(self, request: Request) -> Path:
        """Return the noise levels that a request's pictures visit; BadRequest for one that cannot be served."""
        return self.paths(request)[0]

    def steps(self, request: Request) -> int:
        """Count the steps that a run of this request yields."""
        return sum(len(path) - 1 for path in self.paths(request))

    def warnings(self, request: Request) -> tuple[str, ...]:
        """Tell what goes in otherwise than it is given: words that do not fit, a picture that is cut.

        Raises BadRequest for a request that cannot be served.
        """
        request = request.resolve(self.model)
        return self._warnings(request, canvas_of(request, self.model))

    def start(self, request: Request) -> Tensor:
        """Return x at the first level of a request's path, float32 (n, C, h, w): noise, or a picture under noise."""
        request = request.resolve(self.model)
        return self._start(request, self._scene(canvas_of(request, self.model)), self.path(request)[0])

    def denoiser(self, request: Request) -> Denoiser:
        """Bind the network to the words, the size and the picture of a request, and guide it."""
        request = request.resolve(self.model)
        scene = self._scene(canvas_of(request, self.model))
        return self._denoiser(request, self._words(request), request.size, scene, self.path(request))

    def initial_noise(self, request: Request) -> Tensor:
        """Return the unit-variance noise that the pictures start from, float32 (n, C, h, w)."""
        request = request.resolve(self.model)
        shape, w = self._shape(request), request.variation_strength
        noise = start(_seeds(request), shape)
        if w > 0:
            others = (request.draw(j).variation_seed for j in range(request.drawn))
            pairs = zip(noise, others, strict=True)
            noise = np.stack([slerp(a, normal(b or 0, 0, shape), w, batch_dims=0) for a, b in pairs])
        return torch.from_numpy(noise).to(self.device)

    def pixels(self, x: Tensor) -> list[Pixels]:
        """Decode x (n, C, h, w) into uint8 pictures (H, W, 3).

        Raises BadCheckpoint if the decoder overflows even in a wider type.
        """
        return _visible(torch.cat([self._decode(part) for part in x.split(1)]))

    def glimpse(self, x: Tensor) -> list[Pixels]:
        """Decode x (n, C, h, w) as ``pixels`` does, but by the model's quicker and rougher decoder if it has one."""
        if self.model.preview is None:
            return self.pixels(x)
        return _visible(self._finite(self.model.preview, x))

    def latents(self, pictures: Sequence[Pixels]) -> Tensor:
        """Encode uint8 pictures (H, W, 3) of one size into what the network works on, float32 (n, C, h, w).

        Raises BadRequest if the model has no encoder, BadCheckpoint if it overflows even in a wider type.
        """
        y = signed(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))  # (n, 3, H, W)
        return torch.cat([self._encode(part) for part in y.split(1)])

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.network.parameters()).device

    def _path(self, request: Request, size: tuple[int, int], strength: float | None) -> Path:
        assert request.spacing is not None
        assert request.steps is not None
        settings = self.model.spacings(*size).get(request.spacing, {})
        path = SPACINGS[request.spacing](self.model.schedule, request.steps, **settings)
        path = path if strength is None else path.last(strength)
        if self.model.parameterization.det(path[0]) == 0:
            raise BadRequest(NO_PICTURE)
        return path

    def _run(self, request: Request, paths: list[Path], canvas: Canvas | None) -> Iterator[Step | Picture]:
        words, scene = self._words(request), self._scene(canvas)
        fresh, x = FreshNoise(_seeds(request)), self._start(request, scene, paths[0][0])
        denoiser = self._denoiser(request, words, request.size, scene, paths[0])
        x = yield from _walk(request, denoiser, x, paths[0], fresh)
        pixels = self.pixels(x)
        if canvas is not None:
            pixels = [canvas.keep(p) for p in pixels]
        if request.hires is not None:
            size = request.enlarged(self.model.multiple)
            known = self.latents([np.asarray(cover(Image.fromarray(p), size)) for p in pixels])
            x = q_sample(known, fresh(known), paths[1][0])
            denoiser = self._denoiser(request, words, size, NOTHING, paths[1])
            x = yield from _walk(request, denoiser, x, paths[1], fresh)
            pixels = self.pixels(x)
        name, made_with, warnings = public_name(self.model), self._made_with(), self._warnings(request, canvas)
        for j in self._chosen(request, pixels):
            picture, one = pixels[j] if request.upscale == 1 else self._upscale(pixels[j]), request.draw(j)
            yield Picture(picture, one, name, self.model.hash, made_with, self.model.ingredients, warnings)

    def _chosen(self, request: Request, pixels: Sequence[Pixels]) -> Sequence[int]:
        """Of each ``best_of`` drawn pictures, the index of the one that fits the prompt best."""
        if request.best_of == 1:
            return range(request.n)
        assert self.model.critic is not None
        pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # (n·k, 3, H, W)
        with torch.inference_mode():
            scores = self.model.critic(pictures, request.prompt).view(request.n, request.best_of)
        return [i * request.best_of + int(k) for i, k in enumerate(scores.argmax(dim=1))]

    def _upscale(self, pixels: Pixels) -> Pixels:
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device) / 255  # (1, 3, H, W)
        with torch.inference_mode():
            y = self._upscaler(x)[0].clamp(0, 1)
        return np.ascontiguousarray((y * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())

    @cached_property
    def _upscaler(self) -> nn.Module:
        from sfumato.families.upscaler import load_upscaler

        return load_upscaler().to(self.device)

    def _scene(self, canvas: Canvas | None) -> Scene:
        if canvas is None:
            return NOTHING
        mask = None if canvas.mask is None else torch.from_numpy(canvas.cells(self.model.factor)).to(self.device)
        return Scene(canvas, self.latents([canvas.pixels]), mask)

    def _start(self, request: Request, scene: Scene, level: NoiseLevel) -> Tensor:
        """x at the first level. Where all of a part is to be painted anew, nothing of what was there remains."""
        noise = self.initial_noise(request)
        alone = noise * math.sqrt(level.alpha**2 + level.sigma**2)
        if scene.known is None:
            return alone
        x = q_sample(scene.known, noise, level)
        if scene.mask is not None and request.strength == 1 and self.model.inpaints:
            return alone  # it is told what is there
        return x if scene.mask is None or request.strength != 1 else scene.mask * alone + (1 - scene.mask) * x

    def _words(self, request: Request) -> dict[str, Tensor]:
        """The conditioning of a request's prompts, a row each: the prompt, what it goes towards, what guides away."""
        prompts = [request.prompt] if request.prompt_to is None else [request.prompt, request.prompt_to]
        if request.guidance != 1 and not self.model.distilled:
            prompts.append(request.negative)
        with torch.inference_mode():
            return dict(self.model.encode(prompts))

    def _told(self, size: tuple[int, int], scene: Scene) -> Tensor:
        """What a network that inpaints is told: the mask, and the encoded picture that is grey under it."""
        canvas = scene.canvas or Canvas(np.zeros((*size[::-1], 3), np.uint8), None, ())
        mask = torch.from_numpy(canvas.cells(self.model.factor))  # (h, w)
        left = np.zeros(1, np.float32) if canvas.mask is None else (canvas.mask == 0).astype(np.float32)[..., None]
        picture = torch.from_numpy((canvas.pixels / 127.5 - 1).astype(np.float32) * left)  # (H, W, 3), 0 is grey
        return torch.cat([mask[None, None].to(self.device), self._encode(picture.permute(2, 0, 1)[None])], dim=1)

    def _denoiser(
        self, request: Request, words: Mapping[str, Tensor], size: tuple[int, int], scene: Scene, path: Path
    ) -> Denoiser:
        guided = self._guided(request, words, size, scene, path)
        if scene.known is None or scene.mask is None or self.model.inpaints:
            return guided
        return repaint(guided, scene.known, scene.mask)

    def _guided(
        self, request: Request, words: Mapping[str, Tensor], size: tuple[int, int], scene: Scene, path: Path
    ) -> Denoiser:
        assert request.guidance is not None
        words, rows = dict(words), len(next(iter(words.values())))
        wanted = 1 if request.prompt_to is None else 2  # rows
        told = dict(self.model.situate(*size, request.guidance))
        if self.model.inpaints:
            told["picture"] = self._told(size, scene)
        for name, (scale, _) in GUIDES.items():
            if pictures := each(getattr(request, name)):
                guide, images = self.model.guides[name], [upright(name, picture) for picture in pictures]
                scales = each(getattr(request, scale), len(images))
                told |= guide.tell([cover(image, size) for image in images] if guide.sized else images, scales)
        spans = control_spans(request, path)
        for key, value in told.items():  # one row, or two of which the second goes without the words
            with_words, without = (
                part.to(self.device).expand(n, *value.shape[1:])
                for part, n in ((value[:1], wanted), (value[-1:], rows - wanted))
            )
            words[key] = torch.cat([with_words, without])

        def predict(x: Tensor, level: NoiseLevel, rows: int) -> list[Prediction]:
            """The predictions for x under each of the first rows of words, from one batch."""
            parts: list[list[Prediction]] = []
            for part in x.split(self.batch):
                conditioning = {k: v[:rows].repeat_interleave(len(part), 0) for k, v in words.items()}
                if spans:
                    scale = self.model.guides["control_image"].scale
                    counts = [low <= level.log_snr < high for low, high in spans]
                    conditioning[scale] = conditioning[scale] * torch.tensor(counts, device=x.device)
                out = self._predict(part.repeat(rows, 1, 1, 1), level, conditioning)
                parts.append([Prediction(*both) for both in zip(*(y.split(len(part)) for y in out), strict=True)])
            return [Prediction(*(torch.cat(y) for y in zip(*row, strict=True))) for row in zip(*parts, strict=True)]

        def mix(first: Prediction, *second: Prediction) -> Prediction:
            """Between two prompts: a mix of what each foresees, alike for words, classes and any network."""
            return first.lerp(second[0], request.mix) if second else first

        def strong(x: Tensor, level: NoiseLevel) -> Prediction:
            return mix(*predict(x, level, wanted))

        def weak(x: Tensor, level: NoiseLevel) -> Prediction:
            return predict(x, level, rows)[-1]

        def batch(x: Tensor, level: NoiseLevel) -> tuple[Prediction, Prediction]:
            *first, second = predict(x, level, rows)
            return mix(*first), second

        if rows == wanted:
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
                    f"model {self.model.name!r} gives NaN, also in a wider type: {_damage(self.model.network)}"
                )
        return p(x, level, out)

    def _call(self, network: nn.Module, x: Tensor, clock: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = next(network.parameters()).dtype
        words = {
            # Sequences take the network's type. Vectors are never narrowed: a size would be rounded; networks do that.
            k: v.to(dtype if v.ndim > 2 else torch.promote_types(v.dtype, dtype)) if v.is_floating_point() else v
            for k, v in conditioning.items()
        }
        with torch.inference_mode():  # closed before anything is yielded: a caller's own mode is never touched
            return network(x.to(dtype), clock, **words).to(x.dtype)

    @cached_property
    def _wide_network(self) -> nn.Module:
        """The network in the next wider type, for numbers that overflow its own."""
        narrow = next(self.model.network.parameters()).dtype
        return in_dtype(self.model.network, _wider(narrow))

    def _encode(self, pictures: Tensor) -> Tensor:
        if self.model.encode_picture is None:
            raise BadRequest(f"model {self.model.name!r} has no encoder for pictures")
        return self._in_tiles(self.model.encode_picture, pictures.to(self.device), self.model.factor)

    def _decode(self, x: Tensor) -> Tensor:
        return self._in_tiles(self.model.decode, x, 1)

    def _in_tiles(self, way: Callable[[Tensor], Tensor], x: Tensor, unit: int) -> Tensor:
        """Go one way through the autoencoder, in tiles where the picture is large; a cell of x is ``unit`` wide."""
        factor = self.model.factor
        h, w = (side // unit * factor for side in x.shape[-2:])  # pixels
        tile = (TILE if h * w > UNTILED else 0) if self.tile is None else self.tile
        if not tile or factor == 1 or max(h, w) <= tile:
            return self._finite(way, x)
        side = max(MIN_TILE, tile // factor)
        if isinstance(way, Way):
            way = way.normalized_by(mosaic(x, side, unit))
        return tiled(lambda part: self._finite(way, part), x, side, unit, factor / unit**2)

    def _finite(self, way: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Go one way through the autoencoder, and once more in a wider type if numbers overflow."""
        for dtype in (x.dtype, _wider(x.dtype)):
            with torch.inference_mode():
                y = way(x.to(dtype))
            if x.isfinite().all() and y.isfinite().all():
                return y.float()
        why = _damage(way.network) if isinstance(way, Way) else "its autoencoder is damaged"
        raise BadCheckpoint(f"model {self.model.name!r} made NaN instead of a picture, also in a wider type: {why}")

    def _shape(self, request: Request) -> tuple[int, int, int]:
        width, height = request.size
        return self.model.channels, height // self.model.factor, width // self.model.factor

    def _warnings(self, request: Request, canvas: Canvas | None) -> tuple[str, ...]:
        cut = {name: self.model.truncated(getattr(request, name) or "") for name in ("prompt", "negative", "prompt_to")}
        told = [f"{k}: too long for this model: its last {n} tokens are left out" for k, n in cut.items() if n]
        if (unread := self._unread(request)) > cut["prompt"]:
            told.append(f"best_of: its CLIP chooses without the prompt's last {unread} tokens: they are too many")
        for name in cut:
            if tag := _TAG.search(getattr(request, name) or ""):
                told.append(f"{name}: {tag[0]} is read as plain words: add files to the model where it is loaded")
        given: list[tuple[str, PictureFile, Sequence[str]]] = []
        if canvas is not None and request.init is not None:
            given.append(("init", request.init, canvas.told))
        if request.mask is not None:
            given.append(("mask", request.mask, request.mask.told("mask", MASKS_GROUND)))
        for name in GUIDES:
            for picture in each(getattr(request, name)):
                changes = list(picture.told(name))
                if self.model.guides[name].sized:
                    changes += covering(picture.image(name).size, request.size)
                given.append((name, picture, changes))
        told += [f"{PurePath(p.name).name or what}: {', '.join(changes)}" for what, p, changes in given if changes]
        return tuple(told)

    def _unread(self, request: Request) -> int:
        """How many of the prompt's tokens the CLIP that chooses among pictures leaves out, if one chooses."""
        if request.best_of == 1:
            return 0
        from sfumato.families.clip import Critic  # what chooses nothing starts without it

        critic = self.model.critic
        return critic.clip.towers.text.truncated(request.prompt) if isinstance(critic, Critic) else 0

    def _made_with(self) -> dict[str, str | int]:
        return {
            "sfumato": version("sfumato"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "dtype": _NAMES.get(next(self.model.network.parameters()).dtype, "fp32"),
            **({} if self.tile is None else {"tile": self.tile}),
        }


_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,80}>")  # how other programs name files within a prompt


def load(
    path_or_name: str | os.PathLike[str] | None = None,
    *,
    batch: int = 1,
    tile: int | None = None,
    loras: Sequence[Lora] = (),
    embeddings: Mapping[str, str | os.PathLike[str]] | None = None,
    vae: str | os.PathLike[str] | None = None,
    controlnet: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    denoiser: str | os.PathLike[str] | None = None,
    ip_adapter: str | os.PathLike[str] | None = None,
    image_encoder: str | os.PathLike[str] | None = None,
    critic: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    partial: bool = False,
    dtype: str = "fp32",
    memory: str = "auto",
) -> Pipeline:
    """Load a model by its weight file's path or its name, by default the one built in, as a pipeline.

    Args:
        batch: how many pictures the network sees at once; see ``Pipeline``.
        tile: side in pixels of the tiles in which pictures go through the autoencoder; see ``Pipeline``.
        loras: files of LoRAs to add, alone (at weight 1) or as pairs of path and weight.
        embeddings: words learned by textual inversion: how each is written in prompts → its file.
        vae: an autoencoder to use instead of the model's own.
        controlnet: a network that guides a U-Net by a request's ``control_image``, or several, a picture for each.
        denoiser: a denoiser to use instead of the model's own, such as a GGUF file.
        ip_adapter: a network by which a U-Net follows a request's ``image_prompt`` as it follows words.
        image_encoder: the folder of the IP-Adapter's image encoder; None takes the one named image_encoder beside its
            file, or in the model's folder.
        critic: a CLIP that ``task: clip`` trained, by which ``best_of`` chooses; embedded models have theirs.
        variant: which files of a folder to take, such as "fp16".
        allow_pickle: read .ckpt, .pt and .bin files too, in a child process that may build tensors alone.
        partial: let missing, extra and misshaped tensors pass; the model's card tells which.
        dtype: "fp32", or "bf16": half the memory, faster on CPUs that multiply in it, and a little other pictures.
        memory: "normal" keeps all weights in memory; "low" leaves them in their file and unfolds one layer's at a time,
            for the same pictures; "auto" does so if they would not fit.

    Raises BadRequest if there is no such model, BadCheckpoint if a file is damaged, foreign or does not fit.
    """
    from sfumato import families

    name = None if path_or_name is None else os.fspath(path_or_name)
    additions = families.Additions.of(loras, embeddings, vae, controlnet, denoiser, ip_adapter, image_encoder)
    how = {
        "critic": critic,
        "variant": variant,
        "allow_pickle": allow_pickle,
        "partial": partial,
        "dtype": dtype,
        "memory": memory,
    }
    return Pipeline(families.load(name, additions, **how), batch, tile)


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _damage(network: nn.Module) -> str:
    """Say which weights are to blame for NaN."""
    bad = [name for name, p in network.named_parameters() if not p.isfinite().all()]
    if not bad:
        return "its weights are damaged, or too large"
    return f"its weights are damaged: NaN or infinity in {len(bad)} of them, {bad[0]} first"


def _walk(
    request: Request, denoise: Denoiser, x: Tensor, path: Path, noise: FreshNoise
) -> Generator[Step, None, Tensor]:
    """Yield the steps of a request's sampler, and return the last one's x."""
    assert request.sampler is not None
    settings = {} if request.eta is None else {"eta": request.eta}
    for step in SAMPLERS[request.sampler](denoise, x, path, noise, **settings):
        x = step.x
        yield step
    return x


def control_spans(request: Request, path: Path) -> list[tuple[float, float]]:
    """Between which log-SNRs of a path each control picture counts; empty if all count throughout.

    Step i of n counts if it lies wholly within a range, as diffusers has it; a step owns the levels from its own to the
    next one's, so that a sampler may call the network wherever it likes. Raises BadRequest for a range without a step.
    """
    n, spans = len(path) - 1, []
    for low, high in each_range(request.control_range, len(each(request.control_image))):
        steps = [i for i in range(n) if i / n >= low and (i + 1) / n <= high]
        if not steps:
            what = f"control_range {low:g},{high:g} holds none of the {n} steps whole: widen it, or leave it out"
            raise BadRequest(what, "control_range")
        first, last = steps[0], steps[-1] + 1
        spans.append((path[first].log_snr if first else -math.inf, path[last].log_snr if last < n else math.inf))
    return spans


def _seeds(request: Request) -> list[int]:
    return [request.draw(j).seed or 0 for j in range(request.drawn)]


def _visible(pictures: Tensor) -> list[Pixels]:
    """Pictures (n, 3, H, W) in [−1, 1] as uint8 (H, W, 3)."""
    return list(np.ascontiguousarray(eight_bits(pictures).permute(0, 2, 3, 1).cpu().numpy()))


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32
