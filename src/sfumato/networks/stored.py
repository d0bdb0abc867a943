"""Weights that stay as their file stores them, mapped, until an operation asks for them.

    file ── mapped pages ──> one layer's weights in the network's type ── the operation ──> dropped again, or kept

A network of such weights computes what it does with all of them in memory, to the last bit: the operation gets the same
numbers in the same layout. Where they are dropped, it needs memory for one layer at a time, and the pages that it has
read stay with the system for as long as it has no better use for them. Where they are kept, loading costs nothing that
is not used, and only what is used again takes memory: fresh memory is dear (several times what unfolding costs), so a
weight gets its own at its second use to its fifth, a quarter of them at each, and no call has to pay for all.
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
TURNS = 4  # calls over which a network's weights come to be kept


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
        self.waiting = 0  # weights that are yet to be kept
        self._own = threading.local()

    def kept(self) -> None:
        """Note that one more weight has memory of its own; after the last, none is needed to unfold in."""
        self.waiting -= 1
        if self.waiting == 0:
            self._own = threading.local()

    def unfold(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight's numbers in another type, in memory that the thread's next call overwrites."""
        n = source.numel()
        buffer: Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.dtype != dtype or len(buffer) < n:
            self._own.buffer = None  # let go of the old one first
            with torch.inference_mode(False):
                buffer = self._own.buffer = torch.empty(n, dtype=dtype)
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

    Threads may share it. It takes no gradient. What would change it in place gives it memory of its own first.
    """

    source: Tensor
    workspace: Workspace
    next: Stored | None
    uses: int | None
    kept: bool

    @staticmethod
    def __new__(
        cls,
        source: Tensor,
        dtype: torch.dtype,
        workspace: Workspace,
        parameter: bool = True,
        uses: int | None = None,
    ) -> Stored:
        """Take a tensor (mapped, of any type) to stand for one of type ``dtype``.

        Args:
            uses: how often it is unfolded and dropped before it is kept; None for ever.
        """
        self = Tensor._make_wrapper_subclass(cls, source.shape, dtype=dtype, device=source.device)
        self.source, self.workspace, self.next = source, workspace, None
        self.uses, self.kept = uses, False
        self._is_param = parameter
        workspace.waiting += uses is not None
        return self

    def keep(self) -> Tensor:
        """Give it memory of its own in its own type, if it has none, and return that."""
        if not self.kept:
            with torch.inference_mode(False):
                own = self.source.to(self.dtype, copy=True)
            self.workspace.mappings.advise(self.source, DO_NOT_NEED)
            self.source, self.kept = own, True
            if self.uses is not None:
                self.workspace.kept()
        return self.source

    def unfold(self, borrow: bool) -> Tensor:
        """Its numbers in its own type, for one operation; in borrowed memory if that is enough."""
        if self.kept:
            return self.source
        self.workspace.follow(self)
        if self.uses is not None:
            if self.uses < 1:  # below, where two threads counted at once
                return self.keep()
            self.uses -= 1
        if self.source.dtype == self.dtype:
            return self.source
        if borrow and self.ndim > 1:  # at most one matrix among an operation's weights
            return self.workspace.unfold(self.source, self.dtype)
        return self.source.to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Stored({self.source.dtype} → {self.dtype}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Give the operation plain tensors; what only looks at shape or type gets none."""
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], Stored) else None
        if own is not None and func in _SELVES:
            return _SELVES[func](own, *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOOKS:
                return func(*args, **kwargs)
            if func is F.embedding and isinstance(args[1], Stored) and own is None:
                table = args[1]
                table.workspace.follow(table)
                rows = F.embedding(args[0], table.source, *args[2:], **kwargs).to(table.dtype)  # and not the table
                table.workspace.mappings.advise(table.source, DO_NOT_NEED)
                return rows
            changes = own is not None and _changes(func)
            if own is not None and changes:
                own.keep()
            used: list[Stored] = []
            borrow = func in _BORROWERS

            def plain(value: Any) -> Any:
                if isinstance(value, Stored):
                    if not value.kept:
                        used.append(value)
                    return value.unfold(borrow)
                if isinstance(value, (list, tuple)):
                    return type(value)(plain(v) for v in value)
                return value

            result = func(*(plain(a) for a in args), **{k: plain(v) for k, v in kwargs.items()})
            for weight in used:
                weight.workspace.mappings.advise(weight.source, DO_NOT_NEED)
            return own if changes and result is not None else result

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
_BORROWERS = {F.linear, F.conv2d}  # their results share no memory with a weight


def _changes(func: Callable[..., Any]) -> bool:
    """Whether an operation changes its first tensor."""
    name = getattr(func, "__name__", "")
    return func in _CHANGES or (name.endswith("_") and not name.endswith("__"))


_CHANGES = {
    Tensor.__setitem__, Tensor.data.__set__, Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__, Tensor.__itruediv__,
}  # fmt: skip


def _detached(weight: Stored) -> Tensor:
    """As a state_dict holds it: of one that is to be kept the memory itself, as of any other parameter."""
    return weight if weight.uses is None else weight.keep()


def _learns(weight: Stored, requires_grad: bool = True) -> Stored:
    if requires_grad:
        raise NotImplementedError("weights that are unfolded as they are used take no gradient; train a deep copy")
    return weight


def _copied(weight: Stored, memo: dict[int, Any]) -> Tensor:
    """A plain tensor or parameter of the same numbers."""
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
        copied = weight.source.to(weight.dtype, copy=True)
    memo[id(weight)] = nn.Parameter(copied, False) if isinstance(weight, nn.Parameter) else copied
    return memo[id(weight)]


_SELVES: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.detach: _detached,
    Tensor.requires_grad_: _learns,
    Tensor.requires_grad.__set__: _learns,  # type: ignore[attr-defined]
    Tensor.__deepcopy__: _copied,
}


def twin(module: M) -> M:
    """A network of the same weights, not a copy of them, whose modules and hooks are its own."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


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


def keeper(mappings: Mappings, parameters: Mapping[str, Tensor], low: bool) -> Callable[[str, Tensor], Tensor]:
    """How to keep each tensor of a file as the network's own.

    Args:
        mappings: of the files that hold the tensors.
        parameters: the network's, by name, for the type that each shall have.
        low: leave them where they are for good; without it those of another type get memory of their own as they are
            used again, and vectors at once.
    """
    workspace = Workspace(mappings)

    def keep(name: str, tensor: Tensor) -> Tensor:
        own = parameters[name]
        if not tensor.is_floating_point() or (tensor.dtype == own.dtype and not low):
            return tensor.to(own.dtype)
        if low or tensor.ndim > 1:
            uses = None if low else 1 + workspace.waiting % TURNS
            return Stored(tensor, own.dtype, workspace, isinstance(own, nn.Parameter), uses)
        vector = tensor.to(own.dtype)
        mappings.advise(tensor, DO_NOT_NEED)
        return vector

    return keep
