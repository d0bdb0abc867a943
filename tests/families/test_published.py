"""Whole pictures of published families against diffusers: the same noise, sampler and levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from published import make, their_picture
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.folder import read_folder
from sfumato.checkpoints.single_file import read_single_file
from sfumato.families.convert import convert

PROMPT, NEGATIVE = "an astronaut riding a horse, oil painting", "blurry"
SETTINGS: dict[str, Any] = {"steps": 4, "sampler": "ddim", "spacing": "leading", "guidance": 4.0}


@pytest.fixture(scope="module", params=[(f, s) for f in ("sd1", "sd2", "sdxl") for s in range(3)], ids=str)
def published(request: Any, tmp_path_factory: Any) -> tuple[str, int, DiffusionPipeline, Path]:
    """A family, a seed, a pipeline of diffusers, and the folder it was saved to."""
    family, seed = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{seed}")
    pipe = make(family, seed, folder)
    pipe.save_pretrained(folder / "model")
    return family, seed, pipe, folder / "model"


def test_pictures_equal_diffusers_from_folder_and_from_single_file(
    published: tuple[str, int, DiffusionPipeline, Path], tmp_path: Path
) -> None:
    family, seed, theirs, folder = published
    ours = sfumato.load(folder)
    assert ours.model.family == family
    factor = ours.model.factor
    side = 8 * factor
    for negative in ("", NEGATIVE):
        request = {**SETTINGS, "seed": seed, "width": side, "height": side, "negative": negative}
        [picture] = ours.generate(PROMPT, **request)
        expected = their_picture(
            theirs, seed, ours.model.channels, side, factor,
            prompt=PROMPT, negative_prompt=negative or None, num_inference_steps=4, guidance_scale=4.0,
        )  # fmt: skip
        assert picture.pixels.std() > 5, "a flat picture proves nothing"
        assert np.abs(picture.pixels.astype(int) - expected).max() <= 2

    file = convert(folder, tmp_path / "model.safetensors")
    [again] = sfumato.load(file).generate(PROMPT, **request)
    assert np.array_equal(again.pixels, picture.pixels)
    assert again.model_hash == picture.model_hash

    if family == "sd1":  # all of whose configuration is in names and shapes
        bare = tmp_path / "bare.safetensors"
        save_file(load_file(file), bare)
        [again] = sfumato.load(bare).generate(PROMPT, **request)
        assert np.array_equal(again.pixels, picture.pixels)


def test_conversion_there_and_back_is_bitwise(
    published: tuple[str, int, DiffusionPipeline, Path], tmp_path: Path
) -> None:
    _, _, _, folder = published
    file = convert(folder, tmp_path / "model.safetensors")
    back = convert(file, tmp_path / "back")
    first, second, single = read_folder(folder), read_folder(back), read_single_file(file)
    for other in (second, single):
        assert other.configs == first.configs
        assert other.tensors.keys() == first.tensors.keys()
        for component, tensors in first.tensors.items():
            assert other.tensors[component].keys() == tensors.keys()
            assert all(torch.equal(other.tensors[component][k], t) for k, t in tensors.items())
    assert first.fingerprint() == second.fingerprint() == single.fingerprint()
    file_2 = convert(back, tmp_path / "again.safetensors")
    assert file_2.read_bytes() == file.read_bytes()
