"""The tool that makes a trained model the embedded one: what it keeps, what it loses, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sfumato.checkpoints.tensors import read_header, read_tensors, to_half
from sfumato.config import from_dict, to_dict
from sfumato.families.autoencoder import FORMAT as AUTOENCODER
from sfumato.families.native import Native, NativeConfig, metadata, read_native
from sfumato.networks.compact import CompactAutoencoder, CompactConfig, deepened
from sfumato.pipeline.pipeline import load
from sfumato.text.tokenizer import packaged_clip

ROOT = Path(__file__).parents[1]
SHAPE = {"latent_channels": 3, "widths": [8, 12], "patch": 2, "encoder_blocks": 1, "decoder_blocks": 1}
MODEL = {
    "size": 16, "autoencoder": SHAPE,
    "transformer": {"in_channels": 3, "patch": 2, "size": 4, "dim": 32, "layers": 2, "heads": 2, "word_heads": 1,
                    "context_dim": 32, "experts": 2, "expert_dim": 96, "expert_share": 1.0},
    "text": {"vocabulary": 49408, "tokenizer": "clip", "token_dim": 4, "dim": 32, "layers": 1, "heads": 2,
             "max_tokens": 16},
    "defaults": {"steps": 3, "width": 16, "height": 16},
}  # fmt: skip
DEFAULTS = {"steps": 2, "width": 16, "height": 16, "guidance": 1.5}


def embed(source: Path, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    recipe = target.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({"model": {"defaults": DEFAULTS}, "card": {"styles": "none"}}))
    command = [sys.executable, str(ROOT / "tools/embed.py"), str(source), str(target), str(recipe), *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = from_dict(NativeConfig, MODEL, "test")
    native = Native(config, packaged_clip())
    for p in native.parameters():  # nothing starts at zero
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("trained") / "final.safetensors"
    save_file(to_half(native.state_dict()), path, metadata(config, native.text.tokenizer, {"name": "final"}))
    return path


def test_what_is_embedded_draws_alike_and_is_what_it_is_told(trained: Path, tmp_path: Path) -> None:
    done = embed(trained, tmp_path / "small.safetensors")
    assert done.returncode == 0, done.stderr
    kinds = {k: v.dtype for k, v in read_tensors(tmp_path / "small.safetensors").items()}
    assert kinds["text.tokens.weight"] == torch.float8_e4m3fn
    assert kinds["network.blocks.1.wide.weight"] == kinds["network.blocks.0.experts.wide"] == torch.int8
    assert kinds["network.blocks.1.wide.weight_scale"] == kinds["network.blocks.1.table"] == torch.half
    before, after = read_native(trained).state_dict(), read_native(tmp_path / "small.safetensors").state_dict()
    assert before.keys() == after.keys()
    for k, v in before.items():
        share = float((after[k] - v).square().sum() / v.square().sum().clamp(min=1e-30))
        assert share < (1e-3 if k == "text.tokens.weight" else 1e-4), k
    model = load(tmp_path / "small.safetensors").model
    assert model.card["name"] == "small"
    assert (model.defaults.steps, model.defaults.guidance) == (2, 1.5)
    assert model.card["styles"] == "none"


def test_a_student_keeps_the_steps_that_it_was_taught(trained: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "distil.yaml"
    recipe.write_text(yaml.safe_dump({"task": "distill", "card": {"styles": "none"}}))
    command = [
        sys.executable,
        str(ROOT / "tools/embed.py"),
        str(trained),
        str(tmp_path / "fast.safetensors"),
        str(recipe),
    ]
    assert subprocess.run(command).returncode == 0
    assert read_native(tmp_path / "fast.safetensors").config.defaults == read_native(trained).config.defaults


def test_embedding_again_changes_no_weight(trained: Path, tmp_path: Path) -> None:
    once, again, whole = (tmp_path / f"{name}.safetensors" for name in ("once", "again", "whole"))
    for source, target, more in ((trained, once, []), (once, again, []), (once, whole, ["--whole"])):
        done = embed(source, target, *more)
        assert done.returncode == 0, done.stderr
    first, second, last = (read_tensors(path) for path in (once, again, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k].view(torch.uint8), second[k].view(torch.uint8)) for k in first)
    assert {v.dtype for k, v in last.items() if k != "text.tokens.weight"} == {torch.half}


def test_the_mean_of_two_denoisers_is_a_model(trained: Path, tmp_path: Path) -> None:
    tensors = dict(read_tensors(trained))
    tensors |= {k: -3 * v for k, v in tensors.items() if k.startswith("network.")}
    save_file(tensors, tmp_path / "other.safetensors", dict(read_header(trained).metadata))
    done = embed(trained, tmp_path / "mean.safetensors", "--average", str(tmp_path / "other.safetensors"), "--whole")
    assert done.returncode == 0, done.stderr
    found, first = read_tensors(tmp_path / "mean.safetensors"), read_tensors(trained)
    for k, v in first.items():
        if k != "text.tokens.weight":
            torch.testing.assert_close(found[k], -v if k.startswith("network.") else v, atol=1e-3, rtol=1e-3)
    del tensors["network.conv_out.bias"]
    save_file(tensors, tmp_path / "other.safetensors")
    done = embed(trained, tmp_path / "bad.safetensors", "--average", str(tmp_path / "other.safetensors"))
    assert (done.returncode, "network.conv_out.bias differs" in done.stderr) == (2, True)


def test_another_decoder_must_be_of_the_same_latents_and_shape(trained: Path, tmp_path: Path) -> None:
    def stored(network: CompactAutoencoder, name: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        meta = {AUTOENCODER: json.dumps({"config": to_dict(network.config), "card": {}})}
        save_file(to_half(network.state_dict()), path, meta)
        return path

    own = read_native(trained).autoencoder
    assert own is not None
    with torch.no_grad():
        own.decoder[0].bias.add_(1.0)
    done = embed(trained, tmp_path / "new.safetensors", "--autoencoder", str(stored(own, "learned")))
    assert done.returncode == 0, done.stderr
    bias = "autoencoder.decoder.0.bias"
    assert torch.equal(read_tensors(tmp_path / "new.safetensors")[bias], own.state_dict()["decoder.0.bias"].half())
    done = embed(trained, tmp_path / "deep.safetensors", "--autoencoder", str(stored(deepened(own, 3), "deep")))
    assert done.returncode == 0, done.stderr
    deep = read_native(tmp_path / "deep.safetensors").autoencoder
    assert deep is not None
    assert deep.config.decoder_blocks == 3
    z = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(deep.decode(z), own.decode(z), atol=2e-2, rtol=2e-2)  # kernels of eight bits
    wider = CompactAutoencoder(from_dict(CompactConfig, {**SHAPE, "widths": [8, 16]}, "test"))
    with torch.no_grad():
        own.mean.add_(1.0)
    for other, said in ((wider, "widths=(8, 16)"), (own, "mean differs")):
        done = embed(trained, tmp_path / "bad.safetensors", "--autoencoder", str(stored(other, "other")))
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "bad.safetensors").exists()


def test_the_embedded_model_is_what_the_tool_makes_of_it() -> None:
    """Every matrix that the tool would pack is packed in the file that ships, to its scale's full range."""
    path = ROOT / "src/sfumato/models/emoji-64.safetensors"
    assert read_header(path).metadata
    tensors = read_tensors(path)
    packed = [k for k, v in tensors.items() if v.dtype == torch.int8]
    assert len(packed) > 100
    large = [k for k, v in tensors.items() if k.startswith("network.") and v.ndim in (2, 3) and v.numel() >= 4096]
    assert [k for k in large if k not in packed] == []
    assert all(tensors[f"{k}_scale"].isfinite().all() for k in packed)
    assert all(int(tensors[k].abs().max()) == 127 for k in packed)
