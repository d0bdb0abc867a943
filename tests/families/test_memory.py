"""How weights are kept: whole, one layer at a time, in which type; and that pictures do not depend on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import make
from safetensors.torch import load_file, save_file
from torch import nn

import sfumato
from sfumato.errors import BadRequest
from sfumato.families import common, keeping
from sfumato.networks.stored import TURNS, Mappings, Stored, in_dtype, keeper
from sfumato.pipeline.pipeline import Pipeline

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux", "dit")


@pytest.fixture(scope="module", params=FAMILIES)
def half(request: Any, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """A family's small model whose weights are in float16, and the settings of a request to it."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make(request.param, 1).to(torch.float16).save_pretrained(folder)
    factor = sfumato.load(folder, memory="low").model.factor
    settings = {"prompt": "277", "steps": 2, "seed": 3, "width": 8 * factor, "height": 8 * factor}
    return folder, settings


def picture(folder: Path, settings: dict[str, Any], **how: Any) -> np.ndarray:
    [made] = sfumato.load(folder, **how).generate(**settings)
    assert made.made_with["dtype"] == how.get("dtype", "fp32")
    return made.pixels.astype(int)


@pytest.mark.parametrize("dtype", keeping.DTYPES)
def test_little_memory_makes_the_same_pictures(half: tuple[Path, dict[str, Any]], dtype: str) -> None:
    folder, settings = half
    whole = picture(folder, settings, dtype=dtype, memory="normal")
    assert whole.std() > 5, "a flat picture proves nothing"
    assert np.array_equal(picture(folder, settings, dtype=dtype, memory="low"), whole)


def test_bf16_makes_almost_the_same_picture(half: tuple[Path, dict[str, Any]]) -> None:
    folder, settings = half
    exact, rounded = (picture(folder, settings, dtype=dtype) for dtype in keeping.DTYPES)
    assert 0 < np.abs(exact - rounded).mean() < 8


def test_low_leaves_every_weight_in_its_file(half: tuple[Path, dict[str, Any]]) -> None:
    model = sfumato.load(half[0], memory="low").model
    assert all(isinstance(p, Stored) and p.source.dtype == torch.float16 for p in model.network.parameters())
    assert all(p.next is None for p in model.network.parameters() if isinstance(p, Stored)), "none was read to load it"
    assert model.card["memory"].startswith("low: ")


def test_normal_keeps_what_is_used_again(half: tuple[Path, dict[str, Any]]) -> None:
    folder, settings = half
    pipe = sfumato.load(folder, memory="normal")
    network = pipe.model.network
    waiting = [p for p in network.parameters() if isinstance(p, Stored)]
    assert waiting
    assert not any(p.kept for p in waiting)
    assert all(type(p) is nn.Parameter for p in network.parameters() if p.ndim < 2)
    shares = []
    for _ in range(TURNS + 1):
        pipe.generate(**{**settings, "steps": 1, "sampler": "ddim", "guidance": 1.0})
        shares.append(sum(p.kept for p in waiting) / len(waiting))
    assert shares[0] == 0, "used once"
    assert 0 < shares[1] < shares[2] < shares[3] < shares[4]
    assert shares[4] > 0.9, "but for tables, of which rows are taken"
    assert all(p.source.dtype == torch.float32 for p in waiting if p.kept)
    again = picture(folder, settings, memory="low")
    [made] = pipe.generate(**settings)
    assert np.array_equal(made.pixels, again)


def is_low(pipe: Pipeline) -> bool:
    return any(isinstance(p, Stored) and p.uses is None for p in pipe.model.network.parameters())


