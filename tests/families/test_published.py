"""Whole pictures of published families against diffusers: the same noise, sampler and levels."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from published import make, make_flux, make_sd3, shaken, t5_encoder, t5s_own_tokenizer, their_picture
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast

import sfumato
from sfumato.checkpoints import keymaps
from sfumato.checkpoints.folder import read_folder
from sfumato.checkpoints.keymaps import to_theirs
from sfumato.checkpoints.single_file import describe_flux, describe_unet, read_single_file
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families import common, describe
from sfumato.families.configs import flux_config, sd_unet_config
from sfumato.families.convert import convert
from sfumato.networks.flux import Flux
from sfumato.networks.sd_unet import SDUNet
from sfumato.pipeline.noise import start

PROMPT, NEGATIVE = "an astronaut riding a horse, oil painting", "blurry"
SETTINGS: dict[str, Any] = {"steps": 4, "sampler": "ddim", "spacing": "leading", "guidance": 4.0}


def as_published(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A single file's tensors with what published ones hold besides; SD 2's tower has one layer more than is used."""
    more = {"alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.9)}
    if family == "sd2":
        tower = "cond_stage_model.model."
        more |= {f"{tower}logit_scale": torch.tensor(1.0), f"{tower}text_projection": torch.randn(64, 32)}
        last = max(int(k.split(".")[4]) for k in tensors if ".resblocks." in k)
        layer = {k: t for k, t in tensors.items() if f".resblocks.{last}." in k}
        more |= {k.replace(f".resblocks.{last}.", f".resblocks.{last + 1}."): t + 1 for k, t in layer.items()}
    return tensors | more


def theirs_meaning(pipe: DiffusionPipeline) -> str:
    """The prediction type in the words of the single files' metadata."""
    return {"epsilon": "epsilon", "v_prediction": "v"}[pipe.scheduler.config.prediction_type]


Saved: TypeAlias = tuple[str, int, DiffusionPipeline, Path]


def saved(family: str, seed: int, factory: pytest.TempPathFactory) -> Saved:
    """A family, a seed, a pipeline of diffusers, and the folder it was saved to."""
    folder = factory.mktemp(f"{family}-{seed}") / "model"
    pipe = make(family, seed)
    pipe.save_pretrained(folder)
    return family, seed, pipe, folder


@pytest.fixture(scope="module", params=[(f, s) for f in ("sd1", "sd2", "sdxl") for s in range(3)], ids=str)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(*request.param, tmp_path_factory)


def test_pictures_equal_diffusers_from_folder_and_from_single_file(published: Saved, tmp_path: Path) -> None:
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
    for path in (folder, file):
        facts = describe(path)
        assert facts["family"].startswith(f"{family}: ")
        assert facts["parameters"] == ours.model.card["parameters"]
        assert facts["matched"] == ours.model.card["matched"]
        assert facts["matched"].startswith("100% of ")
        assert facts["prediction"].startswith(theirs.scheduler.config.prediction_type)

    bare = tmp_path / "bare.safetensors"
    save_file(as_published(family, load_file(file)), bare, {"modelspec.prediction_type": theirs_meaning(theirs)})
    bare_model = sfumato.load(bare)
    assert bare_model.model.family == family
    [again] = bare_model.generate(PROMPT, **request)
    assert np.array_equal(again.pixels, picture.pixels)
    predicts_v = theirs.scheduler.config.prediction_type == "v_prediction"
    usual = {"sd1": 64 * factor, "sd2": 768 if predicts_v else 512, "sdxl": 128 * factor}[family]
    assert bare_model.model.defaults.width == usual, "what was published, since no shape tells"

    if family == "sd2":  # files made from folders have no layer more than is used, and no projection
        save_file(load_file(file), bare, {"modelspec.prediction_type": theirs_meaning(theirs)})
    elif family == "sd1":  # the oldest files' names
        old = {k.replace("transformer.text_model.", "transformer."): t for k, t in load_file(file).items()}
        assert old.keys() != load_file(file).keys()
        save_file(old, bare, {"modelspec.prediction_type": theirs_meaning(theirs)})
    else:
        return
    [again] = sfumato.load(bare).generate(PROMPT, **request)
    assert np.array_equal(again.pixels, picture.pixels)


def test_conversion_there_and_back_is_bitwise(published: Saved, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module", params=[(f, s) for f in ("sd3", "flux") for s in range(4)], ids=str)
def flowing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(*request.param, tmp_path_factory)


def test_pictures_of_flows_equal_diffusers(flowing: Saved, tmp_path: Path) -> None:
    family, seed, theirs, folder = flowing
    ours = sfumato.load(folder)
    model = ours.model
    assert model.family == family
    side = 8 * model.factor
    request: dict[str, Any] = {"steps": 4, "sampler": "flow-euler", "spacing": "shift", "width": side, "height": side}
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25]}
    request |= {"seed": seed, "guidance": 3.5 if family == "sd3" or model.distilled else 1.0}
    asked |= {"guidance_scale": request["guidance"]}
    if family == "flux":
        asked["max_sequence_length"] = 512 if model.distilled else 256
    [picture] = ours.generate(PROMPT, **request)
    expected = their_picture(theirs, seed, model.channels, side, model.factor, **asked)
    assert picture.pixels.std() > 5, "a flat picture proves nothing"
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 2

    file = convert(folder, tmp_path / "model.safetensors")
    [again] = sfumato.load(file).generate(PROMPT, **request)
    assert np.array_equal(again.pixels, picture.pixels)
    back = convert(file, tmp_path / "back")
    assert convert(back, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert read_folder(back).fingerprint() == model.hash
    assert describe(file)["matched"].startswith("100% of ")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)
    if family == "flux":
        with pytest.raises(BadCheckpoint, match=r"without its tokenizer\.json"):
            sfumato.load(bare)
    elif seed % 2 == 0:
        [again] = sfumato.load(bare).generate(PROMPT, **request)
        assert np.array_equal(again.pixels, picture.pixels)
    else:
        assert sfumato.load(bare).model.card["T5"].startswith("left out: it holds a T5 encoder without")


