"""Loaders of models for the server's workers, named by ``Settings.loader``.

tiny: the real pipeline with random weights, 16×16. sleepy: the same, whose network sleeps 50 ms a call. deadly: the
same, whose network does what a prompt tells it to.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.families import load
from sfumato.families.model import Model

SLEEP = 0.05  # seconds


class Acting(nn.Module):
    """A network that does something before each call."""

    def __init__(self, network: nn.Module, act: Callable[[], None]) -> None:
        super().__init__()
        self.network, self.act = network, act

    def forward(self, x: Tensor, clock: Tensor, **conditioning: Tensor) -> Tensor:
        self.act()
        return self.network(x, clock, **conditioning)


def sleepy(name: str) -> Model:
    model = load(name)
    return replace(model, network=Acting(model.network, lambda: time.sleep(SLEEP)))


def slow(name: str) -> Model:
    """Half a second a call: for what must be caught in the act."""
    model = load(name)
    return replace(model, network=Acting(model.network, lambda: time.sleep(10 * SLEEP)))


def loud(name: str) -> Model:
    """Sleepy, and its previews are as large as they get: noise."""
    model = sleepy(name)
    return replace(model, preview=lambda x: torch.rand(len(x), 3, 384, 384) * 2 - 1)


LEAK: list[bytes] = []


def leaky(name: str) -> Model:
    """Four kilobytes of each picture, guided and not, are never given back."""
    model = load(name)
    model.network.register_forward_pre_hook(lambda _, given: LEAK.append(os.urandom(4096 * len(given[0]))))
    return model


def gated(name: str) -> Model:
    """Every call waits while a file is there."""
    model, gate = load(name), Path(os.environ["SFUMATO_TEST_GATE"])

    def wait() -> None:
        end = time.monotonic() + 300
        while gate.exists() and time.monotonic() < end:
            time.sleep(0.01)

    return replace(model, network=Acting(model.network, wait))


class Deadly(nn.Module):
    """A network that does what the words of any of its rows tell it to."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, clock: Tensor, fate: Tensor, **conditioning: Tensor) -> Tensor:
        time.sleep(SLEEP)
        for number in fate.unique().tolist():
            if number:
                [*FATES.values()][int(number) - 1]()
        return self.network(x, clock, **conditioning)


def deadly(name: str) -> Model:
    model = load(name)

    def encode(prompts: list[str]) -> Any:
        numbers = [[1.0 + [*FATES].index(p) if p in FATES else 0.0] for p in prompts]
        return {**model.encode(prompts), "fate": torch.tensor(numbers)}

    return replace(model, encode=encode, network=Deadly(model.network))


def _raise() -> None:
    raise RuntimeError("/secret/path: a prompt or a token may stand here")


def _exhaust() -> None:
    bytearray(1 << 60)


FATES: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "segfault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),  # as the kernel does when memory runs out
    "exhaust": _exhaust,
}


def enlarging(name: str) -> Model:
    """Its pictures are enlarged by four unless they are asked not to be."""
    model = load(name)
    return replace(model, defaults=replace(model.defaults, upscale=4))
