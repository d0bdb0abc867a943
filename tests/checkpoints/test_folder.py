"""Published folders: variants, shards, names of old, and what is refused; whole models are tested with the families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sfumato.checkpoints.folder import read_folder, weight_files, write_folder
from sfumato.errors import BadCheckpoint

ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two components of a few tensors."""
    root = tmp_path / "model"
    index = {"_class_name": "X", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"]}
    for name, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
        save_file({"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}, root / name / f"{file}.safetensors")
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def shard(folder: Path, variant: str = "") -> Path:
    """Split the U-Net into two files, as published ones of many gigabytes are; return the index."""
    unet = folder / "unet"
    tensors = read_folder(folder).tensors["unet"]
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    names = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, (key, tensor) in zip(names, sorted(tensors.items()), strict=True):
        save_file({key: tensor.clone()}, unet / name)
    index = unet / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": dict(zip(sorted(tensors), names, strict=True))}))
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_one(folder: Path, variant: str) -> None:
    whole = {k: t.clone() for k, t in read_folder(folder).tensors["unet"].items()}
    shard(folder, variant)
    parts = read_folder(folder).tensors["unet"]
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[k], whole[k]) for k in whole)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "pytorch_model"])
def test_pickles_in_one_file_or_shards_are_read_if_allowed(folder: Path, stem: str) -> None:
    whole = {k: t.clone() for k, t in read_folder(folder).tensors["unet"].items()}
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(whole, unet / f"{stem}.bin")
    with pytest.raises(BadCheckpoint, match="allow it with --allow-pickle"):
        read_folder(folder)
    single = read_folder(folder, allow_pickle=True).tensors["unet"]
    (unet / f"{stem}.bin").unlink()
    names = {key: f"{stem}-0000{i}-of-00002.bin" for i, key in enumerate(sorted(whole), 1)}
    for key, name in names.items():
        torch.save({key: whole[key]}, unet / name)
    (unet / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BadCheckpoint, match="allow it with --allow-pickle"):
        read_folder(folder)
    shards = read_folder(folder, allow_pickle=True).tensors["unet"]
    for found in (single, shards):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[k], whole[k]) for k in whole)
    (unet / names["a.bias"]).unlink()
    with pytest.raises(BadCheckpoint, match="which is not there"):
        read_folder(folder, allow_pickle=True)


def test_a_variant_is_taken_if_asked_for_or_alone(folder: Path) -> None:
    unet = folder / "unet"
    half = {"a.weight": torch.zeros(3, 4).half(), "a.bias": torch.zeros(3).half()}
    save_file(half, unet / "diffusion_pytorch_model.fp16.safetensors")
    assert read_folder(folder).tensors["unet"]["a.bias"].dtype == torch.float32
    assert weight_files(unet, "fp16") == [unet / "diffusion_pytorch_model.fp16.safetensors"]
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert read_folder(folder).tensors["unet"]["a.bias"].dtype == torch.float16
    with pytest.raises(BadCheckpoint, match="variant 'bf16'"):
        weight_files(unet, "bf16")
    save_file(half, unet / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(BadCheckpoint, match="bf16, fp16; say which"):
        read_folder(folder)


def test_names_of_old_are_those_of_today(folder: Path) -> None:
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    old = {f"encoder.mid_block.attentions.0.{name}.weight": torch.randn(2, 2, 1, 1) for name in ATTENTION}
    save_file(old, folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = {
        "text_model.embeddings.position_ids": torch.arange(3)[None],
        "text_model.final_layer_norm.bias": torch.ones(1),
    }
    save_file(text, folder / "text_encoder" / "model.safetensors")
    model = read_folder(folder)
    for name, tensor in old.items():
        *head, module, leaf = name.split(".")
        assert torch.equal(model.tensors["vae"][".".join([*head, ATTENTION[module], leaf])], tensor[:, :, 0, 0])
    assert list(model.tensors["text_encoder"]) == ["final_layer_norm.bias"]


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def index_is_a_list(folder: Path) -> None:
    (folder / "model_index.json").write_text("[]")


def deep_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[" * 100_000)


def no_component(folder: Path) -> None:
    for file in (folder / "unet").iterdir():
        file.unlink()
    (folder / "unet").rmdir()


def only_pickles(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def missing_shard(folder: Path) -> None:
    shard(folder).with_name("diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    file = shard(folder).with_name("diffusion_pytorch_model-00002-of-00002.safetensors")
    file.write_bytes(file.read_bytes()[:-3])


def elsewhere(where: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shard(folder).write_text(json.dumps({"weight_map": {"a": where}}))

    return change


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (no_index, "model_index.json: no such file"),
    "index is a list": (index_is_a_list, "no JSON record"),
    "deep index": (deep_index, "not valid JSON"),
    "no component": (no_component, "names a unet"),
    "only pickles": (only_pickles, "can run code"),
    "missing shard": (missing_shard, "not there"),
    "cut shard": (cut_shard, "cut short"),
    "shard above": (elsewhere("../../secret.safetensors"), "no plain safetensors file"),
    "absolute shard": (elsewhere("/etc/passwd"), "no plain safetensors file"),
    "shard is a pickle": (elsewhere("weights.bin"), "no plain safetensors file"),
    "weight map of nothing": (elsewhere(""), "no plain safetensors file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_in_one_line(fault: str, folder: Path) -> None:
    spoil, reason = FAULTS[fault]
    spoil(folder)
    with pytest.raises(BadCheckpoint, match=reason) as caught:
        read_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["../x", "a/b", "", "fp16.safetensors"])
def test_a_variant_is_a_plain_name(variant: str, folder: Path) -> None:
    with pytest.raises(BadCheckpoint, match="plain name"):
        read_folder(folder, variant)


def test_python_in_a_folder_is_never_looked_at(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "unet" / "unet.py").write_text(f"open({str(marker)!r}, 'w')")
    raw: dict[str, Any] = {"auto_map": {"AutoModel": "unet.X"}, "_class_name": ["unet", "X"]}
    (folder / "unet" / "config.json").write_text(json.dumps(raw))
    read_folder(folder)
    assert not marker.exists()


def test_a_folder_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    model = read_folder(folder)
    copy = tmp_path / "copy"
    write_folder(model, copy)
    assert read_folder(copy).fingerprint() == model.fingerprint()
    with pytest.raises(BadCheckpoint, match="exists already"):
        write_folder(model, copy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "model"]
