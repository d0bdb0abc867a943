"""Pictures from pictures against diffusers' own pipelines: the same noise, levels and mask."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from published import make, shaken
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.families.convert import convert
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.noise import start
from sfumato.pipeline.pipeline import Pipeline

PROMPT = "an astronaut riding a horse, oil painting"
STEPS = 4


def smooth(side: int, seed: int) -> Image.Image:
    """A picture of soft colours, as encoders are fond of."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def patch_mask(side: int, factor: int) -> Image.Image:
    """White in the middle, on the borders of cells."""
    mask = np.zeros((side, side), np.uint8)
    mask[2 * factor : 6 * factor, 3 * factor :] = 255
    return Image.fromarray(mask)


def asked(family: str, seed: int, distilled: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of ours and of theirs."""
    if family.startswith("sd") and family != "sd3":
        return {"sampler": "ddim", "spacing": "leading", "guidance": 4.0}, {"guidance_scale": 4.0}
    w = 3.5 if family == "sd3" or distilled else 1.0
    theirs: dict[str, Any] = {"guidance_scale": w, "sigmas": [1 - i / STEPS for i in range(STEPS)]}
    if family == "flux":
        theirs["max_sequence_length"] = 512 if distilled else 256
    return {"sampler": "flow-euler", "spacing": "shift", "guidance": w}, theirs


def pair(family: str, seed: int, tmp_path: Path, task: Any, inpaints: bool = False) -> tuple[Pipeline, Any]:
    """The same small random model as ours and as theirs for a task."""
    theirs = make(family, seed)
    if inpaints:
        torch.manual_seed(seed)
        theirs.unet = shaken(UNet2DConditionModel(**{**theirs.unet.config, "in_channels": 9}))
    theirs.save_pretrained(tmp_path / "model")
    theirs = task.from_pipe(theirs)
    theirs.set_progress_bar_config(disable=True)
    return sfumato.load(tmp_path / "model"), theirs


def picture_of(
    ours: Pipeline, theirs: Any, seed: int, side: int, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> np.ndarray:
    """Their picture, uint8 (H, W, 3), from our noise and without a draw from the encoder's variance."""
    m = ours.model
    noise = torch.from_numpy(start([seed], (m.channels, side // m.factor, side // m.factor)))
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *_, **__: noise.clone())
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with torch.inference_mode():
        image = theirs(
            prompt=PROMPT, height=side, width=side, num_inference_steps=STEPS, output_type="np", **settings
        ).images[0]
    return np.round(image * 255).astype(np.uint8)


CASES = [(family, seed) for family in ("sd1", "sd2", "sdxl", "sd3", "flux") for seed in range(3)]


@pytest.fixture(autouse=True)
def _one_of_each(request: pytest.FixtureRequest, soak: bool) -> None:
    """Without --soak, one configuration of each family."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if params.get("seed", 0) > 0 and not soak:
        pytest.skip("with --soak")


@pytest.mark.parametrize(("family", "seed"), [*CASES, *(("sdxl-refiner", seed) for seed in range(3))])
def test_image_to_image_equals_diffusers(
    family: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(family, seed, tmp_path, AutoPipelineForImage2Image)
    side, strength = 8 * ours.model.factor, random.Random(seed).choice([0.5, 0.75])
    init = smooth(side, seed)
    mine, yours = asked(family, seed, ours.model.distilled)
    mine |= {"seed": seed, "steps": STEPS, "width": side, "height": side}
    [picture] = ours.generate(PROMPT, init=init, strength=strength, **mine)
    settings = {**yours, "image": init, "strength": strength}
    if family in ("sd1", "sd2"):  # these take the picture's own size
        call = theirs.__class__.__call__
        monkeypatch.setattr(theirs.__class__, "__call__", lambda self, height, width, **kw: call(self, **kw))
    expected = picture_of(ours, theirs, seed, side, monkeypatch, **settings)
    assert picture.pixels.std() > 5, "a flat picture proves nothing"
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 2
    [other] = ours.generate(PROMPT, **mine)
    assert np.abs(picture.pixels.astype(int) - other.pixels).max() > 20, "the picture to start from is seen"
    file = convert(tmp_path / "model", tmp_path / "model.safetensors")
    [again] = sfumato.load(file).generate(PROMPT, init=init, strength=strength, **mine)
    assert np.array_equal(again.pixels, picture.pixels)
    if family == "sdxl-refiner":
        save_file(load_file(file), tmp_path / "bare.safetensors")
        [again] = sfumato.load(tmp_path / "bare.safetensors").generate(PROMPT, init=init, strength=strength, **mine)
        assert np.array_equal(again.pixels, picture.pixels)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_inpainting_equals_diffusers(family: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(family, seed, tmp_path, AutoPipelineForInpainting)
    side = 8 * ours.model.factor
    init, mask = smooth(side, seed), patch_mask(side, ours.model.factor)
    mine, yours = asked(family, seed, ours.model.distilled)
    settings = {
        "init": init,
        "mask": mask,
        "strength": 0.75,
        "seed": seed,
        "steps": STEPS,
        "width": side,
        "height": side,
    }
    [picture] = ours.generate(PROMPT, **settings, **mine)
    if family == "sd3":  # theirs forgets the shift of the latents before it decodes
        decode, shift = theirs.vae.decode, theirs.vae.config.shift_factor
        monkeypatch.setattr(theirs.vae, "decode", lambda z, **kw: decode(z + shift, **kw))
    expected = picture_of(ours, theirs, seed, side, monkeypatch, image=init, mask_image=mask, strength=0.75, **yours)
    painted = np.asarray(mask) > 0
    assert np.abs(picture.pixels.astype(int) - expected)[painted].max() <= 2
    assert np.array_equal(picture.pixels[~painted], np.asarray(init)[~painted])
    assert np.abs(picture.pixels.astype(int) - np.asarray(init))[painted].max() > 20


@pytest.mark.parametrize(
    ("family", "seed", "strength"), [("sd1", 0, 1.0), ("sd1", 1, 0.5), ("sd2", 0, 0.5), ("sdxl", 0, 1.0)]
)
def test_networks_that_inpaint_equal_diffusers(
    family: str, seed: int, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine channels: noisy latents, the mask, and the latents of the picture that is grey under it."""
    ours, theirs = pair(family, seed, tmp_path, AutoPipelineForInpainting, inpaints=True)
    assert ours.model.inpaints
    side = 8 * ours.model.factor
    init, mask = smooth(side, seed), patch_mask(side, ours.model.factor)
    mine, yours = asked(family, seed, ours.model.distilled)
    settings = {"init": init, "mask": mask, "strength": strength, "seed": seed, "steps": STEPS, **mine}
    [picture] = ours.generate(PROMPT, **settings)
    expected = picture_of(
        ours, theirs, seed, side, monkeypatch, image=init, mask_image=mask, strength=strength, **yours
    )
    painted = np.asarray(mask) > 0
    assert np.abs(picture.pixels.astype(int) - expected)[painted].max() <= 2
    assert np.array_equal(picture.pixels[~painted], np.asarray(init)[~painted])
    words = ours.generate(PROMPT, seed=seed, steps=STEPS, width=side, height=side, **mine)[0]
    assert words.pixels.shape == (side, side, 3), "without a picture, all of it is painted"
    if family == "sd1":
        file = convert(tmp_path / "model", tmp_path / "model.safetensors")
        [again] = sfumato.load(file).generate(PROMPT, **settings)
        assert np.array_equal(again.pixels, picture.pixels)


def test_every_family_turns_pictures_into_what_it_works_on(tmp_path: Path) -> None:
    """DiT is told a class, and starts from a picture as the others do."""
    make("dit", 0).save_pretrained(tmp_path / "model")
    ours = sfumato.load(tmp_path / "model")
    init = PictureFile.of("init", smooth(8 * ours.model.factor, 0))
    settings: dict[str, Any] = {"init": init, "seed": 0, "steps": 4, "guidance": 2.0}
    near, far = (ours.generate("277", strength=s, **settings)[0].pixels for s in (0.1, 1.0))
    itself = ours.pixels(ours.latents([np.asarray(init.image("init"))]))[0].astype(int)
    assert np.abs(near - itself).mean() < np.abs(far - itself).mean()
    mixed = ours.generate("277", prompt_to="1", mix=0.5, **settings)[0].pixels
    assert not np.array_equal(mixed, ours.generate("277", **settings)[0].pixels)