def test_auto_keeps_little_where_all_would_not_fit(
    half: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {k: sum(t.numel() for t in load_file(f).values()) for k, f in _weights(half[0]).items()}
    need = 4 * sum(numbers.values())
    for free, low in ((2 * need, False), (need, True), (None, False)):
        monkeypatch.setattr(keeping, "free_memory", lambda free=free: free)
        pipe = sfumato.load(half[0])
        assert is_low(pipe) == low
        assert f"{need >> 20} MiB" in pipe.model.card["memory"]
    bf16 = need // 2 + 2 * numbers["vae"]  # which stays in float32
    monkeypatch.setattr(keeping, "free_memory", lambda: int(bf16 / keeping.SHARE) + 4)
    assert not is_low(sfumato.load(half[0], dtype="bf16"))
    monkeypatch.setattr(keeping, "free_memory", lambda: int(bf16 / keeping.SHARE) - 4)
    assert is_low(sfumato.load(half[0], dtype="bf16"))


def _weights(folder: Path) -> dict[str, Path]:
    return {f.parent.name: f for f in folder.glob("*/*.safetensors")}


@pytest.mark.parametrize(("how", "told"), [({"dtype": "fp16"}, "fp32 or bf16"), ({"memory": "lo"}, "auto or normal")])
def test_unknown_words_are_refused(how: dict[str, str], told: str, tiny_file: Path) -> None:
    with pytest.raises(BadRequest, match=told):
        sfumato.load(tiny_file, **how)  # type: ignore[arg-type]


def test_free_memory_is_less_than_there_is() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    free = keeping.free_memory()
    assert free is not None
    assert 0 < free < total


def resident(file: Path) -> int:
    """Bytes of a mapped file's pages that count to this process."""
    rss, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            rss += int(line.split()[1]) << 10
    return rss


def stored_twin(module: nn.Module, file: Path, low: bool) -> nn.Module:
    """The module with weights from a file in float16, kept as ``build`` does."""
    save_file({k: t.half() for k, t in module.state_dict().items()}, file)
    with torch.device("meta"), common.Unfilled():
        twin = nn.Sequential(*(type(m)(m.in_features, m.out_features) for m in module))  # type: ignore[attr-defined]
    twin.requires_grad_(False)
    tensors = load_file(file)
    keep = keeper(Mappings([file]), twin.state_dict(keep_vars=True), low)
    twin.load_state_dict({k: keep(k, t) for k, t in tensors.items()}, assign=True)
    return twin


@pytest.mark.parametrize("low", [True, False])
def test_pages_of_the_file_are_let_go(low: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    twin = stored_twin(nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), file, low)
    for _ in range(TURNS + 2):
        y = twin(torch.ones(3, 512))
        assert resident(file) < file.stat().st_size / 4
    tensors = load_file(file)
    x = torch.ones(3, 512)
    for i in range(8):
        x = nn.functional.linear(x, tensors[f"{i}.weight"].float(), tensors[f"{i}.bias"].float())
    assert torch.equal(x, y)


@pytest.mark.parametrize("low", [True, False])
def test_a_stored_network_widens_and_is_shared_by_threads(low: bool, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    plain = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).half().float()
    twin = stored_twin(plain, tmp_path / "weights.safetensors", low)
    x = torch.randn(5, 256)
    wide = in_dtype(twin, torch.float64)
    assert all(isinstance(p, Stored) == (low or p.ndim > 1) for p in wide.parameters())
    assert torch.equal(wide(x.double()), in_dtype(plain, torch.float64)(x.double()))
    assert next(plain.parameters()).dtype == torch.float32
    inputs = [torch.randn(5, 256) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, plain(b)) for a, b in zip(pool.map(twin, inputs), inputs, strict=True))


@pytest.mark.parametrize("low", [True, False])
def test_a_stored_network_can_be_changed_copied_and_saved(low: bool, tmp_path: Path) -> None:
    """As one of plain parameters can."""
    plain = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2))).half().float().requires_grad_(False)
    x = torch.randn(5, 64)
    before = plain(x)

    def twin() -> nn.Module:
        return stored_twin(plain, tmp_path / "weights.safetensors", low)

    copied = copy.deepcopy(twin()).requires_grad_(True)
    assert {type(p) for p in copied.parameters()} == {nn.Parameter}
    copied(x).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert torch.equal(twin().double()(x.double()), copy.deepcopy(plain).double()(x.double()))

    changed = twin()
    for p in changed.parameters():
        p.mul_(2)
        p += 1
        p[0] = 0
    twice = copy.deepcopy(plain)
    for p in twice.parameters():
        p.mul_(2).add_(1)[0] = 0
    assert torch.equal(changed(x), twice(x))
    assert torch.equal(twin()(x), before), "the file is as it was"
    changed.load_state_dict(plain.state_dict())
    assert torch.equal(changed(x), before)
    if not low:
        state = twin().state_dict()
        save_file(state, tmp_path / "saved.safetensors")
        assert all(torch.equal(t, plain.state_dict()[k]) for k, t in load_file(tmp_path / "saved.safetensors").items())
    with pytest.raises(NotImplementedError, match="no gradient"):
        twin().requires_grad_(True)


def test_what_a_stored_weight_cannot_do_is_refused(tmp_path: Path) -> None:
    twin = stored_twin(nn.Sequential(nn.Linear(8, 8)), tmp_path / "weights.safetensors", True)
    weight = next(twin.parameters())
    assert weight.shape == (8, 8)
    assert "Stored(torch.float16 → torch.float32" in repr(weight)
    with pytest.raises(NotImplementedError, match="stay in their file"), torch._C.DisableTorchFunctionSubclass():
        torch.add(weight, weight)
