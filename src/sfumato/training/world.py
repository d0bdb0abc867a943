"""The ranks that train together: one process alone, or those that torchrun started.

Under ``ddp`` every rank holds the whole state, under ``fsdp`` (FSDP2) each holds a shard of every tensor. ``full`` and
``placed_like`` go between a shard and the whole, so that checkpoints are the same files whatever the world.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sfumato.errors import BadCheckpoint, BadData, BadRequest, NoResources

T = TypeVar("T")
ERRORS = {kind.exit_code: kind for kind in (BadRequest, BadCheckpoint, BadData, NoResources)}
# What the transports of gloo and nccl say when the process at the other end has died.
LOST = re.compile(r"closed by peer|reset by peer|broken pipe|\bgloo\b|\bnccl\b", re.IGNORECASE)

# The caches of FSDP's tensors keep the group and its threads to the end of the interpreter, which aborts the process
# (SIGABRT) where one of them has yet to drop a Python tensor of its last work; seconds for it to do so.
LET_GO = 0.2
# While one rank draws and measures the others wait; one that has died is noticed at once all the same.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def wrap(self, module: nn.Module, parallel: str) -> nn.Module:
        """Average gradients over all ranks, where there are several; optimizers are built after this."""
        if self.size == 1:
            return module
        if parallel == "ddp":
            return DistributedDataParallel(module)
        # FSDP2 cannot shard channels-last weights.
        module = module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        mesh = init_device_mesh(self.device.type, (self.size,))
        for blocks in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """Keep gradients to this rank for a while, as all micro-batches of a step but the last do."""
        if isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                yield
        elif isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(False)
            yield
            wrapped.set_requires_gradient_sync(True)
        else:
            yield

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; all ranks must ask together."""
        if self.size == 1:
            return flag
        up = torch.tensor(float(flag))
        dist.all_reduce(up, dist.ReduceOp.MAX)
        return bool(up)

    def mean(self, value: float) -> float:
        """Average a number over all ranks, NaN if it is NaN on one; all ranks must ask together."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size

    def gather(self, text: str) -> list[str]:
        """Return every rank's text; all ranks must ask together."""
        if self.size == 1:
            return [text]
        texts: list[str] = [""] * self.size
        dist.all_gather_object(texts, text)
        return texts

    def together(self, action: Callable[[], T]) -> T:
        """Do on this rank what all do now, and fail on all ranks where it fails on one.

        A rank that failed alone would leave the others waiting for it: they hear of it, and raise an error of its kind.
        """
        if self.size == 1:
            return action()
        result, error = None, None
        try:
            result = action()
        except Exception as e:
            error = e
        if self.any(error is not None):
            code = getattr(error, "exit_code", NoResources.exit_code)
            said = self.gather("" if error is None else f"{code} {str(error) or type(error).__name__}")
            if error is None:
                rank, text = next((i, t) for i, t in enumerate(said) if t)
                number, _, reason = text.partition(" ")
                raise ERRORS.get(int(number), NoResources)(f"stopped because rank {rank} failed: {reason}")
            raise error
        return result  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def full(v: Tensor) -> Tensor:
    """Gather a shard's whole tensor; all ranks must ask together. A whole tensor is returned as it is."""
    return v.full_tensor() if isinstance(v, DTensor) else v


def local(v: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharing its memory."""
    return v.to_local() if isinstance(v, DTensor) else v


def placed_like(v: Tensor, like: Tensor) -> Tensor:
    """Lay a whole tensor out as another of its shape is: its shard, or its memory format."""
    if isinstance(v, DTensor):
        return v
    if isinstance(like, DTensor):
        return distribute_tensor(v.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(v)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, if it does, and leave it at the end."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NoResources("recipe: device: cuda, but torch finds no such device here: set it to cpu, or to auto")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(device=place)
        return
    # Flags and texts go by the CPU: no waiting for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    if cuda:
        torch.cuda.set_device(place)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or LOST.search(str(e)):
            raise NoResources(
                "another rank is gone, its own message says why; the same command goes on from the last checkpoint"
            ) from e
        raise
    finally:
        dist.destroy_process_group()
    time.sleep(LET_GO)  # not after an error: its words come first
