"""What all tests share: the tiny model (the real family with random weights, 16×16 pixels) and --soak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sfumato.families.model import Model

TINY = {
    "size": 16,
    "network": {
        "widths": (16, 24), "attention": (False, True), "blocks": 1, "heads": 2, "context_dim": 16,
        "clock_scale": 1000.0,
    },
    "text": {"vocabulary": 300, "dim": 16, "layers": 1, "heads": 2, "max_tokens": 24},
    "defaults": {"steps": 4, "guidance": 2.0, "width": 16, "height": 16},
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the full form of the reliability tests: hours, not minutes")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether counts are those of the full form."""
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def make_tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function from a seed to a weight file of the tiny model."""

    def make(seed: int) -> Path:
        import torch
        from safetensors.torch import save_file

        from sfumato.config import from_dict
        from sfumato.families.native import Native, NativeConfig, metadata
        from sfumato.text.tower import train_tokenizer

        config = from_dict(NativeConfig, TINY, "tiny")
        native = Native(config, train_tokenizer(["a red apple", "a blue house in the rain"], 300))
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            k: (v.half() if "norm" in k else torch.randn(v.shape, generator=generator).mul(0.1).half())
            for k, v in native.state_dict().items()
        }
        path = tmp_path_factory.mktemp("tiny") / f"tiny-{seed}.safetensors"
        save_file(tensors, path, metadata(config, native.text.tokenizer, {"name": "tiny", "licence": "none"}))
        return path

    return make


@pytest.fixture(scope="session")
def tiny_file(make_tiny_file: Callable[[int], Path]) -> Path:
    """The tiny model's weight file."""
    return make_tiny_file(0)


@pytest.fixture(scope="session")
def tiny(tiny_file: Path) -> Model:
    """The tiny model, loaded."""
    from sfumato.families import load

    return load(tiny_file)
