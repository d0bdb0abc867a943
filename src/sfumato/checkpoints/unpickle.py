"""The child of ``pickles``: unpickles tensors alone, under limits, and writes them as safetensors.

python -P -m sfumato.checkpoints.unpickle SOURCE TARGET MEMORY SECONDS BYTES

Exit code 3, and a line on the error stream, for a file that is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 8
MAX_TENSORS = 50_000


class Inert:
    """Stands for classes that published checkpoints name beside their tensors; it holds what they are given."""


STAND_INS = (  # of training states; nothing of theirs is imported
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.nn.modules.container.ParameterDict",
)


def limit(memory: int, seconds: int, size: int) -> None:
    """Bound this process's address space, processor time and files' size; no core is dumped."""
    import resource

    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def tensors_of(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested records, by its names joined with dots."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Inert):
        yield from tensors_of(vars(value).get("_parameters", {}), name, depth + 1)
    elif isinstance(value, Mapping) and depth < MAX_DEPTH:
        for key, item in value.items():
            yield from tensors_of(item, f"{name}.{key}" if name else str(key), depth + 1)


def read(path: str) -> dict[str, Tensor]:
    """Unpickle the tensors of a file; ValueError if there are none or more than are read."""
    import warnings

    import torch

    with torch.serialization.safe_globals([(Inert, name) for name in STAND_INS]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open(path, "rb") as file:  # given a name, torch would read a *.safetensors by that
            value = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors_of(value):
        if tensor.is_sparse or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"tensor {name[:60]!r} is no plain one")
        found[name] = tensor.detach()
        if len(found) > MAX_TENSORS:
            raise ValueError(f"holds more than {MAX_TENSORS} tensors")
    if not found:
        raise ValueError("a pickle without a tensor")
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, as safetensors wants them; tied weights share theirs."""
    import torch

    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, t in tensors.items():
        storage = t.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == t.numel() * t.element_size()
        seen.add(storage.data_ptr())
        result[name] = t if alone and t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)
    return result


def main(source: str, target: str, memory: str, seconds: str, size: str) -> int:
    """Convert a file under limits."""
    limit(int(memory), int(seconds), int(size))
    try:
        from safetensors.torch import save_file

        save_file(_apart(read(source)), target, {"format": "pt"})
    except Exception as e:  # damaged pickles raise errors of every type
        sys.stderr.write(f"{_reason(e)}\n")
        return 3
    return 0


def _reason(error: Exception) -> str:
    text = str(error)
    if asked := re.search(r"GLOBAL ([\w.]+)", text):
        return f"its pickle asks for {asked[1][:80]}, which is no tensor: it is not read"
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return "reading it takes more memory than a file of its size may"
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return f"no pickle of tensors alone ({' '.join((inner[1] if inner else text).split())[:120]})"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
