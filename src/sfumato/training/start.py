"""What training starts from: a trained text tower, a warm denoiser or autoencoder, features to be aligned with."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.checkpoints.eight_bits import unpack
from sfumato.checkpoints.tensors import load_into, read_tensors
from sfumato.data.latents import encoded
from sfumato.data.pictures import Pictures
from sfumato.errors import BadCheckpoint, BadData
from sfumato.families.autoencoder import load_preview
from sfumato.families.native import Native
from sfumato.networks.compact import CompactAutoencoder, PreviewDecoder
from sfumato.training.recipe import Recipe

FEATURES = 192  # numbers that are kept of each cell's features


def start_text(recipe: Recipe, native: Native, root: Path) -> None:
    """Pour the recipe's text tower into the model, and freeze it where the recipe says so."""
    if not recipe.latents.text:
        return
    pour(native.text, root / recipe.latents.text, "text.")
    if recipe.latents.freeze_text:
        native.text.requires_grad_(False)
    else:
        native.text.tokens.requires_grad_(False)  # words that never come up in training stay near their kin


def start_denoiser(recipe: Recipe, native: Native, root: Path) -> None:
    """Pour the recipe's warm start into the denoiser; experts that it lacks start as they are, at zero."""
    if recipe.latents.denoiser:
        pour(native.network, root / recipe.latents.denoiser, "network.", new=".experts.")


def start_preview(recipe: Recipe, root: Path) -> PreviewDecoder | None:
    """Load the recipe's decoder for previews; BadData where its shape is not ``model.preview``'s."""
    if not recipe.latents.preview:
        if recipe.model.preview is not None:
            raise BadData("recipe: model.preview needs latents.preview, a trained decoder for previews")
        return None
    decoder = load_preview(root / recipe.latents.preview)
    if decoder.config != recipe.model.preview:
        path = root / recipe.latents.preview
        raise BadData(f"recipe: model.preview is {recipe.model.preview}, but {path} holds {decoder.config}")
    return decoder


def start_autoencoder(recipe: Recipe, network: CompactAutoencoder, root: Path) -> None:
    """Pour the recipe's warm start into the autoencoder."""
    if recipe.autoencoder.start:
        pour(network, root / recipe.autoencoder.start, "")


def pour(module: nn.Module, path: Path, prefix: str, new: str | None = None) -> None:
    """Load what a file holds under a prefix; BadCheckpoint if there is nothing, or it does not fit.

    Args:
        new: part of the names of those weights that the file may do without, all of them together.
    """
    stored = {k.removeprefix(prefix): v for k, v in read_tensors(path).items() if k.startswith(prefix)}
    if not stored:
        raise BadCheckpoint(f"{path}: holds nothing under {prefix}")
    try:
        tensors = {k: v.float() for k, v in unpack(stored).items()}
        if new is not None and not any(new in k for k in tensors):
            tensors |= {k: v for k, v in module.state_dict().items() if new in k}
        load_into(module, tensors)
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{path}: {e}") from None


def align_features(recipe: Recipe, pictures: Pictures, folder: Path) -> Tensor:
    """EfficientNet-lite0's last map of every picture, one vector per patch of the denoiser, fp16 (N, cells, F).

    Its 1,280 channels are cut to their principal components over the data.
    """
    from sfumato.checkpoints.packaged import LITE0
    from sfumato.families.pretrained import load_lite0

    model = recipe.model
    if model.transformer is None:
        raise BadData("recipe: latents.align needs model.transformer, whose patches are aligned")
    side = model.shape[1] // model.transformer.patch

    @cache
    def network() -> nn.Module:
        return load_lite0().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(32 * side, 32 * side), mode="bicubic", antialias=True).clamp(-1, 1)
        maps = network()(x.contiguous(memory_format=torch.channels_last))
        return maps[7].flatten(2).transpose(1, 2)  # (B, N, 1280)

    @cache
    def basis() -> tuple[Tensor, Tensor]:  # only where nothing is known yet
        few = pictures.at(pictures.spread(512))
        sample = torch.cat([features(part) for part in few.split(128)]).flatten(0, 1)
        mean = sample.mean(0)
        _, vectors = torch.linalg.eigh((sample - mean).T @ (sample - mean))
        return mean, vectors[:, -FEATURES:]

    def reduced(x: Tensor) -> Tensor:
        mean, axes = basis()
        return (features(x) - mean) @ axes

    return encoded(pictures, reduced, f"lite0/{LITE0.sha256}/{side}/{FEATURES}", folder)
