"""LoRA and its kin, and learned words, on small models of published families."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published import make
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import families
from sfumato.checkpoints.folder import read_folder
from sfumato.checkpoints.keymaps import flux, unet
from sfumato.checkpoints.lora import add_loras, delta, read_lora
from sfumato.checkpoints.published import Published
from sfumato.cli import main
from sfumato.errors import BadCheckpoint, BadRequest
from sfumato.families.additions import Additions
from sfumato.families.convert import convert
from sfumato.pipeline.picture import read
from sfumato.pipeline.pipeline import Pipeline

Tensors = dict[str, torch.Tensor]
R = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A small SD 1 model."""
    root = tmp_path_factory.mktemp("sd1")
    make("sd1", 0).save_pretrained(root / "model")
    return root / "model"


def generate(model: Any, prompt: str = "a red fox") -> Any:
    side = 8 * model.factor
    [picture] = Pipeline(model).generate(prompt, steps=2, seed=1, width=side, height=side)
    return picture.pixels


def lora_of(folder: Path, form: str) -> Tensors:
    """A LoRA of the U-Net's cross-attention and of the text tower's queries, named as a program writes it."""
    torch.manual_seed(0)
    model = read_folder(folder)
    theirs = {place.ours[0]: place.theirs for place in unet(model.configs["unet"])}
    named: Tensors = {}
    for component, pattern in (("unet", "attn2.to_"), ("text_encoder", "q_proj.weight")):
        for name, tensor in sorted(model.tensors[component].items()):
            if pattern not in name or not name.endswith(".weight"):
                continue
            down, up = torch.randn(R, tensor.shape[1]) / 4, torch.randn(tensor.shape[0], R) / 4
            own = name.removesuffix(".weight")
            if form == "peft":
                dotted = f"unet.{own}" if component == "unet" else f"text_encoder.text_model.{own}"
                named |= {f"{dotted}.lora_A.weight": down * 0.5, f"{dotted}.lora_B.weight": up}
                continue
            if form == "original" and component == "unet":
                own = theirs[name].removesuffix(".weight")
            prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
            key = prefix + own.replace(".", "_")
            named |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(R / 2)}
    return named


def test_all_programs_names_give_the_same_model(folder: Path, tmp_path: Path) -> None:
    plain = families.load(folder)
    pictures, hashes = [], set()
    for form in ("kohya", "original", "peft"):
        save_file(lora_of(folder, form), tmp_path / f"{form}.safetensors")
        model = families.load(folder, Additions.of([(tmp_path / f"{form}.safetensors", 0.8)]))
        pictures.append(generate(model))
        hashes.add(model.hash)
        assert f"{form}.safetensors × 0.8" in model.card["additions"]
        assert [str(i) for i in model.ingredients] == [f"lora {form}.safetensors × 0.8"]
    assert np.abs(pictures[0].astype(int) - generate(plain)).max() > 20
    assert all(np.abs(p.astype(int) - pictures[0]).max() <= 1 for p in pictures)
    assert plain.hash not in hashes


