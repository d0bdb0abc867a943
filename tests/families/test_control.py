"""ControlNets beside U-Nets, against diffusers: networks and whole pictures, from folders and single files."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from published import make, shaken
from safetensors.torch import save_file

import sfumato
from sfumato.checkpoints.keymaps import controlnet as places
from sfumato.checkpoints.keymaps import to_theirs
from sfumato.checkpoints.parts import read_controlnet
from sfumato.cli import main
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families.configs import controlnet_config
from sfumato.networks.controlnet import ControlNet
from sfumato.pipeline.noise import start
from sfumato.pipeline.picture import read

PIPELINES = {"sd1": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}


def make_controlnet(pipe: Any, r: random.Random, factor: int) -> ControlNetModel:
    """A random ControlNet for a pipeline's U-Net; none of its zero convolutions is zero."""
    widths = [r.choice([8, 16]) for _ in range(factor.bit_length())]
    return shaken(ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=widths), 0.1)


Case = tuple[str, int, Any, ControlNetModel, Path]


def make_case(family: str, seed: int, folder: Path) -> Case:
    """A family, a seed, a pipeline and a ControlNet of diffusers, and the folder that holds both."""
    pipe = make(family, seed)
    controlnet = make_controlnet(pipe, random.Random(seed), pipe.vae_scale_factor)
    pipe.save_pretrained(folder / "model")
    controlnet.save_pretrained(folder / "control")
    return family, seed, pipe, controlnet, folder


