"""How a model's weights are kept in memory: in which type, and all of them or one layer at a time."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import BadRequest, nearest

if TYPE_CHECKING:
    from sfumato.checkpoints.published import Keep, Published

DTYPES = ("fp32", "bf16")
MEMORY = ("auto", "normal", "low")
SHARE = 0.75  # of the free memory, that weights may take; the rest is for what networks compute


def check(dtype: str, memory: str) -> None:
    """BadRequest for a word that is none of ``DTYPES`` or ``MEMORY``."""
    for what, word, known in (("dtype", dtype, DTYPES), ("memory", memory, MEMORY)):
        if word not in known:
            raise BadRequest(f"{what} is {' or '.join(known)}, not {word!r}{nearest(word, list(known))}")


def decide(published: Published, dtype: str, memory: str) -> tuple[Keep, str]:
    """How to keep a published model's weights, and why.

    Args:
        memory: "auto" keeps little if the weights would fill most of the memory that is free, and else all; pictures
            are the same either way.
    """
    from sfumato.checkpoints.published import Keep

    need = needed(published, dtype)
    low, why = memory == "low", "as asked"
    if memory == "auto":
        free = free_memory()
        low = free is not None and need > SHARE * free
        why = "free memory is not known" if free is None else f"{mebibytes(free)} are free"
    if low:
        return Keep(dtype, True), f"low: one layer at a time, where all would take {mebibytes(need)} ({why})"
    return Keep(dtype, False), f"normal: {mebibytes(need)} ({why})"


def needed(published: Published, dtype: str) -> int:
    """Bytes of the weights in memory: of those that the file does not hold in the type in which they are used."""
    import torch

    from sfumato.checkpoints.published import DTYPES as TYPES

    total = 0
    for component, tensors in published.tensors.items():
        name, size = TYPES["fp32" if component == "vae" else dtype]
        total += sum(size * t.numel() for t in tensors.values() if t.dtype != getattr(torch, name))
    return total


def free_memory() -> int | None:
    """Bytes that this process may still take without pushing others out; None where the system does not tell."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        folder = Path("/sys/fs/cgroup")  # a container's own limit
        with suppress(OSError, ValueError):  # "max" is no number
            found.append(max(0, int((folder / limit).read_text()) - int((folder / used).read_text())))
    return min(found, default=None)


def mebibytes(size: int) -> str:
    """A size in words."""
    return f"{size >> 20} MiB"
