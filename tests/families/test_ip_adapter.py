"""IP-Adapters in U-Nets, against diffusers: the encoder, the tokens, and whole pictures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from published import make, shaken
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

import sfumato
from sfumato.checkpoints.parts import read_image_encoder, read_ip_adapter
from sfumato.cli import main
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families.configs import clip_vision_config, ip_adapter_config
from sfumato.families.ip_adapter import prepare
from sfumato.networks.clip import CLIPVision
from sfumato.networks.ip_adapter import IPAdapter
from sfumato.pipeline.noise import start
from sfumato.pipeline.picture import read

Tensors = dict[str, torch.Tensor]
KINDS = {"plain": 0, "plus": 1, "full": 2}


def make_encoder(r: random.Random) -> CLIPVisionModelWithProjection:
    heads = r.choice([1, 2, 3])
    patch = r.choice([4, 7])
    config = CLIPVisionConfig(
        hidden_size=16 * heads, intermediate_size=r.choice([40, 56]), num_hidden_layers=r.choice([1, 2, 3]),
        num_attention_heads=heads, image_size=4 * patch + r.choice([0, 1]), patch_size=patch,
        projection_dim=r.choice([20, 36]), hidden_act=r.choice(["gelu", "quick_gelu"]),
    )  # fmt: skip
    return shaken(CLIPVisionModelWithProjection(config))


def make_adapter(pipe: Any, encoder: CLIPVisionModelWithProjection, kind: str, r: random.Random) -> Tensors:
    """Random tensors under the names of the published files; with 4 tokens or 257, as diffusers takes for granted."""
    dim, seen, projected = (
        pipe.unet.config.cross_attention_dim,
        encoder.config.hidden_size,
        encoder.config.projection_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "plain":
        shapes |= {"proj.weight": (4 * dim, projected), "proj.bias": (4 * dim,)}
        shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    elif kind == "full":
        shapes |= {"proj.0.weight": (seen, seen), "proj.0.bias": (seen,), "proj.2.weight": (dim, seen)}
        shapes |= {"proj.2.bias": (dim,), "proj.3.weight": (dim,), "proj.3.bias": (dim,)}
    else:
        inner, heads = r.choice([24, 40]), r.choice([1, 2])
        shapes |= {"latents": (1, r.choice([3, 5]), inner), "proj_in.weight": (inner, seen), "proj_in.bias": (inner,)}
        shapes |= {"proj_out.weight": (dim, inner), "proj_out.bias": (dim,)}
        shapes |= {"norm_out.weight": (dim,), "norm_out.bias": (dim,)}
        for i in range(4):  # as diffusers takes for granted
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{i}.{norm}.weight": (inner,), f"layers.{i}.{norm}.bias": (inner,)}
            shapes |= {
                f"layers.{i}.0.to_q.weight": (64 * heads, inner),
                f"layers.{i}.0.to_out.weight": (inner, 64 * heads),
            }
            shapes |= {f"layers.{i}.0.to_kv.weight": (128 * heads, inner), f"layers.{i}.1.1.weight": (4 * inner, inner)}
            shapes |= {f"layers.{i}.1.3.weight": (inner, 4 * inner)}
    tensors = {f"image_proj.{k}": 0.3 * torch.randn(s) + ("norm" in k) for k, s in shapes.items()}
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    modules = dict(pipe.unet.named_modules())
    for i, name in enumerate(layers):
        width = modules[name.removesuffix(".processor")].to_q.out_features
        for which in "kv":
            tensors[f"ip_adapter.{2 * i + 1}.to_{which}_ip.weight"] = 0.3 * torch.randn(width, dim)
    return tensors


def nested(tensors: Tensors) -> dict[str, Tensors]:
    """As the makers' pickles and diffusers have them."""
    parts: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        parts[head][rest] = tensor
    return parts


Case = tuple[str, str, int, Any, Path]


def make_case(family: str, kind: str, seed: int, folder: Path) -> Case:
    """A pipeline of diffusers with an IP-Adapter; its parts as files in a folder."""
    pipe = make(family, seed)
    pipe.save_pretrained(folder / "model")
    r = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    encoder = make_encoder(r)
    encoder.save_pretrained(folder / "image_encoder")
    tensors = make_adapter(pipe, encoder, kind, r)
    save_file(tensors, folder / "ip-adapter.safetensors")
    torch.save(nested(tensors), folder / "ip-adapter.bin")
    side = encoder.config.image_size
    extractor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pipe.register_modules(image_encoder=encoder, feature_extractor=extractor)
    pipe.unet._load_ip_adapter_weights([nested(tensors)], low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(0.7)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (40 + seed, 61, 3), np.uint8)).save(folder / "shown.png")
    return family, kind, seed, pipe, folder