@pytest.fixture(scope="module", params=[(f, s) for f in PIPELINES for s in range(3)], ids=str)
def controlled(request: Any, tmp_path_factory: Any) -> Case:
    """Every family, three times."""
    family, seed = request.param
    return make_case(family, seed, tmp_path_factory.mktemp(f"{family}-{seed}"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: Any) -> Case:
    """One of them."""
    return make_case("sd1", 0, tmp_path_factory.mktemp("one"))


def test_the_network_equals_diffusers(controlled: Case) -> None:
    family, seed, pipe, theirs, folder = controlled
    part = read_controlnet(folder / "control")
    ours = ControlNet(controlnet_config(part.config))
    ours.load_state_dict(dict(part.tensors))
    torch.manual_seed(seed)
    factor = pipe.vae_scale_factor
    x, hint = torch.randn(2, 4, 8, 10), torch.rand(2, 3, 8 * factor, 10 * factor)
    clock, context = torch.tensor([981.0, 7.0]), torch.randn(2, 77, theirs.config.cross_attention_dim)
    told, added = {}, {}
    if family == "sdxl":
        told = {"pooled": torch.randn(2, 32), "sizes": torch.randint(8, 99, (2, 6)).float()}
        added = {"added_cond_kwargs": {"text_embeds": told["pooled"], "time_ids": told["sizes"]}}
    with torch.inference_mode():
        down, middle = theirs(
            x, clock, encoder_hidden_states=context, controlnet_cond=hint, conditioning_scale=0.7,
            return_dict=False, **added,
        )  # fmt: skip
        control = ours(x, clock, context, hint, torch.tensor([0.7, 0.7]), **told)
    assert len(control) == len(down) + 1
    for a, b in zip(control, [*down, middle], strict=True):
        assert b.abs().max() > 1e-3
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


def test_pictures_equal_diffusers_from_every_form_of_file(controlled: Case, tmp_path: Path) -> None:
    family, seed, pipe, controlnet, folder = controlled
    side = 8 * pipe.vae_scale_factor
    r = np.random.default_rng(seed)
    Image.fromarray(r.integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / "hint.png")
    whole = PIPELINES[family](**pipe.components, controlnet=controlnet)
    whole.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(start([seed], (4, 8, 8)))
    with torch.inference_mode():
        expected = whole(
            prompt="a red fox", negative_prompt="blurry", image=Image.open(tmp_path / "hint.png"), latents=latents,
            height=side, width=side, num_inference_steps=3, guidance_scale=4.0, output_type="np",
            controlnet_conditioning_scale=0.8,
        ).images[0]  # fmt: skip
    expected = np.round(expected * 255).astype(int)
    request: dict[str, Any] = {"steps": 3, "sampler": "ddim", "spacing": "leading", "guidance": 4.0, "seed": seed}
    request |= {"negative": "blurry", "width": side, "height": side}
    guided = request | {"control_image": (tmp_path / "hint.png").read_bytes(), "control_scale": 0.8}

    part = read_controlnet(folder / "control")
    save_file(dict(part.tensors), tmp_path / "named.safetensors")
    original = to_theirs(part.tensors, places(part.config))
    save_file({f"control_model.{k}": t.contiguous() for k, t in original.items()}, tmp_path / "original.safetensors")
    pictures = []
    forms = (folder / "control", tmp_path / "named.safetensors", tmp_path / "original.safetensors")
    for path in forms if seed == 0 else forms[:1]:
        ours = sfumato.load(folder / "model", controlnet=path)
        [picture] = ours.generate("a red fox", **guided)
        pictures.append(picture.pixels)
        assert np.abs(picture.pixels.astype(int) - expected).max() <= 2
        assert np.array_equal(picture.pixels, pictures[0])
    [plain] = ours.generate("a red fox", **request)
    [bare] = sfumato.load(folder / "model").generate("a red fox", **request)
    [still] = ours.generate("a red fox", **(guided | {"control_scale": 0.0}))
    assert np.array_equal(plain.pixels, bare.pixels)
    assert np.array_equal(still.pixels, bare.pixels)
    assert np.abs(pictures[0].astype(int) - bare.pixels).max() > 5


def test_controls_of_unequal_depth_equal_diffusers_from_every_form_of_file(tmp_path: Path) -> None:
    torch.manual_seed(4)
    pipe = make("sd1", 0)
    depths = {
        "transformer_layers_per_block": [[1, 2], [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 1, 2], [3, 1, 1]],
    }
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=[64, 64], layers_per_block=2, cross_attention_dim=64,
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2, **depths,
    )  # fmt: skip
    pipe.register_modules(unet=shaken(unet))
    theirs = make_controlnet(pipe, random.Random(4), pipe.vae_scale_factor)
    pipe.save_pretrained(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "control")
    part = read_controlnet(tmp_path / "control")
    original = to_theirs(part.tensors, places(part.config))
    save_file({f"control_model.{k}": t.contiguous() for k, t in original.items()}, tmp_path / "original.safetensors")
    factor = pipe.vae_scale_factor
    x, hint = torch.randn(2, 4, 8, 10), torch.rand(2, 1, 3, 8 * factor, 10 * factor)
    clock, context = torch.tensor([981.0, 7.0]), torch.randn(2, 77, 64)
    with torch.inference_mode():
        down, middle = theirs(x, clock, context, controlnet_cond=hint[:, 0], return_dict=False)
        expected = pipe.unet(
            x, clock, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        for form in ("control", "original.safetensors"):
            network = sfumato.load(tmp_path / "model", controlnet=tmp_path / form).model.network
            out = network(x, clock, context, hint=hint, hint_scale=torch.ones(2, 1))
            assert (out - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_several_networks_add_up_as_diffusers_do(controlled: Case, tmp_path: Path) -> None:
    family, seed, pipe, first, folder = controlled
    second = make_controlnet(pipe, random.Random(seed + 7), pipe.vae_scale_factor)
    second.save_pretrained(tmp_path / "second")
    ours = sfumato.load(folder / "model", controlnet=[folder / "control", tmp_path / "second"])
    torch.manual_seed(seed)
    factor = pipe.vae_scale_factor
    x, hints = torch.randn(2, 4, 8, 10), torch.rand(2, 2, 3, 8 * factor, 10 * factor)
    clock, context = torch.tensor([981.0, 7.0]), torch.randn(2, 77, first.config.cross_attention_dim)
    told, added = {}, {}
    if family == "sdxl":
        told = {"pooled": torch.randn(2, 32), "sizes": torch.randint(8, 99, (2, 6)).float()}
        added = {"added_cond_kwargs": {"text_embeds": told["pooled"], "time_ids": told["sizes"]}}
    with torch.inference_mode():
        down, middle = MultiControlNetModel([first, second])(
            x, clock, encoder_hidden_states=context, controlnet_cond=[hints[:, 0], hints[:, 1]],
            conditioning_scale=[0.7, 1.3], return_dict=False, **added,
        )  # fmt: skip
        expected = pipe.unet(
            x, clock, encoder_hidden_states=context, down_block_additional_residuals=down,
            mid_block_additional_residual=middle, **added,
        ).sample  # fmt: skip
        scales = torch.tensor([[0.7, 1.3]] * 2)
        out = ours.model.network(x, clock, context, hint=hints, hint_scale=scales, **told)
        alone = ours.model.network(x, clock, context, hint=hints, hint_scale=scales * torch.tensor([1, 0]), **told)
    assert (out - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (out - alone).abs().max() > 1e-3


def test_pictures_of_several_controls_equal_diffusers(controlled: Case, tmp_path: Path) -> None:
    """Each with its own picture, scale, and share of the steps."""
    family, seed, pipe, first, folder = controlled
    second = make_controlnet(pipe, random.Random(seed + 7), pipe.vae_scale_factor)
    second.save_pretrained(tmp_path / "second")
    side = 8 * pipe.vae_scale_factor
    r = np.random.default_rng(seed)
    images = [Image.fromarray(r.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(2)]
    whole = PIPELINES[family](**pipe.components, controlnet=MultiControlNetModel([first, second]))
    whole.set_progress_bar_config(disable=True)
    ours = sfumato.load(folder / "model", controlnet=(folder / "control", tmp_path / "second"))
    request: dict[str, Any] = {"steps": 5, "sampler": "ddim", "spacing": "leading", "guidance": 4.0, "seed": seed}
    request |= {"negative": "blurry", "width": side, "height": side, "control_image": images}
    pictures = []
    for scales, ranges in (((0.8, 0.5), None), ((0.8, 0.5), ((0.0, 0.6), (0.4, 1.0))), ((1.0, 0.0), ((0.2, 0.8),) * 2)):
        more = {} if ranges is None else dict(zip(("start", "end"), map(list, zip(*ranges, strict=True)), strict=True))
        with torch.inference_mode():
            expected = whole(
                prompt="a red fox", negative_prompt="blurry", image=images, height=side, width=side,
                latents=torch.from_numpy(start([seed], (4, 8, 8))), num_inference_steps=5, guidance_scale=4.0,
                output_type="np", controlnet_conditioning_scale=list(scales),
                **{f"control_guidance_{k}": v for k, v in more.items()},
            ).images[0]  # fmt: skip
        [picture] = ours.generate("a red fox", **request, control_scale=scales, control_range=ranges)
        assert np.abs(picture.pixels.astype(int) - np.round(expected * 255)).max() <= 2
        pictures.append(picture.pixels.astype(int))
    assert all(np.abs(a - b).max() > 5 for a, b in combinations(pictures, 2)), "scales and ranges tell nothing"
    [all_steps] = ours.generate("a red fox", **request, control_scale=(0.8, 0.5), control_range=(0, 1))
    assert np.array_equal(all_steps.pixels, pictures[0])


def test_a_range_owns_the_levels_between_its_steps(one: Case) -> None:
    """Also those where samplers of two calls look between two levels of the path, and in both rounds of hires."""
    *_, folder = one
    pipe = sfumato.load(folder / "model", controlnet=folder / "control")
    calls: dict[str, list[float]] = {"unet": [], "control": []}
    for name, net in (("unet", pipe.model.network.unet), ("control", pipe.model.network.controlnets[0])):
        net.register_forward_hook(lambda net, given, out, name=name: calls[name].append(float(given[1][0])))
    side = 8 * pipe.model.factor
    request: dict[str, Any] = {"steps": 4, "sampler": "dpmpp-sde", "width": side, "height": side, "seed": 1}
    request |= {"control_image": Image.new("RGB", (side, side), (250, 20, 80)), "control_range": (0, 0.5)}
    for more in ({}, {"init": Image.new("RGB", (side, side)), "strength": 0.5}, {"sampler": "euler", "hires": 2.0}):
        for name in calls:
            calls[name].clear()
        asked = request | more
        pipe.generate("a red fox", **asked)
        paths = iter(pipe.paths(sfumato.Request.from_dict({"prompt": "a red fox", **asked})))
        expected: list[float] = []
        last = end = -1.0
        for clock in calls["unet"]:
            if clock > last:  # a round begins
                path = next(paths)
                end = path[(len(path) - 1) // 2].t
            last = clock
            expected += [clock] if clock > end else []
        assert calls["control"] == pytest.approx(expected)
        assert next(paths, None) is None
        assert 0 < len(expected) < len(calls["unet"])


def test_counts_that_do_not_match_are_refused_in_one_line(one: Case, tmp_path: Path) -> None:
    *_, folder = one
    pipe = sfumato.load(folder / "model", controlnet=[folder / "control"] * 2)
    picture = Image.new("RGB", (16, 16))
    for given, message in (
        ({"control_image": picture}, "control_image has 1 picture, and model .* follows 2: give one for each"),
        ({"control_image": [picture] * 3}, "control_image has 3 pictures, and model .* follows 2"),
        ({"control_image": [picture] * 2, "control_scale": [1, 1, 1]}, "control_scale has 3 values, control_image 2"),
        ({"control_image": [picture] * 2, "control_range": (0.1, 0.15), "steps": 4}, "holds none of the 4 steps"),
    ):
        with pytest.raises(BadRequest, match=message) as caught:
            pipe.run(sfumato.Request.from_dict({"prompt": "a", **given}))
        assert "\n" not in str(caught.value)


def test_the_command_follows_several_control_pictures_and_replays(one: Case, tmp_path: Path, capsys: Any) -> None:
    _, _, pipe, _, folder = one
    second = make_controlnet(pipe, random.Random(9), pipe.vae_scale_factor)
    second.save_pretrained(tmp_path / "second")
    side = 8 * pipe.vae_scale_factor
    hints = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, colour in zip(hints, ((250, 20, 80), (10, 90, 200)), strict=True):
        Image.new("RGB", (side, side), colour).save(path)
    asked = ["generate", "a fox", "--model", str(folder / "model"), "--steps", "4", "--size", f"{side}x{side}"]
    nets = [
        w for path in (folder / "control", tmp_path / "second", folder / "control") for w in ("--control", str(path))
    ]
    told = [word for path in (*hints, hints[0]) for word in ("--control-image", str(path))]
    told += ["--control-scale", "0.5", "--control-range", "0,0.5", "--control-range", "0,1", "--control-range", "0.5,1"]
    made = tmp_path / "made.png"
    assert main([*asked, *nets, *told, "--seed", "3", "--scale", "1", "--out", str(made)]) == 0
    assert [i.name for i in read(made).picture.ingredients] == ["control", "second", "control"]
    replay = ["replay", str(made), "--model", str(folder / "model"), "--out", str(tmp_path / "again.png"), "--force"]
    for path in hints:
        path.rename(tmp_path / f"moved-{path.name}")
    moved = [word for path in hints for word in ("--control-image", str(tmp_path / f"moved-{path.name}"))]
    assert main([*replay, *nets[:4], *moved]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(Image.open(made)))
    capsys.readouterr()
    assert main([*replay, *nets[:4], *moved[:2]]) == 2
    assert "say where it lies with --control-image" in capsys.readouterr().err
    assert main([*asked, *nets, *moved[:2]]) == 2
    assert "control_image has 1 picture, and model" in capsys.readouterr().err


def test_the_command_follows_a_control_picture_and_replays(one: Case, tmp_path: Path, capsys: Any) -> None:
    _, _, pipe, _, folder = one
    side = 8 * pipe.vae_scale_factor
    Image.new("RGB", (side, side), (250, 20, 80)).save(tmp_path / "hint.png")
    made = tmp_path / "made.png"
    asked = ["generate", "a fox", "--model", str(folder / "model"), "--steps", "2", "--size", f"{side}x{side}"]
    control = ["--control", str(folder / "control"), "--control-image", str(tmp_path / "hint.png")]
    tile = ["--tile", str(8 * pipe.vae_scale_factor)]
    assert main([*asked, *control, *tile, "--control-scale", "0.5", "--seed", "3", "--out", str(made)]) == 0
    assert read(made).picture.made_with["tile"] == 8 * pipe.vae_scale_factor
    assert [i.kind for i in read(made).picture.ingredients] == ["controlnet"]
    replay = ["replay", str(made), "--model", str(folder / "model"), "--out", str(tmp_path / "again.png")]
    assert main([*replay, "--control", str(folder / "control")]) == 0
    assert read(tmp_path / "again.png").picture.made_with["tile"] == 8 * pipe.vae_scale_factor
    capsys.readouterr()
    assert main([*asked, "--tile", "wide"]) == 2
    assert "--tile must be a whole number" in capsys.readouterr().err
    assert main([*asked, "--control-image", str(tmp_path / "hint.png")]) == 2
    assert "without a ControlNet" in capsys.readouterr().err
    with pytest.raises(BadRequest, match="control_scale"):
        sfumato.load(folder / "model").generate("a", control_scale=1.0)


def test_what_is_no_controlnet_for_the_model_is_refused(one: Case, tmp_path: Path) -> None:
    *_, folder = one
    part = read_controlnet(folder / "control")
    make("sdxl", 1).save_pretrained(tmp_path / "other")
    with pytest.raises(BadCheckpoint, match="another family"):
        sfumato.load(tmp_path / "other", controlnet=folder / "control")
    save_file(dict(part.tensors), tmp_path / "bare.safetensors")  # of which shapes alone tell
    with pytest.raises(BadCheckpoint, match="another family"):
        sfumato.load(tmp_path / "other", controlnet=tmp_path / "bare.safetensors")
    with pytest.raises(BadCheckpoint, match="not of ControlNetModel"):
        sfumato.load(folder / "model", controlnet=folder / "model" / "unet")
    lost = {k: t for k, t in part.tensors.items() if k != "controlnet_mid_block.bias"}
    save_file(lost, tmp_path / "lost.safetensors")
    with pytest.raises(BadCheckpoint, match=r"1 missing: controlnet_mid_block\.bias"):
        sfumato.load(folder / "model", controlnet=tmp_path / "lost.safetensors")
    broken = {k: t.clone() for k, t in part.tensors.items()}
    broken["controlnet_mid_block.bias"][0] = torch.nan
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(BadCheckpoint, match=r"NaN or infinity in controlnet_mid_block\.bias"):
        sfumato.load(folder / "model", controlnet=tmp_path / "broken.safetensors")
    save_file({"encoder.down.0.block.0.conv1.weight": torch.ones(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(BadCheckpoint, match="no ControlNet: it looks like an autoencoder"):
        sfumato.load(folder / "model", controlnet=tmp_path / "vae.safetensors")
