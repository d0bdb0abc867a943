"""Weights that stay as their file stores them, mapped, until an operation asks for them.

    file ── mapped pages ──> one layer's weights in the network's type ── the operation ──> dropped again

A network of such weights computes what it does with all of them in memory, to the last bit: the operation gets the same
numbers in the same layout. It needs memory for one layer at a time, and the pages that it has read stay with the
system for as long as it has no better use for them.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

WILL_NEED, DO_NOT_NEED = 3, 4  # madvise(2); the same numbers on Linux and macOS


class Mappings:
    """Where files lie in this process's memory, to tell the system which of their pages are needed.

    Advice changes no byte, and where the system takes none, there is none: what is read is then its own affair.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        names = {str(file.resolve()) for file in files}
        spans: list[tuple[int, int]] = []
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            lines = []
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in names:
                start, stop = (int(x, 16) for x in fields[0].split("-"))
                spans.append((start, stop))
        self._spans = sorted(spans)
        self._starts = [start for start, _ in self._spans]

    def advise(self, tensor: Tensor, advice: int) -> None:
        """Advise on the pages that hold nothing but this tensor; on none, if it does not lie in one of the files."""
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        i = bisect_right(self._starts, start) - 1
        if i < 0 or stop > self._spans[i][1]:
            return
        page = mmap.PAGESIZE
        start, stop = -(-start // page) * page, stop // page * page
        if stop > start:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(advice))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Workspace:
    """What one network's stored weights share: for each thread memory to unfold in, and the order of their use."""

    def __init__(self, mappings: Mappings) -> None:
        self.mappings = mappings
        self._own = threading.local()

    def unfold(self, weight: Stored) -> Tensor:
        """The weight's numbers, in memory that the thread's next call overwrites."""
        source, n = weight.source, weight.source.numel()
        buffer: Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.dtype != weight.dtype or len(buffer) < n:
            self._own.buffer = None  # let go of the old one first
            with torch.inference_mode(False):
                buffer = self._own.buffer = torch.empty(n, dtype=weight.dtype)
        return buffer[:n].view(source.shape).copy_(source)

    def follow(self, weight: Stored) -> None:
        """Note that a weight is being used, and have the one that followed it last time read from disk meanwhile."""
        last: Stored | None = getattr(self._own, "last", None)
        if last is not None and last is not weight:
            last.next = weight
        self._own.last = weight
        if weight.next is not None:
            self.mappings.advise(weight.next.source, WILL_NEED)


class Stored(Tensor):
    """A weight that has the shape and the type of what operations get, and unfolds when one asks for it.

    Threads may share it. It takes no gradient, and changing it in place changes nothing.
    """

    source: Tensor
    workspace: Workspace
    next: Stored | None

    @staticmethod
    def __new__(cls, source: Tensor, dtype: torch.dtype, workspace: Workspace, parameter: bool = True) -> Stored:
        """Take a tensor (mapped, of any type) to stand for one of type ``dtype``."""
        self = Tensor._make_wrapper_subclass(cls, source.shape, dtype=dtype, device=source.device)
        self.source, self.workspace, self.next = source, workspace, None
        self._is_param = parameter
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Stored({self.source.dtype} → {self.dtype}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Give the operation plain tensors; what only looks at shape or type gets none."""
        kwargs = kwargs or {}
        if func in _GIVEN_BACK:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOOKS:
                return func(*args, **kwargs)
            if func is F.embedding and isinstance(args[1], Stored) and not isinstance(args[0], Stored):
                table = args[1]
                table.workspace.follow(table)
                rows = F.embedding(args[0], table.source, *args[2:], **kwargs).to(table.dtype)  # and not the table
                table.workspace.mappings.advise(table.source, DO_NOT_NEED)
                return rows
            used: list[Stored] = []
            borrow = func in _BORROWERS

            def plain(value: Any) -> Any:
                if isinstance(value, Stored):
                    used.append(value)
                    value.workspace.follow(value)
                    if value.source.dtype == value.dtype:
                        return value.source
                    if borrow and value.ndim > 1:  # at most one matrix among an operation's weights
                        return value.workspace.unfold(value)
                    return value.source.to(value.dtype)
                if isinstance(value, (list, tuple)):
                    return type(value)(plain(v) for v in value)
                return value

            result = func(*(plain(a) for a in args), **{k: plain(v) for k, v in kwargs.items()})
            for weight in used:
                weight.workspace.mappings.advise(weight.source, DO_NOT_NEED)
            return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Refuse: an operation that came past ``__torch_function__`` would find no numbers here."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} on weights that stay in their file")


_LOOKS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_meta", "layout", "nbytes", "itemsize",
                     "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested", "is_leaf", "grad",
                     "grad_fn", "is_mkldnn")
    ),
    Tensor.dim, Tensor.numel, Tensor.size, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
    Tensor.element_size, Tensor.nelement, Tensor.__hash__, Tensor.__repr__, Tensor.stride, Tensor.is_contiguous,
}  # fmt: skip
_GIVEN_BACK = {Tensor.detach, Tensor.requires_grad_}  # nothing of it changes
_BORROWERS = {F.linear, F.conv2d}  # their results share no memory with a weight


def in_dtype(module: M, dtype: torch.dtype) -> M:
    """A network of the same weights in another type; stored ones stay stored."""
    other: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, Stored):
            other[id(tensor)] = Stored(tensor.source, dtype, tensor.workspace, isinstance(tensor, nn.Parameter))
        elif tensor.is_floating_point():
            changed = tensor.to(dtype)
            other[id(tensor)] = nn.Parameter(changed, False) if isinstance(tensor, nn.Parameter) else changed
    return copy.deepcopy(module, other)


def keeper(mappings: Mappings, parameters: Mapping[str, Tensor], stored: bool) -> Callable[[str, Tensor], Tensor]:
    """How to keep each tensor of a file as the network's own.

    Args:
        mappings: of the files that hold the tensors.
        parameters: the network's, by name, for the type that each shall have.
        stored: leave them where they are; without it each is copied in the network's type, if it has another one, and
            the file's pages are let go at once.
    """
    workspace = Workspace(mappings)

    def keep(name: str, tensor: Tensor) -> Tensor:
        dtype = parameters[name].dtype
        if stored and tensor.is_floating_point():
            return Stored(tensor, dtype, workspace, isinstance(parameters[name], nn.Parameter))
        if tensor.dtype == dtype:
            return tensor
        own = tensor.to(dtype)
        mappings.advise(tensor, DO_NOT_NEED)
        return own

    return keep