def test_several_with_weights_add_up_and_come_off_without_trace(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{form}.safetensors" for form in ("kohya", "peft")]
    for path in paths:
        save_file(lora_of(folder, path.stem), path)
    model = read_folder(folder)
    first, second = (read_lora(p) for p in paths)
    both = add_loras(model, [(first, 0.5), (second, 0.25)])
    once = add_loras(model, [(first, 0.75)])
    for name, tensor in both.tensors["unet"].items():
        torch.testing.assert_close(tensor, once.tensors["unet"][name])
    changed = [k for k, t in both.tensors["unet"].items() if not torch.equal(t, model.tensors["unet"][k])]
    assert changed
    assert all("attn2.to_" in name for name in changed)
    none = add_loras(model, [(first, 0.0)])
    for component, tensors in model.tensors.items():
        assert all(torch.equal(none.tensors[component][k], t) for k, t in tensors.items())
    assert model.fingerprint() == read_folder(folder).fingerprint()


def outputs(kind: str, kernel: int) -> tuple[Tensors, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parts of a module's change, and what it adds to the layer's output for x, by another way than ΔW."""
    torch.manual_seed(kernel)
    o, i = 6, 8
    x = torch.randn(2, i, 5, 5)
    pad = kernel // 2
    if kind == "lora":
        parts = {"down": torch.randn(R, i, kernel, kernel), "up": torch.randn(o, R, 1, 1), "alpha": torch.tensor(1.5)}
        return parts, x, 0.5 * F.conv2d(F.conv2d(x, parts["down"], padding=pad), parts["up"]), torch.tensor(pad)
    if kind == "locon":
        parts = {
            "down": torch.randn(R, i, 1, 1), "core": torch.randn(R, R, kernel, kernel), "up": torch.randn(o, R, 1, 1),
        }  # fmt: skip
        y = F.conv2d(F.conv2d(F.conv2d(x, parts["down"]), parts["core"], padding=pad), parts["up"])
        return parts, x, y, torch.tensor(pad)
    columns = F.unfold(x, kernel, padding=pad)  # (B, i·k·k, 25)
    if kind == "loha":
        a, b, c, d = torch.randn(o, R), torch.randn(R, i * kernel**2), torch.randn(o, R), torch.randn(R, i * kernel**2)
        y = torch.einsum("or,rp,os,sp,bpn->bon", a, b, c, d, columns)
        parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(float(R))}
        return parts, x, y.unflatten(-1, (5, 5)), torch.tensor(pad)
    first, second = torch.randn(2, 4), torch.randn(3, 2, kernel, kernel)
    cells = columns.unflatten(1, (4, 2, kernel, kernel))
    y = torch.einsum("ab,cdhw,xbdhwn->xacn", first, second, cells).flatten(1, 2)
    return {"lokr_w1": first, "lokr_w2": second}, x, y.unflatten(-1, (5, 5)), torch.tensor(pad)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("kind", ["lora", "locon", "loha", "lokr"])
def test_every_kind_changes_the_output_as_its_paper_says(kind: str, kernel: int) -> None:
    parts, x, expected, pad = outputs(kind, kernel)
    change = delta(parts).reshape(6, 8, kernel, kernel)
    torch.testing.assert_close(F.conv2d(x, change, padding=int(pad)), expected, atol=1e-4, rtol=1e-4)


def test_one_of_fluxs_fused_layers_changes_all_of_ours(tmp_path: Path) -> None:
    make("flux", 0).save_pretrained(tmp_path / "model")
    model = read_folder(tmp_path / "model")
    dim = model.tensors["transformer"]["x_embedder.weight"].shape[0]
    down, up = torch.randn(R, dim), torch.randn(7 * dim, R)
    for name in (
        "lora_unet_single_blocks_0_linear1.lora_{}.weight",
        "diffusion_model.single_blocks.0.linear1.lora_{}.weight",
    ):
        pair = ("down", "up") if name.startswith("lora") else ("A", "B")
        save_file(dict(zip(map(name.format, pair), (down, up), strict=True)), tmp_path / "lora.safetensors")
        changed = add_loras(model, [(read_lora(tmp_path / "lora.safetensors"), 1.0)])
        [place] = [p for p in flux(model.configs["transformer"]) if p.theirs == "single_blocks.0.linear1.weight"]
        ours = [changed.tensors["transformer"][n] - model.tensors["transformer"][n] for n in place.ours]
        torch.testing.assert_close(torch.cat(ours), up @ down, atol=1e-5, rtol=1e-4)


def settings_beside(folder: Path, stated: dict[str, Any], peft: bool) -> Path:
    """A LoRA with PEFT's settings: in a header as diffusers writes it, or in a folder that names no U-Net."""
    torch.manual_seed(0)
    pairs: Tensors = {}
    for name, (out, into) in {"time_embedding.linear_1": (256, 64), "time_embedding.linear_2": (256, 256)}.items():
        pairs |= {f"{name}.lora_A.weight": torch.randn(4, into), f"{name}.lora_B.weight": torch.randn(out, 4)}
    folder.mkdir()
    if peft:
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        pairs = {f"base_model.model.{k}": t for k, t in pairs.items()}
        save_file(pairs, folder / "adapter_model.safetensors")
        return folder
    header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in stated.items()})}
    save_file({f"unet.{k}": t for k, t in pairs.items()}, folder / "lora.safetensors", header)
    return folder / "lora.safetensors"


