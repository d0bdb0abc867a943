"""The ranks that train together: one process alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
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

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average gradients over all ranks, where there are several."""
        return DistributedDataParallel(module) if self.size > 1 else module

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
