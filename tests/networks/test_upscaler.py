"""The upscaler: what it adds to a plain enlargement, the weights that ship, and the file that they come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.data.config import DataConfig
from sfumato.data.pictures import load_pictures
from sfumato.errors import BadCheckpoint
from sfumato.families.upscaler import load_upscaler
from sfumato.networks.upscaler import Upscaler, UpscalerConfig

TOOL = Path(__file__).parents[2] / "tools" / "convert_upscaler.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_upscaler", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_details_it_repeats_pixels():
    network = Upscaler(UpscalerConfig(width=4, body=2))
    for p in network.layers[-1].parameters():
        torch.nn.init.zeros_(p)
    x = torch.rand(2, 3, 5, 7)
    assert torch.equal(network(x), x.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_the_weights_that_ship_sharpen_edges_and_leave_flat_parts_alone():
    network = load_upscaler()
    images = load_pictures(DataConfig("sample", where={"style": ["noto"]}), 64, Path()).images
    x = torch.stack([images[i] for i in range(0, 80, 10)]).float() / 255
    with torch.inference_mode():
        y = network(x)
    assert y.shape == (8, 3, 256, 256)
    plain = F.interpolate(x, scale_factor=4.0, mode="bicubic")
    # Brought back to its size, it is the picture; between the pixels it is steeper than a smooth enlargement.
    assert (F.avg_pool2d(y, 4) - x).abs().mean() < 0.02

    def steepness(v: torch.Tensor) -> torch.Tensor:
        return (v[..., 1:] - v[..., :-1]).abs().flatten(1).topk(1000).values.mean()

    assert steepness(y) > 1.3 * steepness(plain)
    flat = torch.full((1, 3, 44, 44), 0.6)  # its middle sees no edge: 18 convolutions reach 18 pixels
    with torch.inference_mode():
        assert (network(flat)[..., 76:-76, 76:-76] - 0.6).abs().max() < 0.03


def written(network: Upscaler) -> tuple[str, bytes]:
    """A network as ncnn's two files."""
    lines, data = ["Input in 0 1 data", "Split s 1 2 data a b"], b""
    for i, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.Conv2d):
            n = layer.weight.numel()
            lines.append(f"Convolution c{i} 1 1 x y 0={layer.out_channels} 1=3 4=1 5=1 6={n}")
            data += b"\x47\x6b\x30\x01" + layer.weight.detach().numpy().astype("<f2").tobytes()
            data += b"\0" * (-len(data) % 4) + layer.bias.detach().numpy().astype("<f4").tobytes()
        else:
            lines.append(f"PReLU p{i} 1 1 x y 0={layer.num_parameters}")
            data += layer.weight.detach().numpy().astype("<f4").tobytes()
    return "\n".join(["7767517", f"{len(lines)} 9", *lines, ""]), data


def test_ncnns_file_is_read_to_its_last_byte(tool: ModuleType):
    network = Upscaler(UpscalerConfig(width=3, body=2))  # 81 fp16 weights: an odd number, which is padded
    param, data = written(network)
    tensors = tool.read_ncnn(param, data)
    assert tensors.keys() == network.state_dict().keys()
    for name, v in network.state_dict().items():
        expected = v.numpy().astype("<f2").astype(np.float32) if v.ndim == 4 else v.numpy()
        assert np.array_equal(tensors[name].numpy(), expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, d: (p, d + b"\0"), "1 bytes left over"),
        (lambda p, d: (p, d[:-1]), "end too early"),
        (lambda p, d: (p, b"\0" * 4 + d[4:]), "not fp16"),
        (lambda p, d: (p.replace("5=1", "5=0"), d), "a convolution with"),
        (lambda p, d: (p.replace("PReLU p1", "ReLU p1"), d), "unknown kind ReLU"),
        (lambda p, d: (p.replace("7767517", "7767518"), d), "no ncnn text"),
        (lambda p, d: (p.replace("Split s 1 2 data a b\n", ""), d), "layers instead of"),
    ],
)
def test_what_it_does_not_know_is_refused(tool: ModuleType, change, message: str):
    with pytest.raises(BadCheckpoint, match=message):
        tool.read_ncnn(*change(*written(Upscaler(UpscalerConfig(width=4, body=1)))))