@pytest.mark.parametrize("peft", [False, True])
def test_alphas_stated_beside_the_tensors_are_followed(peft: bool, tmp_path: Path) -> None:
    stated: dict[str, Any] = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"linear_2": 2}}
    own = {f"time_embedding.linear_{i}.weight": torch.randn(256, n) for i, n in ((1, 64), (2, 256))}
    model = Published(tmp_path, "folder", {"unet": {}}, {"unet": own})
    for i, (more, scales) in enumerate((({}, (1.5, 0.5)), ({"use_rslora": True}, (3.0, 1.0)))):
        path = settings_beside(tmp_path / str(i), stated | more, peft)
        file = path / "adapter_model.safetensors" if peft else path
        changed = add_loras(model, [(read_lora(path), 1.0)]).tensors["unet"]
        for (name, weight), scale in zip(own.items(), scales, strict=True):
            parts = {k: t for k, t in load_file(file).items() if name.removesuffix("weight") in k}
            up, down = (next(t for k, t in parts.items() if f"lora_{x}" in k) for x in "BA")
            torch.testing.assert_close(changed[name], weight + scale * up @ down, atol=1e-4, rtol=1e-5)
    damaged = settings_beside(tmp_path / "damaged", {"lora_alpha": "much"}, peft)
    with pytest.raises(BadCheckpoint, match="settings stated with it are damaged"):
        read_lora(damaged)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("kernel", [0, 3])
def test_a_dora_sets_the_length_of_rows_or_columns(kernel: int, rows: bool, tmp_path: Path) -> None:
    own, size = torch.randn(6, 4, *(kernel, kernel)[:kernel]), (kernel, kernel)[:kernel]
    up, down = torch.randn(6, 2, *(1, 1)[:kernel]), torch.randn(2, 4, *size)
    magnitude = torch.rand(6 if rows else 4).reshape(-1 if rows else 1, 1 if rows else -1, *(1, 1)[:kernel])
    names = {"lora_B.weight": up, "lora_A.weight": down, "alpha": torch.tensor(1.0), "lora_magnitude_vector": magnitude}
    if not rows:  # as LyCORIS has it
        names["dora_scale"] = names.pop("lora_magnitude_vector")
    save_file({f"lora_unet_conv_in.{k}": t for k, t in names.items()}, tmp_path / "dora.safetensors")
    model = Published(tmp_path, "folder", {"unet": {}}, {"unet": {"conv_in.weight": own}})
    addition = read_lora(tmp_path / "dora.safetensors")
    new = add_loras(model, [(addition, 1.0)]).tensors["unet"]["conv_in.weight"]
    free = own + 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(own.shape)
    axes = [d for d in range(own.ndim) if d != (not rows)]
    length, free_length = (t.square().sum(axes, keepdim=True).sqrt() for t in (new, free))
    torch.testing.assert_close(length.flatten(), magnitude.flatten())
    torch.testing.assert_close(new / length, free / free_length)
    half = add_loras(model, [(addition, 0.5)]).tensors["unet"]["conv_in.weight"]
    torch.testing.assert_close(half, (own + new) / 2)
    assert torch.equal(add_loras(model, [(addition, 0.0)]).tensors["unet"]["conv_in.weight"], own)


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("dora_scale", (1, 5, 1, 1), False),
        ("dora_scale", (5, 1, 1, 1), True),
        ("lora_magnitude_vector", (1, 5, 1, 1), True),
    ],
)
def test_of_a_square_convolution_the_doras_name_and_form_tell_the_axis(
    name: str, shape: tuple[int, ...], rows: bool, tmp_path: Path
) -> None:
    """A magnitude that is the weight's own changes nothing; along the other axis it would."""
    own = torch.randn(5, 5, 3, 3)
    magnitude = own.square().sum((1, 2, 3) if rows else (0, 2, 3)).sqrt().reshape(shape)
    parts = {"lora_B.weight": torch.zeros(5, 1, 1, 1), "lora_A.weight": torch.ones(1, 5, 3, 3), name: magnitude}
    save_file({f"lora_unet_conv_in.{k}": t for k, t in parts.items()}, tmp_path / "dora.safetensors")
    model = Published(tmp_path, "folder", {"unet": {}}, {"unet": {"conv_in.weight": own}})
    changed = add_loras(model, [(read_lora(tmp_path / "dora.safetensors"), 1.0)]).tensors["unet"]["conv_in.weight"]
    torch.testing.assert_close(changed, own)


