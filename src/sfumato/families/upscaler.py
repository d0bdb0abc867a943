"""The network that enlarges finished pictures by 4: Real-ESRGAN's for drawings; its card lies beside its weights."""

from __future__ import annotations

from pathlib import Path

from sfumato.checkpoints.tensors import load_into, read_tensors
from sfumato.networks.upscaler import Upscaler

WEIGHTS = Path(__file__).parents[1] / "models" / "parts" / "realesr-animevideov3-x4.safetensors"


def load_upscaler(path: Path = WEIGHTS) -> Upscaler:
    """Load the network, in float32 and frozen; BadCheckpoint if the file is damaged or does not fit."""
    network = Upscaler()
    load_into(network, read_tensors(path))
    return network.eval().requires_grad_(False)