@pytest.mark.parametrize("kind", ["dev", "schnell", "sd3"])
def test_bare_files_whose_t5_has_t5s_own_rows_read_by_the_packaged_vocabulary(kind: str, tmp_path: Path) -> None:
    r, n = random.Random(kind), 3 if kind == "sd3" else 2
    torch.manual_seed(1)
    theirs = make_sd3(r, with_t5=True) if kind == "sd3" else make_flux(r, guided=kind == "dev", axes=(4, 6, 6))
    width = theirs.transformer.config.joint_attention_dim
    theirs.register_modules(
        **{f"text_encoder_{n}": t5_encoder(r, width, vocabulary=32128), f"tokenizer_{n}": t5s_own_tokenizer()}
    )
    theirs.save_pretrained(tmp_path / "model")
    ours = sfumato.load(tmp_path / "model")
    assert ours.model.card["T5"] == "used, by its own tokenizer.json"
    side = 8 * ours.model.factor
    request: dict[str, Any] = {"steps": 4, "sampler": "flow-euler", "spacing": "shift", "width": side, "height": side}
    request |= {"seed": 3, "guidance": 1.0 if kind == "schnell" else 3.5}
    asked: dict[str, Any] = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25]}
    asked |= {"guidance_scale": request["guidance"], "max_sequence_length": 512 if kind == "dev" else 256}
    prompt = "  Ein Café,\tdetails: ½ ﬁne ＡＢＣ 狐 🦊  in the   snow "
    [picture] = ours.generate(prompt, **request)
    expected = their_picture(theirs, 3, ours.model.channels, side, ours.model.factor, prompt=prompt, **asked)
    assert picture.pixels.std() > 5, "a flat picture proves nothing"
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 2

    tensors = load_file(convert(tmp_path / "model", tmp_path / "model.safetensors"))
    clip, t5 = "text_encoders.clip_l.", "text_encoders.t5xxl."
    tensors |= {f"{clip}logit_scale": torch.tensor(4.6), f"{t5}logit_scale": torch.tensor(4.6)}  # as the shared ones do
    tensors[f"{t5}transformer.encoder.embed_tokens.weight"] = tensors[f"{t5}transformer.shared.weight"].clone()
    tensors.setdefault(f"{clip}transformer.text_projection.weight", torch.eye(64))
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    alone = sfumato.load(bare)
    assert alone.model.card["T5"] == "used, by the packaged vocabulary"
    [again] = alone.generate(prompt, **request)
    assert np.array_equal(again.pixels, picture.pixels)

    back = convert(bare, tmp_path / "back")  # which others can read
    read = T5TokenizerFast.from_pretrained(back / f"tokenizer_{n}")
    assert read(prompt).input_ids == t5s_own_tokenizer()(prompt).input_ids
    [again] = sfumato.load(back).generate(prompt, **request)
    assert np.array_equal(again.pixels, picture.pixels)


