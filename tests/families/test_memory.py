"""How weights are kept: whole, one layer at a time, in which type; and that pictures do not depend on it."""

from __future__ import annotations

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
from sfumato.networks.stored import Mappings, Stored, in_dtype, keeper

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
    whole = sfumato.load(half[0], memory="normal").model
    assert {(p.dtype, type(p)) for p in whole.network.parameters()} == {(torch.float32, nn.Parameter)}


def test_auto_keeps_little_where_all_would_not_fit(
    half: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {k: sum(t.numel() for t in load_file(f).values()) for k, f in _weights(half[0]).items()}
    need = 4 * sum(numbers.values())
    for free, low in ((2 * need, False), (need, True), (None, False)):
        monkeypatch.setattr(keeping, "free_memory", lambda free=free: free)
        model = sfumato.load(half[0]).model
        assert isinstance(next(model.network.parameters()), Stored) == low
        assert f"{need >> 20} MiB" in model.card["memory"]
    bf16 = need // 2 + 2 * numbers["vae"]  # which stays in float32
    monkeypatch.setattr(keeping, "free_memory", lambda: int(bf16 / keeping.SHARE) + 4)
    assert not isinstance(next(sfumato.load(half[0], dtype="bf16").model.network.parameters()), Stored)
    monkeypatch.setattr(keeping, "free_memory", lambda: int(bf16 / keeping.SHARE) - 4)
    assert isinstance(next(sfumato.load(half[0], dtype="bf16").model.network.parameters()), Stored)


def _weights(folder: Path) -> dict[str, Path]:
    return {f.parent.name: f for f in folder.glob("*/*.safetensors")}


@pytest.mark.parametrize(("how", "told"), [({"dtype": "fp16"}, "fp32, bf16"), ({"memory": "lo"}, "auto, normal, low")])
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


def stored_twin(module: nn.Module, file: Path, stored: bool) -> nn.Module:
    """The module with weights from a file in float16, kept as ``build`` does."""
    save_file({k: t.half() for k, t in module.state_dict().items()}, file)
    with torch.device("meta"), common.Unfilled():
        twin = nn.Sequential(*(type(m)(m.in_features, m.out_features) for m in module))  # type: ignore[attr-defined]
    tensors = load_file(file)
    keep = keeper(Mappings([file]), twin.state_dict(keep_vars=True), stored)
    twin.load_state_dict({k: keep(k, t) for k, t in tensors.items()}, assign=True)
    return twin.requires_grad_(False)


@pytest.mark.parametrize("stored", [True, False])
def test_pages_of_the_file_are_let_go(stored: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    twin = stored_twin(nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), file, stored)
    for _ in range(2):
        y = twin(torch.ones(3, 512))
        assert resident(file) < file.stat().st_size / 4
    tensors = load_file(file)
    x = torch.ones(3, 512)
    for i in range(8):
        x = nn.functional.linear(x, tensors[f"{i}.weight"].float(), tensors[f"{i}.bias"].float())
    assert torch.equal(x, y)


def test_a_stored_network_widens_and_is_shared_by_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    plain = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).half().float()
    twin = stored_twin(plain, tmp_path / "weights.safetensors", True)
    x = torch.randn(5, 256)
    wide = in_dtype(twin, torch.float64)
    assert all(isinstance(p, Stored) for p in wide.parameters())
    assert torch.equal(wide(x.double()), in_dtype(plain, torch.float64)(x.double()))
    assert next(plain.parameters()).dtype == torch.float32
    inputs = [torch.randn(5, 256) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, plain(b)) for a, b in zip(pool.map(twin, inputs), inputs, strict=True))


def test_what_a_stored_weight_cannot_do_is_refused(tmp_path: Path) -> None:
    twin = stored_twin(nn.Sequential(nn.Linear(8, 8)), tmp_path / "weights.safetensors", True)
    weight = next(twin.parameters())
    assert weight.shape == (8, 8)
    assert "Stored(torch.float16 → torch.float32" in repr(weight)
    with pytest.raises(NotImplementedError, match="stay in their file"), torch._C.DisableTorchFunctionSubclass():
        torch.add(weight, weight)
