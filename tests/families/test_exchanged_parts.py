"""One network of a model taken from another file: autoencoders, tiny ones and decoders alone, denoisers, GGUF."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from published import make, shaken, their_picture, vae
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.folder import read_folder
from sfumato.checkpoints.formats import weights
from sfumato.checkpoints.keymaps import autoencoder, dit, to_theirs
from sfumato.checkpoints.parts import read_autoencoder, read_denoiser
from sfumato.errors import BadCheckpoint
from sfumato.families.additions import Additions
from sfumato.families.common import shifted
from sfumato.families.convert import convert

Tensors = dict[str, torch.Tensor]
SETTINGS: dict[str, Any] = {"steps": 2, "sampler": "ddim", "spacing": "leading", "guidance": 4.0}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make("sd1", 0)


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: Any) -> Path:
    """A small SD 1 model."""
    pipe.save_pretrained(tmp_path_factory.mktemp("sd1") / "model")
    return next(tmp_path_factory.getbasetemp().glob("sd1*/model"))


def picture(model: Path, side: int, **parts: Any) -> Any:
    [made] = sfumato.load(model, **parts).generate("a fox", **SETTINGS, seed=5, width=side, height=side)
    return made.pixels.astype(int)


def theirs(pipe: Any, network: Any, side: int, factor: int) -> Any:
    own, pipe.vae = pipe.vae, network
    try:
        expected = their_picture(pipe, 5, 4, side, factor, prompt="a fox", num_inference_steps=2, guidance_scale=4.0)
    finally:
        pipe.vae = own
    return expected.astype(int)


def tiny_of(r: random.Random, factor: int) -> AutoencoderTiny:
    levels = factor.bit_length()
    blocks = [r.choice([1, 2]) for _ in range(levels)]
    return shaken(
        AutoencoderTiny(
            encoder_block_out_channels=[16] * levels, decoder_block_out_channels=[16] * levels,
            num_encoder_blocks=blocks, num_decoder_blocks=blocks[::-1],
        )
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_tiny_autoencoders_in_every_form(seed: int, pipe: Any, folder: Path, tmp_path: Path) -> None:
    factor = pipe.vae_scale_factor
    side = 8 * factor
    network = tiny_of(random.Random(seed), factor)
    network.save_pretrained(tmp_path / "tiny")
    expected = theirs(pipe, network, side, factor)
    named = load_file(tmp_path / "tiny" / "diffusion_pytorch_model.safetensors")
    save_file(named, tmp_path / "named.safetensors")
    makers: Tensors = {}  # their decoders begin with a clamp, which is counted
    for name, tensor in named.items():
        half, _, i, leaf = name.split(".", 3)
        makers[f"{half}.{int(i) + (half == 'decoder')}.{leaf}"] = tensor
    save_file({f"taesd_{k}": t for k, t in makers.items()}, tmp_path / "both.safetensors")
    decoder = {k.removeprefix("decoder."): t for k, t in makers.items() if k.startswith("decoder.")}
    save_file(decoder, tmp_path / "taesd_decoder.safetensors")
    first = picture(folder, side, vae=tmp_path / "tiny")
    assert first.std() > 5
    assert np.abs(first - expected).max() <= 2
    assert np.abs(first - picture(folder, side)).max() > 5
    for name in ("named", "both", "taesd_decoder") if seed == 0 else ("taesd_decoder",):
        assert np.array_equal(picture(folder, side, vae=tmp_path / f"{name}.safetensors"), first), name


def test_another_kl_autoencoder_in_every_form(pipe: Any, folder: Path, tmp_path: Path) -> None:
    factor, r = pipe.vae_scale_factor, random.Random(7)
    network = next(v for v in (vae(r) for _ in range(50)) if 2 ** (len(v.config.block_out_channels) - 1) == factor)
    network.save_pretrained(tmp_path / "kl")
    side = 8 * factor
    expected = theirs(pipe, network, side, factor)
    part = read_autoencoder(tmp_path / "kl")
    save_file(dict(part.tensors), tmp_path / "named.safetensors")
    original = {k: t.contiguous() for k, t in to_theirs(part.tensors, autoencoder(part.config)).items()}
    save_file(original, tmp_path / "original.safetensors")
    save_file({f"first_stage_model.{k}": t for k, t in original.items()}, tmp_path / "prefixed.safetensors")
    for path in (tmp_path / "kl", *sorted(tmp_path.glob("*.safetensors"))):
        assert np.abs(picture(folder, side, vae=path) - expected).max() <= 2, path


def test_autoencoders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    tiny = tiny_of(random.Random(0), 2)
    named = {k: t.detach().clone() for k, t in tiny.state_dict().items()}
    wide = shaken(AutoencoderTiny(latent_channels=16, encoder_block_out_channels=[16], decoder_block_out_channels=[16],
                                  num_encoder_blocks=[1], num_decoder_blocks=[1]))  # fmt: skip
    nan = {k: t.clone() for k, t in named.items()}
    nan["decoder.layers.0.bias"][0] = torch.nan
    kinds: dict[str, tuple[Tensors, str]] = {
        "channels": ({k: t.detach().clone() for k, t in wide.state_dict().items()}, "16 channels, where 4"),
        "nan": (nan, r"NaN or infinity in decoder\.layers\.0\.bias"),
        "missing": ({k: t for k, t in named.items() if k != "decoder.layers.2.conv.2.bias"}, "missing: decoder"),
        "encoder alone": ({k: t for k, t in named.items() if k.startswith("encoder")}, "decoder"),
        "a LoRA": ({"unet.x.lora_A.weight": torch.ones(1, 1)}, "no autoencoder"),
    }
    for kind, (tensors, reason) in kinds.items():
        save_file(tensors, tmp_path / "vae.safetensors")
        with pytest.raises(BadCheckpoint, match=reason) as caught:
            sfumato.load(folder, vae=tmp_path / "vae.safetensors")
        assert "\n" not in str(caught.value), kind


def write_gguf(path: Path, tensors: Tensors, architecture: str) -> None:
    """As the public converters do: matrices whose rows are whole blocks in 8 bits, the rest in 32."""
    writer = gguf.GGUFWriter(path, architecture)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if tensor.ndim == 2 and values.shape[-1] % 32 == 0 and "embedding" not in name:
            writer.add_tensor(name, gguf.quants.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_whole_model_in_gguf_is_its_dequantized_self(folder: Path, tmp_path: Path, pipe: Any) -> None:
    file = convert(folder, tmp_path / "model.safetensors")
    write_gguf(tmp_path / "model.gguf", load_file(file), "sd1")
    save_file(weights(tmp_path / "model.gguf"), tmp_path / "rounded.safetensors")
    side = 8 * pipe.vae_scale_factor
    quantized, rounded = (picture(tmp_path / name, side) for name in ("model.gguf", "rounded.safetensors"))
    assert np.array_equal(quantized, rounded)
    assert 0 < np.abs(quantized - picture(folder, side)).max() < 40


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_files_of_eight_bit_floats_are_their_widened_selves(
    dtype: torch.dtype, folder: Path, tmp_path: Path, pipe: Any
) -> None:
    raw = load_file(convert(folder, tmp_path / "model.safetensors"))
    small = {k: t.to(dtype) if t.ndim > 1 else t for k, t in raw.items()}
    wide = {k: t.float() for k, t in small.items()}
    save_file(small, tmp_path / "small.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    side, prefix = 8 * pipe.vae_scale_factor, "model.diffusion_model."
    expected = picture(tmp_path / "wide.safetensors", side)
    assert np.array_equal(picture(tmp_path / "small.safetensors", side), expected)
    for name, tensors in (("small", small), ("wide", wide)):
        save_file({k: t for k, t in tensors.items() if k.startswith(prefix)}, tmp_path / f"{name}-unet.safetensors")
    parts = [picture(folder, side, denoiser=tmp_path / f"{name}-unet.safetensors") for name in ("small", "wide")]
    assert np.array_equal(*parts)
    low = sfumato.load(folder, denoiser=tmp_path / "small-unet.safetensors", memory="low")
    [again] = low.generate("a fox", **SETTINGS, seed=5, width=side, height=side)
    assert np.array_equal(again.pixels, parts[0])
    first = f"{prefix}input_blocks.0.0.weight"
    small[first] = (raw[first] * torch.nan).to(dtype)
    save_file({k: t for k, t in small.items() if k.startswith(prefix)}, tmp_path / "nan.safetensors")
    with pytest.raises(BadCheckpoint, match=r"NaN or infinity in conv_in\.weight"):
        sfumato.load(folder, denoiser=tmp_path / "nan.safetensors")


def test_dit_as_its_makers_publish_it(tmp_path: Path) -> None:
    make("dit", 0).save_pretrained(tmp_path / "model")
    model = read_folder(tmp_path / "model")
    raw = to_theirs(model.tensors["transformer"], dit(model.configs["transformer"]))
    torch.save({k: t.clone() for k, t in raw.items()} | {"pos_embed": torch.zeros(1, 16, 4)}, tmp_path / "DiT-XL-2.pt")
    ours = sfumato.load(tmp_path / "model", denoiser=tmp_path / "DiT-XL-2.pt", allow_pickle=True).model.network
    state = ours.state_dict()
    for name in model.tensors["transformer"]:
        if ".emb." not in name:
            assert torch.equal(state[f"network.{name}"], model.tensors["transformer"][name]), name
    tables = [t for k, t in state.items() if k.endswith("embedding_table.weight")]
    assert len(tables) == model.configs["transformer"]["num_layers"]
    assert all(torch.equal(t, raw["y_embedder.embedding_table.weight"]) for t in tables)


def test_a_denoiser_alone_takes_the_place_of_fluxs(tmp_path: Path) -> None:
    make("flux", 1).save_pretrained(tmp_path / "model")
    prefix = "model.diffusion_model."
    raw = load_file(convert(tmp_path / "model", tmp_path / "whole.safetensors"))
    own = {k.removeprefix(prefix): t for k, t in raw.items() if k.startswith(prefix)}
    own = own or {k: t for k, t in raw.items() if not k.startswith(("vae.", "text_encoders."))}
    side = 16 * sfumato.load(tmp_path / "model").model.factor
    settings: dict[str, Any] = {"steps": 2, "seed": 3, "width": side, "height": side}

    def generate(**parts: Any) -> Any:
        return sfumato.load(tmp_path / "model", **parts).generate("a fox", **settings)[0]

    plain = generate()
    save_file(own, tmp_path / "denoiser.safetensors")
    same = generate(denoiser=tmp_path / "denoiser.safetensors")
    assert np.array_equal(same.pixels, plain.pixels)
    assert [i.kind for i in same.ingredients] == ["denoiser"]
    write_gguf(tmp_path / "denoiser.gguf", own, "flux")
    save_file(
        {f"{prefix}{k}": t for k, t in weights(tmp_path / "denoiser.gguf").items()}, tmp_path / "round.safetensors"
    )
    quantized, rounded = (generate(denoiser=tmp_path / f"{name}") for name in ("denoiser.gguf", "round.safetensors"))
    assert np.array_equal(quantized.pixels, rounded.pixels)
    assert not np.array_equal(quantized.pixels, plain.pixels)
    save_file(own | {"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(())}, tmp_path / "scaled.safetensors")
    with pytest.raises(BadCheckpoint, match="scales of their own"):
        generate(denoiser=tmp_path / "scaled.safetensors")
    make("sd1", 0).save_pretrained(tmp_path / "sd1")
    with pytest.raises(BadCheckpoint, match="another family"):
        sfumato.load(tmp_path / "sd1", denoiser=tmp_path / "denoiser.gguf")
    with pytest.raises(BadCheckpoint, match="no denoiser"):
        sfumato.load(tmp_path / "sd1", denoiser=tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")


def test_a_denoiser_of_fluxs_other_kind_brings_its_times(tmp_path: Path) -> None:
    """dev in schnell's folder, and the other way round: the shift of the times follows the denoiser."""
    kinds = {}
    for seed in range(8):  # until both kinds came
        pipe = make("flux", seed)
        guided = bool(pipe.transformer.config.guidance_embeds)
        if guided not in kinds:
            pipe.save_pretrained(tmp_path / str(guided))
            raw = load_file(convert(tmp_path / str(guided), tmp_path / f"{guided}-whole.safetensors"))
            own = {k.removeprefix("model.diffusion_model."): t for k, t in raw.items()}
            names = {k: t for k, t in own.items() if not k.startswith(("vae.", "text_encoders."))}
            save_file(names, tmp_path / f"{guided}.safetensors")
            kinds[guided] = seed
    assert len(kinds) == 2
    for guided in (True, False):
        config = json.loads((tmp_path / str(guided) / "scheduler" / "scheduler_config.json").read_text())
        config |= {"use_dynamic_shifting": guided, "shift": 3.0 if guided else 1.0}
        (tmp_path / str(guided) / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    for base in (True, False):
        for of in (True, False):
            model = read_folder(tmp_path / str(base))
            part = read_denoiser(tmp_path / f"{of}.safetensors", model.configs["transformer"])
            changed = Additions.of(denoiser=tmp_path / f"{of}.safetensors").apply(model).configs["scheduler"]
            assert part.config["guidance_embeds"] == of
            shift = shifted(changed, 16, 1.0)(1024, 1024)["shift"]["s"]
            assert shift == pytest.approx(math.exp(1.15) if of else 1.0)


def test_a_denoiser_brings_its_prediction(folder: Path, tmp_path: Path) -> None:
    raw = load_file(convert(folder, tmp_path / "whole.safetensors"))
    own = {k: t for k, t in raw.items() if k.startswith("model.diffusion_model.")}
    before = read_folder(folder).configs["scheduler"].get("prediction_type")
    for marks, metadata, expected in (
        ({}, None, before),
        ({"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, None, "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ):
        save_file(own | marks, tmp_path / "denoiser.safetensors", metadata)
        model = Additions.of(denoiser=tmp_path / "denoiser.safetensors").apply(read_folder(folder))
        assert model.configs["scheduler"].get("prediction_type") == expected
        assert bool(model.configs["scheduler"].get("rescale_betas_zero_snr")) == bool(marks)
    save_file(own | {"edm_mean": torch.ones(4)}, tmp_path / "denoiser.safetensors")
    with pytest.raises(BadCheckpoint, match="EDM's form"):
        Additions.of(denoiser=tmp_path / "denoiser.safetensors").apply(read_folder(folder))