@pytest.mark.parametrize(
    "more",
    [
        {"transformer_layers_per_block": [1, 2]},
        {"transformer_layers_per_block": [1, 2], "reverse_transformer_layers_per_block": [2, 3]},
        {"transformer_layers_per_block": [[1, 2], [2, 3]], "reverse_transformer_layers_per_block": [1, [3, 1, 1]]},
        {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": [1, 2]},
        {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "mid_block_type": "UNetMidBlock2D"},
    ],
    ids=str,
)
def test_shapes_tell_the_configuration_of_a_unet(more: dict[str, Any]) -> None:
    config = {
        "block_out_channels": [64, 128], "layers_per_block": 2, "cross_attention_dim": 16, "attention_head_dim": [1, 2],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "use_linear_projection": True, **more,
    }  # fmt: skip
    with torch.device("meta"):
        tensors = SDUNet(sd_unet_config(config)).state_dict()
    shapes = {k: tuple(t.shape) for k, t in to_theirs(tensors, keymaps.unet(config)).items()}
    assert sd_unet_config(describe_unet(shapes)) == sd_unet_config(config)


@pytest.mark.parametrize(
    ("head", "axes"),
    [(128, [16, 56, 56]), (64, [8, 28, 28]), (32, [4, 14, 14]), (24, [4, 10, 10]), (16, [4, 6, 6]), (8, [4, 2, 2])],
)
def test_flux_heads_are_shared_among_the_axes_of_positions_in_pairs(head: int, axes: list[int]) -> None:
    config = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": head,
        "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "guidance_embeds": False,
        "axes_dims_rope": axes,
    }  # fmt: skip
    with torch.device("meta"):
        network = Flux(flux_config(config))
    shapes = {k: tuple(t.shape) for k, t in to_theirs(network.state_dict(), keymaps.flux(config)).items()}
    assert describe_flux(shapes)["axes_dims_rope"] == axes
    assert flux_config(describe_flux(shapes)) == flux_config(config)


def test_what_a_scheduler_asks_of_its_sampler_and_does_not_get_is_told(tmp_path: Path) -> None:
    make("dit", 0).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    plain = json.loads(path.read_text())
    for asked, told in (
        ({"clip_sample": False}, None),
        ({"clip_sample": True}, "the scheduler's clip_sample: samples stay as they are"),
        ({"clip_sample": True, "thresholding": True}, "the scheduler's clip_sample and thresholding: samples stay"),
    ):
        path.write_text(json.dumps(plain | asked))
        said = sfumato.load(tmp_path / "model").model.card.get("not followed")
        assert said is None if told is None else str(said).startswith(told)
    unets = common.left_out({"clip_sample": True})
    assert unets == {"not followed": "the scheduler's clip_sample: samples stay as they are"}