def test_what_a_partial_lora_leaves_out_is_told_and_the_damaged_one_named(folder: Path, tmp_path: Path) -> None:
    pairs = {f"{m}.lora_{k}.weight": torch.ones(2, 2) for m in ("unet.nowhere",) for k in "AB"}
    whole = lora_of(folder, "peft")
    save_file(whole | pairs, tmp_path / "part.safetensors")
    card = families.load(folder, Additions.of([tmp_path / "part.safetensors"]), partial=True).card
    assert f"1 of {len(whole) // 2 + 1} modules without a place: unet.nowhere" in card["additions"]
    save_file({k: t * torch.nan for k, t in whole.items()}, tmp_path / "nan.safetensors")
    save_file(whole, tmp_path / "whole.safetensors")
    with pytest.raises(BadCheckpoint, match=r"nan\.safetensors: makes NaN"):
        families.load(folder, Additions.of([tmp_path / "nan.safetensors", tmp_path / "whole.safetensors"]))


def test_a_lora_of_a_network_that_leaves_usual_settings_out(folder: Path, tmp_path: Path) -> None:
    model = read_folder(folder)
    config = {k: v for k, v in model.configs["unet"].items() if k != "layers_per_block"}
    assert add_loras(replace(model, configs={**model.configs, "unet": config}), [_addition(folder, tmp_path)])


def _addition(folder: Path, tmp_path: Path) -> tuple[Any, float]:
    save_file(lora_of(folder, "kohya"), tmp_path / "lora.safetensors")
    return read_lora(tmp_path / "lora.safetensors"), 1.0


def test_t5_of_flux_goes_by_either_number(tmp_path: Path) -> None:
    """kohya's trainer numbers T5 as in SD 3, as the third tower; others as FLUX's second."""
    own = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4)}
    model = Published(tmp_path, "folder", {"text_encoder_2": {"d_model": 4}}, {"text_encoder_2": own})
    for number in (2, 3):
        name = f"lora_te{number}_encoder_block_0_layer_0_SelfAttention_q"
        save_file(
            {f"{name}.lora_down.weight": torch.ones(1, 4), f"{name}.lora_up.weight": torch.ones(4, 1)},
            tmp_path / "l.safetensors",
        )
        [changed] = add_loras(model, [(read_lora(tmp_path / "l.safetensors"), 1.0)]).tensors["text_encoder_2"].values()
        assert torch.equal(changed, torch.ones(4, 4))


