"""The ranks that train together: one process alone, or those that torchrun started.

Under ``ddp`` every rank holds the whole state, under ``fsdp`` (FSDP2) each holds a shard of every tensor. ``full`` and
``placed_like`` go between a shard and the whole, so that checkpoints are the same files whatever the world.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


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
        up = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(up, dist.ReduceOp.MAX)
        return bool(up)

    def mean(self, value: float) -> float:
        """Average a number over all ranks, NaN if it is NaN on one; all ranks must ask together."""
        if self.size == 1:
            return value
        total = torch.tensor(value, device=self.device, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size

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
    if isinstance(like, DTensor):
        return distribute_tensor(v.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(v)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, if it does, and leave it at the end."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(device=place)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