CASES = [("sd1", "plain", 0), ("sd1", "plain", 1), ("sd1", "plus", 0), ("sd1", "plus", 2), ("sd1", "full", 1)]
CASES += [("sdxl", "plain", 0), ("sdxl", "plain", 2), ("sdxl", "plus", 1), ("sd2", "plain", 1)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def adapted(request: Any, tmp_path_factory: Any) -> Case:
    return make_case(*request.param, tmp_path_factory.mktemp("ip"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: Any) -> Case:
    return make_case("sd1", "plain", 0, tmp_path_factory.mktemp("one"))


def test_encoder_tokens_and_pictures_equal_diffusers(adapted: Case) -> None:
    _, kind, seed, pipe, folder = adapted
    part = read_image_encoder(folder / "image_encoder")
    ours = CLIPVision(clip_vision_config(part.config)).eval()
    ours.load_state_dict(dict(part.tensors))
    adapter = read_ip_adapter(folder / "ip-adapter.safetensors")
    network = IPAdapter(ip_adapter_config(adapter.config)).eval()
    network.load_state_dict(dict(adapter.tensors))
    image = Image.open(folder / "shown.png")
    with torch.inference_mode():
        pixels = pipe.feature_extractor(image, return_tensors="pt").pixel_values
        assert (prepare(image, ours.config.side) - pixels).abs().max() <= 1e-6
        theirs, states = pipe.image_encoder(pixels, output_hidden_states=True), ours(pixels)
        assert (states.penultimate - theirs.hidden_states[-2]).abs().max() <= 1e-5
        assert (states.embedding - theirs.image_embeds).abs().max() <= 1e-5
        seen = theirs.image_embeds if kind == "plain" else theirs.hidden_states[-2]
        expected = pipe.unet.encoder_hid_proj.image_projection_layers[0](seen)
        assert (network(seen) - expected).abs().max() <= 1e-5

    side = 8 * pipe.vae_scale_factor
    latents = torch.from_numpy(start([seed], (4, 8, 8)))
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        picture = pipe(
            prompt="a red fox", negative_prompt="blurry", ip_adapter_image=image, latents=latents, height=side,
            width=side, num_inference_steps=3, guidance_scale=4.0, output_type="np",
        ).images[0]  # fmt: skip
    settings: dict[str, Any] = {"steps": 3, "sampler": "ddim", "spacing": "leading", "guidance": 4.0, "seed": seed}
    settings |= {"negative": "blurry", "width": side, "height": side}
    shown = settings | {"image_prompt": folder / "shown.png", "image_prompt_scale": 0.7}
    pipe_ours = sfumato.load(folder / "model", ip_adapter=folder / "ip-adapter.safetensors")
    [made] = pipe_ours.generate("a red fox", **shown)
    assert np.abs(made.pixels.astype(int) - np.round(picture * 255)).max() <= 2
    [bare] = sfumato.load(folder / "model").generate("a red fox", **settings)
    [without] = pipe_ours.generate("a red fox", **settings)
    [still] = pipe_ours.generate("a red fox", **(shown | {"image_prompt_scale": 0.0}))
    assert np.array_equal(without.pixels, bare.pixels)
    assert np.abs(still.pixels.astype(int) - bare.pixels).max() <= 1  # of adding zeros
    assert np.abs(made.pixels.astype(int) - bare.pixels).max() > 5, "the picture tells nothing"
    assert [i.kind for i in made.ingredients] == ["ip_adapter", "image_encoder"]


def test_every_way_of_keeping_weights_and_every_form_of_file(one: Case, tmp_path: Path) -> None:
    *_, pipe, folder = one
    unit = pipe.vae_scale_factor
    settings: dict[str, Any] = {"steps": 2, "seed": 3, "width": 8 * unit, "height": 8 * unit, "n": 2}
    settings |= {"image_prompt": folder / "shown.png", "prompt_to": "a hill"}
    encoder = folder / "image_encoder"

    def pixels(file: str, **how: Any) -> Any:
        made = sfumato.load(folder / "model", ip_adapter=folder / file, image_encoder=encoder, **how)
        return np.stack([p.pixels for p in made.generate("a fox", **settings)]).astype(int)

    whole = pixels("ip-adapter.safetensors")
    assert np.array_equal(pixels("ip-adapter.safetensors", memory="low"), whole)
    assert np.array_equal(pixels("ip-adapter.bin", allow_pickle=True), whole)
    assert 0 < np.abs(pixels("ip-adapter.safetensors", dtype="bf16") - whole).mean() < 8
    unit_net = ControlNetModel.from_unet(
        make("sd1", 0).unet, conditioning_embedding_out_channels=[8] * unit.bit_length()
    )
    shaken(unit_net, 0.1).save_pretrained(tmp_path / "control")
    settings["control_image"] = folder / "shown.png"
    both = pixels("ip-adapter.safetensors", controlnet=tmp_path / "control")
    assert np.abs(both - whole).max() > 5
    assert 0 < np.abs(pixels("ip-adapter.safetensors", controlnet=tmp_path / "control", dtype="bf16") - both).mean() < 8


def test_the_command_follows_an_image_prompt_and_replays(one: Case, tmp_path: Path, capsys: Any) -> None:
    *_, pipe, folder = one
    side = 8 * pipe.vae_scale_factor
    made = tmp_path / "made.png"
    asked = ["generate", "a fox", "--model", str(folder / "model"), "--steps", "2", "--size", f"{side}x{side}"]
    shown = ["--image-prompt", str(folder / "shown.png")]
    adapter = ["--ip-adapter", str(folder / "ip-adapter.safetensors")]
    assert main([*asked, *adapter, *shown, "--image-prompt-scale", "0.5", "--seed", "3", "--out", str(made)]) == 0
    assert [i.kind for i in read(made).picture.ingredients] == ["ip_adapter", "image_encoder"]
    again = ["replay", str(made), "--model", str(folder / "model"), "--out", str(tmp_path / "again.png")]
    assert main([*again, *adapter, *shown]) == 0
    assert "pixels equal" in capsys.readouterr().out
    assert main([*asked, *shown]) == 2
    assert "without an IP-Adapter (--ip-adapter FILE)" in capsys.readouterr().err
    assert main([*asked, "--image-encoder", str(folder / "image_encoder")]) == 2
    assert "no effect without an IP-Adapter" in capsys.readouterr().err
    Image.new("RGB", (4000, 3)).save(tmp_path / "thread.png")
    assert main([*asked, *adapter, "--image-prompt", str(tmp_path / "thread.png")]) == 2
    assert "4000x3 is too long and narrow" in capsys.readouterr().err
    with pytest.raises(BadRequest, match="image_prompt_scale"):
        sfumato.load(folder / "model").generate("a", image_prompt_scale=1.0)


def test_what_is_no_ip_adapter_for_the_model_is_refused(one: Case, tmp_path: Path) -> None:
    *_, folder = one
    whole = load_file(folder / "ip-adapter.safetensors")
    first = "ip_adapter.1.to_k_ip.weight"
    nan = whole | {first: whole[first] * torch.nan}
    kinds: dict[str, tuple[Tensors, str]] = {
        "nothing of it": ({"x": torch.ones(1)}, "no IP-Adapter: holds no model"),
        "a projection alone": ({k: t for k, t in whole.items() if k.startswith("image_proj")}, "no IP-Adapter"),
        "a layer short": ({k: t for k, t in whole.items() if not k.startswith("ip_adapter.3.")}, "layers 1 to"),
        "values missing": ({k: t for k, t in whole.items() if "r.1.to_v" not in k}, r"1 missing: ip_adapter\.1\.to_v"),
        "no projection": ({k: t for k, t in whole.items() if k.startswith("ip_adapter")}, "not whole: 'image_proj"),
        "an extra tensor": (whole | {"image_proj.more": torch.ones(1)}, "1 extra: image_proj.more"),
        "other widths": (whole | {first: torch.ones(7, 9)}, "for another family"),
        "NaN": (nan, r"NaN or infinity in ip_adapter\.1\.to_k_ip\.weight"),
        "faces": (whole | {"ip_adapter.1.to_k_lora.down.weight": torch.ones(2, 2)}, "FaceID"),
        "another encoder's": (
            whole | {"image_proj.proj.weight": torch.ones(len(whole["image_proj.proj.bias"]), 7)},
            "gives 7 numbers.*--image-encoder",
        ),
    }
    for kind, (tensors, reason) in kinds.items():
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "ip.safetensors")
        with pytest.raises(BadCheckpoint, match=reason) as caught:
            sfumato.load(
                folder / "model", ip_adapter=tmp_path / "ip.safetensors", image_encoder=folder / "image_encoder"
            )
        assert "\n" not in str(caught.value), kind
    with pytest.raises(BadCheckpoint, match=r"needs the image encoder.*--image-encoder FOLDER"):
        sfumato.load(folder / "model", ip_adapter=tmp_path / "ip.safetensors")
    with pytest.raises(BadCheckpoint, match="not of CLIPVisionModelWithProjection"):
        sfumato.load(
            folder / "model", ip_adapter=folder / "ip-adapter.safetensors", image_encoder=folder / "model" / "unet"
        )
    with pytest.raises(BadCheckpoint, match="which can run code"):
        sfumato.load(folder / "model", ip_adapter=folder / "ip-adapter.bin")
    with pytest.raises(BadCheckpoint, match="it looks like an IP-Adapter"):
        sfumato.load(folder / "ip-adapter.safetensors")
    make("flux", 0).save_pretrained(tmp_path / "flux")
    with pytest.raises(BadCheckpoint, match="IP-Adapters go with a U-Net"):
        sfumato.load(tmp_path / "flux", ip_adapter=folder / "ip-adapter.safetensors")