FAULTS: dict[str, tuple[Tensors, str]] = {
    "another family": ({"lora_unet_double_blocks_0_x.lora_up.weight": torch.ones(2, 2)}, "matches nothing"),
    "no LoRA": ({"conv.weight": torch.ones(2)}, "holds no LoRA"),
    "half a LoRA": ({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, "conv_in does not fit"),
    "another width": (
        {"unet.conv_in.lora_A.weight": torch.ones(2, 9, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(9, 2, 1, 1)},
        "conv_in does not fit",
    ),
    "a part elsewhere": (
        {f"{m}.lora_{k}.weight": torch.ones(2, 2) for m in ("unet.conv_in", "unet.nowhere") for k in "AB"},
        "1 of 2 modules",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str, folder: Path, tmp_path: Path) -> None:
    tensors, reason = FAULTS[fault]
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(BadCheckpoint, match=reason) as caught:
        families.load(folder, Additions.of([path]))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_learned_word_stands_for_its_vectors(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "word.safetensors"
    torch.manual_seed(1)
    save_file({"emb_params": torch.randn(2, 64)}, path)
    plain, model = families.load(folder), families.load(folder, Additions.of(embeddings={"<fox*>": path}))
    assert np.array_equal(generate(model), generate(plain))
    learned = generate(model, "a red <fox*>, running")
    assert np.abs(learned.astype(int) - generate(plain, "a red <fox*>, running")).max() > 5
    save_file({"word": torch.randn(1, 7)}, path)
    with pytest.raises(BadCheckpoint, match="width 7"):
        families.load(folder, Additions.of(embeddings={"x": path}))


def test_a_learned_word_is_none_within_a_longer_one(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "word.safetensors"
    save_file({"emb_params": torch.randn(1, 64)}, path)
    texts = families.load(folder, Additions.of(embeddings={"cat": path}))
    assert np.array_equal(generate(texts, "a category, scat"), generate(families.load(folder), "a category, scat"))
    assert not np.array_equal(generate(texts, "a cat, sitting"), generate(families.load(folder), "a cat, sitting"))


def test_loras_are_for_published_models(folder: Path, tmp_path: Path) -> None:
    file = convert(folder, tmp_path / "model.safetensors")
    save_file(lora_of(folder, "kohya"), tmp_path / "lora.safetensors")
    one, other = (families.load(p, Additions.of([tmp_path / "lora.safetensors"])) for p in (folder, file))
    assert one.hash == other.hash
    assert np.array_equal(generate(one), generate(other))
    assert sfumato.load(folder).model.hash != one.hash


def test_the_command_adds_and_replays_by_content(folder: Path, tmp_path: Path, capsys: Any) -> None:
    lora, word = tmp_path / "style.safetensors", tmp_path / "fox.safetensors"
    save_file(lora_of(folder, "kohya"), lora)
    save_file({"emb_params": torch.randn(2, 64)}, word)
    side = 8 * families.load(folder).factor
    made, plain = tmp_path / "made.png", tmp_path / "plain.png"
    asked = ["--model", str(folder), "--steps", "2", "--seed", "1", "--size", f"{side}x{side}"]
    additions = ["--lora", f"{lora}:0.5", "--lora", str(lora), "--embedding", f"<fox>={word}"]
    assert main(["generate", "a <fox>", *asked, *additions, "--out", str(made)]) == 0
    assert main(["generate", "a <fox>", *asked, "--out", str(plain)]) == 0
    old = read(made).picture
    assert [str(i) for i in old.ingredients] == [
        "lora style.safetensors × 0.5", "lora style.safetensors × 1", "embedding <fox>=fox.safetensors",
    ]  # fmt: skip
    assert str(tmp_path) not in made.read_bytes().decode("latin-1"), "a picture tells no one's folders"
    assert not np.array_equal(old.pixels, read(plain).picture.pixels)
    replayed = ["replay", str(made), "--model", str(folder), "--out", str(tmp_path / "again.png"), "--force"]
    assert main(replayed) == 0  # the files lie beside the picture
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = [p.rename(elsewhere / f"renamed-{p.name}") for p in (lora, word)]
    capsys.readouterr()
    assert main(replayed) == 3
    said = capsys.readouterr().err
    assert "lora style.safetensors × 0.5" in said
    assert "--lora FILE" in said
    assert said.count("\n") == 1
    assert main([*replayed, "--lora", f"{moved[0]}:0.3", "--embedding", f"x={moved[1]}"]) == 2, "a weight of its own"
    assert main([*replayed, "--lora", str(moved[0]), "--embedding", f"x={moved[1]}"]) == 0
    assert main(["replay", str(plain), "--model", str(folder), "--lora", str(moved[0])]) == 2


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (["--lora", "nowhere.safetensors:0.5"], 3, "no such file"),
        (["--embedding", "cat"], 2, "WORD=FILE"),
        (["--embedding", "two words=x"], 2, "without spaces"),
        (["--embedding", "(fox)=x"], 2, "weigh words in prompts"),
        (["--embedding", "a=x", "--embedding", "a=y"], 2, "twice"),
        (["--lora", "x.safetensors:1e9"], 2, "weight of x.safetensors"),
        (["--lora", "x.safetensors:nan"], 2, "weight of x.safetensors"),
    ],
)
def test_additions_that_cannot_be_are_told_in_one_line(
    flags: list[str], code: int, reason: str, folder: Path, capsys: Any
) -> None:
    assert main(["generate", "a", "--model", str(folder), *flags]) == code
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_the_embedded_family_takes_no_additions(tiny_file: Path, tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    with pytest.raises(BadRequest, match="cannot be added"):
        sfumato.load(tiny_file, loras=[tmp_path / "lora.safetensors"])


def test_a_partial_model_says_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(convert(folder, tmp_path / "model.safetensors"))
    lost = "model.diffusion_model.input_blocks.1.0.in_layers.0.bias"
    del tensors[lost]
    save_file(tensors | {"model.diffusion_model.more": torch.ones(2)}, tmp_path / "gaps.safetensors")
    with pytest.raises(BadCheckpoint, match=r"no place.*--partial"):
        sfumato.load(tmp_path / "gaps.safetensors")
    card = sfumato.load(tmp_path / "gaps.safetensors", partial=True).model.card
    assert "1 missing: down_blocks.0.resnets.0.norm1.bias" in card["unet's gaps"]
    assert "model.diffusion_model.more" in card["left out"]
    assert card["matched"].startswith("99.")
    assert sfumato.load(folder).model.card["matched"].startswith("100%")
