"""The task of training a model of our own: denoiser and text tower together, on pixels or on latents.

Beside the denoising loss, states of the denoiser may be drawn towards a pretrained network's features of the clean
picture: −cos(projected states, features), as REPA does (2410.06940, eq. 8). And what a latent denoiser predicts may be
decoded and compared as a person would: an error of the latents then weighs what it does to the picture.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from sfumato.checkpoints.tensors import to_half
from sfumato.data.captions import several
from sfumato.data.encoded_captions import EncodedCaptions
from sfumato.data.latents import Latents
from sfumato.data.pictures import Batch, Row
from sfumato.errors import BadData
from sfumato.families.native import Native, NativeConfig, metadata
from sfumato.families.pretrained import load_lpips
from sfumato.files import write_atomically
from sfumato.networks.compact import CompactAutoencoder, PreviewDecoder
from sfumato.networks.worded import WordedTransformer
from sfumato.text.tower import build_tokenizer, train_tokenizer
from sfumato.training.draws import draws
from sfumato.training.objective import DenoisingObjective, Losses
from sfumato.training.recipe import Recipe
from sfumato.training.world import World

OF_USE_IN_TRAINING = ("projector.", "heads.")  # what a model is trained with, and its file does without
COMPILED_WIDTH = 24  # tokens, to a multiple of which captions are filled for a compiled network


class Source(Protocol):
    """Pictures or latents with their words, in the endless order."""

    @property
    def rows(self) -> Sequence[Row]:
        """The columns of each picture."""
        ...

    def take(self, seed: int, places: Iterable[int]) -> Batch:
        """Return what stands at some places."""
        ...

    def fingerprint(self) -> str:
        """Tell whether the data are the same."""
        ...


class Prepared(NamedTuple):
    """One micro-batch: x0 (B, C, H, W), words as ``Native.states`` takes them, uniform numbers (B,), noise like x0."""

    x0: Tensor
    words: dict[str, Tensor]
    u: Tensor
    eps: Tensor
    features: Tensor | None = None  # (B, N, F) that the states are aligned with
    pictures: Tensor | None = None  # (B, 3, H, W) that predictions are compared with
    second: tuple[Tensor, Tensor] | None = None  # more uniform numbers and noise, where the task needs them


class Aligned(Native):
    """A model whose denoiser's states are also projected to the features that they shall resemble."""

    def __init__(self, config: NativeConfig, tokenizer: Tokenizer, layer: int, features: int):
        super().__init__(config, tokenizer, whole=False)
        assert isinstance(self.network, WordedTransformer)
        layers, dim = self.network.config.layers, self.network.config.dim
        if not -layers <= layer < layers:
            raise BadData(f"recipe: latents.align_layer is {layer}, but there are layers 0 to {layers - 1}")
        self.layer = layer
        self.projector = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, features))

    def forward(self, x: Tensor, clock: Tensor, words: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The prediction (B, C, H, W) and the projected states (B, N, F)."""
        assert isinstance(self.network, WordedTransformer)
        out, states = self.network.states(x, clock, **self.states(words), layer=self.layer)
        return out, self.projector(states)


class Perceptual(nn.Module):
    """LPIPS of decoded predictions of x0 (B, C, h, w) and pictures (B, 3, H, W), 0 where levels are too noisy: (B,).

    Args:
        until: the share of the schedule's range up to which there is enough to compare.
    """

    def __init__(self, autoencoder: CompactAutoencoder, net: str, until: float):
        super().__init__()
        self.until, self.lpips = until, load_lpips(net)
        self.decoder = copy.deepcopy(autoencoder).requires_grad_(False)  # gradients pass through it, to the prediction

    def forward(self, x0: Tensor, place: Tensor, pictures: Tensor) -> Tensor:
        """Compare."""
        near = int((place <= self.until).sum())
        distance = x0.new_zeros(len(x0))
        if not near:
            return distance
        step = max(1, len(x0) // 16)  # few sizes: kernels and memory are kept for each
        chosen = place.argsort()[: -(-near // step) * step]
        decoded = self.decoder.decode(x0[chosen].contiguous(memory_format=torch.channels_last))
        found = self.lpips(decoded.float(), pictures[chosen]).float()
        return distance.index_put((chosen,), found * (place[chosen] <= self.until))


class DenoiserTask:
    """Words and pictures in, denoising losses out.

    Args:
        pictures: what is denoised: pictures, or their latents.
        autoencoder, preview: of the latents, to be written into the model's file.
        features: (index of the picture → (N, F)) what states are aligned with, where the recipe asks for it.
        tokenizer: of a text tower that is there; left out, the recipe's is built, or learned from the captions.

    ``words`` may be set to the captions as the text tower, then frozen, encodes them; ``origin`` to the SHA-256 of
    what else the loss depends on.
    """

    words: EncodedCaptions | None = None
    origin: str = ""

    def __init__(
        self,
        recipe: Recipe,
        pictures: Source,
        run: Path,
        world: World = World(),  # noqa: B008
        autoencoder: CompactAutoencoder | None = None,
        preview: PreviewDecoder | None = None,
        features: Tensor | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        self.recipe, self.pictures, self.features = recipe, pictures, features
        self.autoencoder, self.preview = autoencoder, preview
        self.perceptual: Perceptual | None = None
        if recipe.latents.perceptual:
            assert autoencoder is not None
            self.perceptual = Perceptual(autoencoder, recipe.latents.perceptual_net, recipe.latents.perceptual_until)
        tokenizer = tokenizer or _tokenizer(recipe, pictures, run, world)
        torch.manual_seed(recipe.seed)
        config = recipe.model
        self.module = self._network(tokenizer).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.objective = DenoisingObjective(config.build_schedule(), config.build_parameterization(), recipe.objective)

    def _network(self, tokenizer: Tokenizer) -> Native:
        """What is trained, its weights drawn anew."""
        if self.features is None:
            return Native(self.recipe.model, tokenizer, whole=False)
        return Aligned(self.recipe.model, tokenizer, self.recipe.latents.align_layer, self.features.shape[-1])

    def fetch(self, places: range) -> Prepared:
        """Prepare pictures, token ids, levels and noise for some places of the endless order."""
        batch = self.pictures.take(self.recipe.seed, places)
        words = self._read(batch.captions)
        u, eps = draws(self.recipe.seed, places, batch.x0.shape[1:])
        features = None
        if self.features is not None and batch.indices is not None:
            step, until = places.start // self.recipe.batch, self.recipe.latents.align_until * self.recipe.steps
            features = self.features[batch.indices] if step < until else None  # the same on all ranks
        pictures = None
        if self.perceptual is not None and batch.indices is not None:
            assert isinstance(self.pictures, Latents)
            pictures = self.pictures.pictures.at(batch.indices)
        return Prepared(batch.x0, words, u, eps, features, pictures)

    def _read(self, captions: list[str]) -> dict[str, Tensor]:
        """Turn captions into token ids, or into the states that are known of them."""
        if self.words is None:
            ids, mask = self.module.text.tokenize(captions)
            words = {"ids": ids, "mask": mask}
        else:
            words = self.words.take(captions)
        if not self.recipe.compile:
            return words
        width = words["mask"].shape[1]  # few widths, so that few are compiled
        spare = min(-width % COMPILED_WIDTH, self.recipe.model.text.max_tokens - width)
        return words | {k: filled(words[k], spare) for k in words.keys() - {"pooled"}}

    def fingerprint(self) -> str:
        """SHA-256 of pictures and their columns, of their captions' states where these are known, and of origins."""
        all_of_them = (self.pictures.fingerprint(), "" if self.words is None else self.words.fingerprint(), self.origin)
        parts = [part for part in all_of_them if part]
        return hashlib.sha256("/".join(parts).encode()).hexdigest() if len(parts) > 1 else parts[0]

    def losses(self, module: Callable[..., Any], batch: Prepared) -> Losses:
        """Return the losses of one micro-batch."""
        device = next(self.module.parameters()).device
        x0, u, eps = (v.to(device) for v in (batch.x0, batch.u, batch.eps))
        words = {k: v.to(device) for k, v in batch.words.items()}
        x0, eps = (v.contiguous(memory_format=torch.channels_last) for v in (x0, eps))
        beside = None
        if self.perceptual is not None and batch.pictures is not None:
            perceptual, weight = self.perceptual.to(device), self.recipe.latents.perceptual
            pictures = batch.pictures.to(device).contiguous(memory_format=torch.channels_last)
            beside = lambda x0, place: weight * perceptual(x0, place, pictures)  # noqa: E731
        if self.features is None:
            return self.objective(lambda x, clock: module(x, clock, words), x0, u, eps, beside)
        projected: list[Tensor] = []

        def network(x: Tensor, clock: Tensor) -> Tensor:
            out, states = module(x, clock, words)
            projected.append(states)
            return out

        losses = self.objective(network, x0, u, eps, beside)
        if batch.features is None:  # every parameter takes part in every step
            return replace(losses, loss=losses.loss + 0.0 * projected[0].float().mean((1, 2)))
        likeness = F.cosine_similarity(projected[0].float(), batch.features.to(device).float(), dim=-1).mean(1)
        return replace(losses, loss=losses.loss - self.recipe.latents.align * likeness)

    def export(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write a model file: fp16 weights, and metadata that say how to build it."""
        tensors = self._own(weights)
        for name, decoder in (("autoencoder", self.autoencoder), ("preview", self.preview)):
            if decoder is not None:
                tensors |= {f"{name}.{k}": v for k, v in decoder.state_dict().items()}
        meta = metadata(self.recipe.model, self.module.text.tokenizer, {"name": self.recipe.name, **self.recipe.card})
        write_atomically(path, save(to_half(tensors), meta))

    def grid(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Draw the recipe's prompts with the averaged weights, one row of four seeds each."""
        from sfumato.training.grid import draw_grid

        averaged = Native(self.recipe.model, self.module.text.tokenizer, whole=False)
        averaged.load_state_dict(self._own(weights))
        decode = (lambda x: x) if self.autoencoder is None else self.autoencoder.decode
        draw_grid(averaged, list(self.recipe.grid_prompts), path, decode)

    def _own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's own weights, without what was only of use in training."""
        return {k: v for k, v in weights.items() if not k.startswith(OF_USE_IN_TRAINING)}


def filled(v: Tensor, spare: int) -> Tensor:
    """Lengthen (B, M, …) by columns that the mask leaves out."""
    return torch.cat([v, v.new_zeros(len(v), spare, *v.shape[2:])], 1)


def _tokenizer(recipe: Recipe, pictures: Source, run: Path, world: World) -> Tokenizer:
    text = recipe.model.text
    if text.tokenizer != "learned":
        return build_tokenizer(text, None)
    path = run / "tokenizer.json"
    world.together(lambda: _learn_tokenizer(pictures, text.vocabulary, path) if world.main else None)
    tokenizer = Tokenizer.from_file(str(path))
    if (tokens := tokenizer.get_vocab_size()) > text.vocabulary:
        raise BadData(f"recipe: model.text.vocabulary must be at least {tokens}, not {text.vocabulary}")
    return tokenizer


def _learn_tokenizer(pictures: Source, vocabulary: int, path: Path) -> None:
    """Learn a vocabulary from the captions and store it with the run, unless one that has begun has one."""
    if not (path.exists() and (path.parent / "recipe.json").exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer([str(text) for row in pictures.rows for text in _texts(row)], vocabulary)
        write_atomically(path, tokenizer.to_str().encode())


def _texts(row: Mapping[str, object]) -> list[object]:
    words = [*several(row.get("alt_names")), *several(row.get("tags"))]
    return [row.get("caption", ""), row.get("name", ""), row.get("style_phrase", ""), *words]