@pytest.mark.parametrize(
    ("family", "scheduler", "change"),
    [
        ("sd1", DDIMScheduler, {"beta_schedule": "squaredcos_cap_v2"}),
        ("sd2", DDIMScheduler, {"trained_betas": [1e-4 + 2e-5 * i for i in range(700)], "num_train_timesteps": 700}),
        ("sd2", DDIMScheduler, {"prediction_type": "sample", "beta_schedule": "linear"}),
        (
            "sdxl",
            DDIMScheduler,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        ),
        ("sd3", FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True, "base_image_seq_len": 4}),
        ("flux", FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_what_schedulers_state_is_followed(family: str, scheduler: Any, change: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(family, 1)
    discrete = {"clip_sample": False, "set_alpha_to_one": True} if scheduler is DDIMScheduler else {}
    theirs.scheduler = scheduler(**discrete, **change)
    theirs.save_pretrained(tmp_path / "model")
    ours = sfumato.load(tmp_path / "model")
    side = 8 * ours.model.factor
    request: dict[str, Any] = {**SETTINGS, "seed": 5, "width": side, "height": side}
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 4.0}
    if discrete:
        request["spacing"] = change.get("timestep_spacing", "leading")
    else:
        request |= {"sampler": "flow-euler", "spacing": "shift"}
        asked |= {"sigmas": [1.0, 0.75, 0.5, 0.25], "max_sequence_length": 256 if family == "sd3" else 512}
    [picture] = ours.generate(PROMPT, **request)
    expected = their_picture(theirs, 5, ours.model.channels, side, ours.model.factor, **asked)
    assert picture.pixels.std() > 5, "a flat picture proves nothing"
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("seed", range(3))
def test_pictures_of_classes_equal_diffusers(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = make("dit", seed)
    theirs.save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"  # published ones hold the labels
    labels = {"0": "tench, Tinca tinca", "277": "red fox, Vulpes vulpes", "1": "goldfish"}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": labels}))
    ours = sfumato.load(tmp_path / "model")
    factor = ours.model.factor
    noise = torch.from_numpy(start([seed], (4, 8, 8)))
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(class_labels=[277], guidance_scale=3.0, num_inference_steps=4, output_type="np").images[0]
    request: dict[str, Any] = {"steps": 4, "sampler": "ddim", "spacing": "leading", "guidance": 3.0, "seed": seed}
    request |= {"width": 8 * factor, "height": 8 * factor}
    pictures = [ours.generate(prompt, **request)[0].pixels for prompt in ("277", "Red Fox", "red fox, Vulpes vulpes")]
    assert np.abs(pictures[0].astype(int) - np.round(expected * 255)).max() <= 2
    assert all(np.array_equal(p, pictures[0]) for p in pictures)
    with pytest.raises(BadRequest, match="red fox"):
        ours.generate("red fix", **request)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_networks_distilled_with_guidance_are_told_its_scale(family: str, tmp_path: Path) -> None:
    theirs = make(family, 1)
    torch.manual_seed(2)
    theirs.unet = shaken(UNet2DConditionModel(**{**theirs.unet.config, "time_cond_proj_dim": 10}))
    theirs.save_pretrained(tmp_path / "model")
    ours = sfumato.load(tmp_path / "model")
    assert (ours.model.defaults.sampler, ours.model.distilled) == ("lcm", True)
    factor = ours.model.factor
    request: dict[str, Any] = {**SETTINGS, "seed": 3, "width": 8 * factor, "height": 8 * factor}
    scales = []
    for guidance in (4.0, 8.0):
        [picture] = ours.generate(PROMPT, **(request | {"guidance": guidance}))
        asked = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": guidance}
        expected = their_picture(theirs, 3, 4, 8 * factor, factor, **asked)
        assert np.abs(picture.pixels.astype(int) - expected).max() <= 2
        scales.append(picture.pixels)
    assert not np.array_equal(*scales)
    file = convert(tmp_path / "model", tmp_path / "model.safetensors")
    [again] = sfumato.load(file).generate(PROMPT, **(request | {"guidance": 8.0}))
    assert np.array_equal(again.pixels, scales[1])
    with pytest.raises(BadRequest, match="negative has no effect"):
        ours.generate(PROMPT, **(request | {"negative": "blurry"}))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_long_broken_and_weighted_prompts_equal_transformers_chunk_by_chunk(family: str, tmp_path: Path) -> None:
    theirs = make(family, 2)
    theirs.save_pretrained(tmp_path / "model")
    model = sfumato.load(tmp_path / "model").model

    def states(*texts: str) -> torch.Tensor:
        """Each text's tokens by 75, encoded by themselves."""
        rows = []
        for text in texts:
            ids = theirs.tokenizer(text, add_special_tokens=False).input_ids
            for i in range(0, len(ids), 75):
                row = [49406, *ids[i : i + 75], 49407]
                rows.append(row + [theirs.tokenizer.pad_token_id] * (77 - len(row)))
        with torch.inference_mode():
            return theirs.text_encoder(torch.tensor(rows)).last_hidden_state  # (K, 77, D)

    long = "an oil painting of a red fox in the snow at night, " * 12
    for prompt, texts in ((long, [long]), (f"a fox BREAK {long}", ["a fox", long])):
        expected = states(*texts)
        assert len(expected) > 1
        assert (model.encode([prompt])["context"][0] - expected.flatten(0, 1)).abs().max() <= 1e-5
    plain = states("a red fox")[0]
    weights = torch.ones(77, 1)
    weights[2] = 1.5
    expected = plain * weights * (plain.mean() / (plain * weights).mean())
    assert (model.encode(["a (red:1.5) fox"])["context"][0] - expected).abs().max() <= 1e-5


class Echo(torch.nn.Module):
    """A network that knows noise when it sees it, and says what its kind says of it."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        return 0.95 * x + 0.1 * other if self.kind == "eps" else 0.07 * x - other


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_what_a_network_predicts_is_found_by_one_call(kind: str) -> None:
    level = common.schedule({})(999.0)
    found, why = common.probe(Echo(kind), level, 4, {})
    assert found == kind
    assert "correlates" in why
    assert common.parameterization({}, lambda: (found, why))[0].name == kind


def test_a_file_that_says_nothing_of_its_prediction_is_asked(tmp_path: Path) -> None:
    make("sd2", 1).save_pretrained(tmp_path / "model")
    tensors = as_published("sd2", load_file(convert(tmp_path / "model", tmp_path / "model.safetensors")))
    save_file(tensors, tmp_path / "bare.safetensors")
    card = sfumato.load(tmp_path / "bare.safetensors").model.card
    assert "on pure noise the output correlates" in card["prediction"]
    assert describe(tmp_path / "bare.safetensors")["prediction"] == "decided by one call of the network"
