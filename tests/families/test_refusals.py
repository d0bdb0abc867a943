"""What is no model of a published family is refused in one line that says why."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import make, text_config
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import sfumato
from sfumato.checkpoints.single_file import METADATA
from sfumato.cli.convert import main
from sfumato.errors import BadCheckpoint, BadRequest, NoResources
from sfumato.families import describe
from sfumato.families.convert import convert

Tensors = dict[str, torch.Tensor]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@pytest.fixture(scope="module")
def single(tmp_path_factory: Any) -> Path:
    """A small SD 1 model as a single file."""
    root = tmp_path_factory.mktemp("sd1")
    make("sd1", 0).save_pretrained(root / "model")
    return convert(root / "model", root / "model.safetensors")


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t for k, t in tensors.items() if pattern not in k}


def plus(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(shape)}


def open_clip(rows: int) -> Tensors:
    """A tower under OpenCLIP's names whose fused projections have some rows."""
    own = TEXT + "model."
    layer = f"{own}transformer.resblocks.0."
    return {
        f"{own}positional_embedding": torch.zeros(77, 4),
        f"{own}token_embedding.weight": torch.zeros(49408, 4),
        f"{layer}attn.in_proj_weight": torch.zeros(rows, 4),
        f"{layer}mlp.c_fc.weight": torch.zeros(8, 4),
    }


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a missing tensor": (without("input_blocks.1.0.in_layers.0.bias"), "1 missing: down_blocks.0.resnets.0.norm1.bias"),
    "a missing convolution": (without("input_blocks.1.0.in_layers.2.weight"), "unet is not whole"),
    "no autoencoder": (without(VAE), "without its vae"),
    "an extra tensor": (plus(UNET + "motion.0.weight", 2), "no place in a sd1 model: .*motion.0.weight"),
    "a misshaped tensor": (plus(UNET + "out.0.bias", 5), "1 misshaped: conv_norm_out.bias"),
    "EDM's form": (plus("edm_mean", 4), "EDM's form"),
    "scales of floats of eight bits": (plus(UNET + "out.0.scale_weight"), "scales of their own are not supported"),
    "a fused tensor cut short": (
        lambda tensors: (
            {k.replace(TEXT + "transformer.text_model", TEXT + "model"): t for k, t in tensors.items() if TEXT not in k}
            | open_clip(rows=10)
        ),
        "cannot be cut",
    ),
    "SD 2's tower under CLIP L's names": (
        plus(TEXT + "transformer.text_model.embeddings.position_embedding.weight", 77, 1024),
        "stable-diffusion.cpp",
    ),
    "no word in any layer": (without("attn2"), r"'attn2.to_k.weight' is missing"),
    "a denoiser alone": (without(TEXT), "--denoiser"),
    "a text tower": (lambda _: {"text_model.final_layer_norm.bias": torch.zeros(2)}, "text tower alone"),
    "a LoRA": (lambda _: {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "LoRA"),
    "one network": (lambda _: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, "whole folder"),
    "an autoencoder": (lambda _: {"encoder.down.0.block.0.conv1.weight": torch.zeros(2)}, "autoencoder alone"),
    "another thing": (lambda _: {"x": torch.zeros(2)}, "no model that this version knows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_single_files_with_faults_are_refused(fault: str, single: Path, tmp_path: Path) -> None:
    spoil, reason = FAULTS[fault]
    path = tmp_path / "model.safetensors"
    save_file(spoil(load_file(single)), path)
    with pytest.raises(BadCheckpoint, match=reason) as caught:
        sfumato.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"), [("input_blocks.1.0.in_layers.2.weight", None), ("input_blocks.0.0.weight", (8,))]
)
def test_partial_says_that_it_cannot_make_up_for_what_tells_a_shape(
    name: str, shape: tuple[int, ...] | None, single: Path, tmp_path: Path
) -> None:
    tensors = load_file(single)
    del tensors[UNET + name]
    path = tmp_path / "model.safetensors"
    save_file(tensors if shape is None else tensors | {UNET + name: torch.zeros(shape)}, path)
    with pytest.raises(BadCheckpoint, match=r"its unet is not whole: .* missing.*--partial is no help") as caught:
        sfumato.load(path, partial=True)
    assert "\n" not in str(caught.value)
    assert (name in str(caught.value)) == (shape is None)


@pytest.mark.parametrize("stated", ["", "{", "[]", '{"configs": 1}', '{"configs": {"unet": []}, "tokenizers": {}}'])
def test_damaged_metadata_are_refused(stated: str, single: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(single), path, {METADATA: stated})
    with pytest.raises(BadCheckpoint, match="metadata"):
        sfumato.load(path)


@pytest.mark.parametrize(
    ("component", "change", "reason"),
    [
        ("unet", {"act_fn": "mish"}, "act_fn 'mish' is not supported"),
        ("unet", {"block_out_channels": "wide"}, "cannot be followed"),
        ("unet", {"num_class_embeds": 10}, "told one of 10 classes"),
        ("unet", {"block_out_channels": [96, 96]}, "misshaped"),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ("unet", {"_class_name": "UNetMotionModel"}, "UNetMotionModel"),
        ("vae", {"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan"),
        ("vae", {"latent_channels": 5}, "vae"),
        ("text_encoder", {"hidden_act": "tanh"}, "unknown activation"),
        ("text_encoder", {"vocab_size": 40}, "tokenizer has 49408 pieces"),
        ("scheduler", {"prediction_type": "noise"}, "prediction type 'noise'"),
        ("scheduler", {"beta_schedule": "spiral"}, "noise schedule 'spiral'"),
        ("scheduler", {"_class_name": "EDMEulerScheduler"}, "EDM's form"),
    ],
)
def test_configurations_that_cannot_be_followed_are_refused(
    component: str, change: dict[str, Any], reason: str, single: Path, tmp_path: Path
) -> None:
    folder = convert(single, tmp_path / "model")
    file = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadCheckpoint, match=reason) as caught:
        sfumato.load(folder)
    assert str(caught.value).count(str(folder)) == 1


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_towers_of_another_width_than_the_denoiser_takes_are_refused(family: str, tmp_path: Path) -> None:
    pipe = make(family, 1)
    torch.manual_seed(0)
    other = text_config(random.Random(1), projection=24, hidden_size=32)
    kind = CLIPTextModelWithProjection if family == "sd3" else CLIPTextModel
    pipe.text_encoder = kind(other)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(BadCheckpoint, match=r"its denoiser takes (pooled )?words of width \d+, its text towers give"):
        sfumato.load(tmp_path / "model")


def test_a_variant_of_a_single_file_is_refused(single: Path, tmp_path: Path) -> None:
    for ask in (
        lambda: sfumato.load(single, variant="fp16"),
        lambda: describe(single, "fp16"),
        lambda: convert(single, tmp_path / "folder", "fp16"),
    ):
        with pytest.raises(BadRequest, match="variant is for folders"):
            ask()


def test_nan_weights_never_become_a_picture(single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    tensors[UNET + "out.2.bias"][0] = torch.nan
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    pipe = sfumato.load(path)
    side = 8 * pipe.model.factor
    with pytest.raises(BadCheckpoint, match="damaged"):
        pipe.generate("a fox", steps=2, width=side, height=side, seed=0)


def test_the_command_converts_and_leaves_what_exists(single: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([str(single), str(tmp_path / "model")]) == 0
    assert str(tmp_path / "model") in capsys.readouterr().out
    with pytest.raises(BadCheckpoint, match="exists already"):
        main([str(single), str(tmp_path / "model")])
    with pytest.raises(BadCheckpoint, match="exists already"):
        main([str(tmp_path / "model"), str(single)])
    with pytest.raises(BadRequest, match=r"must end in \.safetensors"):
        main([str(tmp_path / "model"), str(tmp_path / "model.ckpt")])
    if Path("/proc/self").exists():
        with pytest.raises(NoResources, match="cannot write /proc/"):
            main([str(tmp_path / "model"), "/proc/model.safetensors"])


def test_info_tells_what_does_not_match_without_reading_it(single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    spoilt = without("input_blocks.1.0.in_layers.0.bias")(plus(UNET + "out.0.bias", 5)(tensors))
    save_file(spoilt, tmp_path / "model.safetensors")
    facts = describe(tmp_path / "model.safetensors")
    assert facts["matched"].startswith("99.")
    assert "1 missing: down_blocks.0.resnets.0.norm1.bias; 1 misshaped: conv_norm_out.bias" in facts["unet's gaps"]


def test_a_ckpt_becomes_safetensors_and_is_the_same_model(single: Path, tmp_path: Path, capsys: Any) -> None:
    tensors = load_file(single)
    ckpt, named = tmp_path / "model.ckpt", tmp_path / "named.ckpt"
    torch.save({"state_dict": tensors, "global_step": 5}, ckpt)
    with pytest.raises(BadCheckpoint, match="--allow-pickle"):
        main([str(ckpt), str(tmp_path / "model.safetensors")])
    assert main([str(ckpt), str(tmp_path / "model.safetensors"), "--allow-pickle"]) == 0
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) for k, t in tensors.items())
    assert sfumato.load(ckpt, allow_pickle=True).model.hash == sfumato.load(tmp_path / "model.safetensors").model.hash
    save_file(tensors, named)  # what it is, its content says
    assert sfumato.load(named).model.family == "sd1"
    with pytest.raises(BadRequest, match="already"):
        main([str(named), str(tmp_path / "other.safetensors")])


def test_weights_and_long_prompts_change_the_words(single: Path) -> None:
    model = sfumato.load(single).model
    plain, heavy = (model.encode([p])["context"] for p in ("a red fox", "a (red:1.5) fox"))
    assert plain.shape == heavy.shape == (1, 77, 64)
    assert not torch.equal(plain, heavy)
    torch.testing.assert_close(plain, model.encode(["a red fox", "fox " * 100])["context"][:1, :77])
    assert model.encode(["a fox", "fox " * 100])["context"].shape == (2, 154, 64)
    assert model.encode(["a red fox BREAK hills"])["context"].shape == (1, 154, 64)
