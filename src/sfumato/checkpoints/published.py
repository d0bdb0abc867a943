"""A published model in one form, whichever form it came in: components, their configurations, their tensors.

Components and tensors are named as in diffusers' folders: "unet", "vae", "text_encoder", "text_encoder_2", …
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sfumato.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.checkpoints.tensors import LoadReport

Json: TypeAlias = Mapping[str, Any]

MAX_TEXT = 32 << 20  # bytes of a configuration or a tokenizer's file

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
ADDED_WORDS = "sfumato_words.json"  # learned words: how each is written, and its ids


DTYPES = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2)}  # torch's name, bytes a number


@dataclass(frozen=True)
class Keep:
    """How a model's weights are kept.

    Args:
        dtype: a name in ``DTYPES``, the type in which denoiser and text towers compute; the autoencoder, whose numbers
            become pixels, computes in float32.
        low: leave the weights in their file, mapped, and unfold one layer's at a time; the pictures are the same.
    """

    dtype: str = "fp32"
    low: bool = False


@dataclass(frozen=True)
class Published:
    """A model as others publish it; its tensors stay in their files until they are used.

    Args:
        path: the folder or file.
        form: "folder" or "single file".
        configs: component → its configuration, "scheduler" among them; "" is the whole model's.
        tensors: component → name → tensor.
        tokenizers: component → file name → its text; a component without files uses the packaged vocabulary.
        why: what is known, and from what, one line each.
        files: the files that hold the tensors.
        partial: whether missing, extra and misshaped tensors are let pass, and reported.
        reports: component → what found its place; filled as the networks are built.
        keep: how networks built from it keep their weights.
    """

    path: Path
    form: str
    configs: Mapping[str, Json]
    tensors: Mapping[str, Mapping[str, Tensor]]
    tokenizers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    partial: bool = False
    reports: dict[str, LoadReport] = field(default_factory=dict, compare=False)
    keep: Keep = field(default_factory=lambda: Keep())

    def config(self, component: str) -> Json:
        """A component's configuration; BadCheckpoint if the model has no such component."""
        if component not in self.configs:
            raise BadCheckpoint(f"{self.path}: has no {component}, which its family needs")
        return self.configs[component]

    @property
    def size(self) -> int:
        """Bytes of the files that hold the tensors."""
        return sum(f.stat().st_size for f in self.files)

    @property
    def dtypes(self) -> str:
        """The types in which the weights are stored, such as "float16"."""
        kinds = {str(t.dtype).removeprefix("torch.") for part in self.tensors.values() for t in part.values()}
        return ", ".join(sorted(kinds))

    @property
    def parameters(self) -> int:
        """Number of numbers in all tensors."""
        return sum(t.numel() for part in self.tensors.values() for t in part.values())

    def fingerprint(self) -> str:
        """A SHA-256 of all names, types and shapes, and of some bytes of every tensor.

        The same weights have the same one in a folder and in a single file; reading all bytes would take longer than
        a picture does.
        """
        import torch

        digest = hashlib.sha256()
        for component in sorted(self.tensors):
            for name, t in sorted(self.tensors[component].items()):
                digest.update(f"{component}\n{name}\n{t.dtype}\n{tuple(t.shape)}\n".encode())
                flat = t.reshape(-1)
                for place in (0, len(flat) // 2, len(flat) - 64):
                    some = flat[max(place, 0) : max(place, 0) + 64].contiguous()
                    digest.update(some.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a record; BadCheckpoint, naming it, for anything else."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise BadCheckpoint(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: holds no JSON record")
    return value


def read_text(path: Path) -> str:
    """Read a text file of bounded size; BadCheckpoint, naming it, if that cannot be."""
    try:
        if not path.is_file():
            raise BadCheckpoint(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if path.stat().st_size > MAX_TEXT:
            raise BadCheckpoint(f"{path}: larger than {MAX_TEXT >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise BadCheckpoint(f"{path}: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise BadCheckpoint(f"{path}: not a UTF-8 text") from None
