"""Pictures → features, by networks whose weights ship in ordinary packages.

| name   | features                                                             | D    | pictures at |
|--------|----------------------------------------------------------------------|------|-------------|
| lite0  | EfficientNet-lite0: means of its 40- and 112-channel maps, then head | 1432 | 128 × 128   |
| alex   | AlexNet (of LPIPS): means of the third and fifth maps                | 640  | 128 × 128   |
| clip   | our own CLIP's vectors                                               | 256  | 64 × 64     |
| inception | Inception-v3 by torch-fidelity, where its weights are given       | 2048 | its own     |

FD, KID, precision and recall take lite0's head, 1,280 features; never call that FID, which is Inception's.
Pictures are uint8 (N, 3, H, W), brought to size by antialiased bicubic interpolation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sfumato.checkpoints import packaged
from sfumato.errors import BadCheckpoint, NoResources
from sfumato.evaluation.cache import Cache, content_hash
from sfumato.evaluation.generate import fit_size
from sfumato.families.clip import CLIP
from sfumato.families.pretrained import load_lite0, load_lpips
from sfumato.networks.towers import look
from sfumato.pixels import signed

SIZE = 128
BATCH = 64
MIDDLE = 40 + 112  # of lite0's features, those before the head's


@dataclass(frozen=True)
class Extractor:
    """A network for features, and the SHA-256 of its weights.

    Args:
        load: returns the function from uint8 pictures (B, 3, H, W) to features (B, D); called when first needed.
    """

    name: str
    weights: str
    load: Callable[[], Callable[[Tensor], Tensor]]

    def __call__(self, images: Tensor, cache: Cache) -> NDArray[np.float32]:
        """Return the features (N, D) of uint8 pictures (N, 3, H, W), from the cache if they are known."""
        key = content_hash(self.name, self.weights, SIZE, images)
        return cache.get_or_make("features", key, lambda: {"features": self._extract(images)})["features"].numpy()

    @torch.no_grad()
    def _extract(self, images: Tensor) -> Tensor:
        network = self.load()
        return torch.cat([network(part).float() for part in images.split(BATCH)])


def resize(images: Tensor, size: int) -> Tensor:
    """Return uint8 pictures (B, 3, H, W) as floats in [−1, 1] at size × size."""
    x = signed(images)
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def lite0() -> Extractor:
    """Return EfficientNet-lite0's features; NoResources, with pip's command, if it is not installed."""

    def load() -> Callable[[Tensor], Tensor]:
        network = load_lite0()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda images: look(network, resize(images, SIZE))

    packaged.LITE0.locate()
    return Extractor("lite0", packaged.LITE0.sha256, load)


def alex() -> Extractor:
    """Return AlexNet's features; NoResources, with pip's command, if it is not installed."""

    def load() -> Callable[[Tensor], Tensor]:
        network = load_lpips("alex")

        def features(images: Tensor) -> Tensor:
            maps = network.maps(resize(images, SIZE))
            return torch.cat([maps[i].mean((2, 3)) for i in (2, 4)], 1)

        return features

    packaged.ALEXNET.locate()
    return Extractor("alex", packaged.ALEXNET.sha256, load)


def clip(model: CLIP) -> Extractor:
    """Return our own CLIP's unit vectors of pictures, which are brought to the size that it learned from."""
    size = model.towers.config.size
    return Extractor("clip", model.hash, lambda: lambda images: model.embed_pictures(fit_size(images, size)))


def inception(weights: Path | None) -> Extractor:
    """Return torch-fidelity's Inception-v3 under weights that the user has (a torch file of tensors).

    Raises NoResources if torch-fidelity is not installed or no weights are given, BadCheckpoint if they do not fit.
    """
    import hashlib
    from importlib import import_module

    if weights is None:
        raise NoResources("FID needs Inception's weights, which no package carries: name their file with --inception")
    try:
        module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as e:  # the latter from a torchvision that was built for another torch
        raise NoResources(f"FID needs torch-fidelity ({e}): pip install torch-fidelity torchvision") from None
    try:
        data = weights.read_bytes()
    except OSError as e:
        raise BadCheckpoint(f"{weights}: {e.strerror}") from None

    def load() -> Callable[[Tensor], Tensor]:
        import tempfile

        # Its own reader unpickles anything: it gets a file that holds what a safe reader found in the user's.
        try:
            tensors = packaged.read_torch(data)
        except BadCheckpoint as e:
            raise BadCheckpoint(f"{weights}: {e}") from None
        with tempfile.TemporaryDirectory() as folder:
            safe = Path(folder) / "inception.pth"
            torch.save(tensors, safe)
            try:
                network = module.FeatureExtractorInceptionV3(
                    "inception", ["2048"], feature_extractor_weights_path=str(safe)
                )
            except RuntimeError as e:
                raise BadCheckpoint(f"{weights}: no weights of torch-fidelity's Inception-v3") from e
        return lambda images: network(images)[0]

    return Extractor("inception", hashlib.sha256(data).hexdigest(), load)


@torch.no_grad()
def lpips_distances(x: Tensor, y: Tensor, cache: Cache, *, size: int = 64) -> NDArray[np.float64]:
    """Return LPIPS (AlexNet) of pairs of uint8 pictures (N, 3, H, W), as (N,); small ones are brought to 64 px."""
    size = max(size, *x.shape[-2:])

    def make() -> dict[str, Tensor]:
        network = load_lpips("alex")
        pairs = zip(x.split(BATCH), y.split(BATCH), strict=True)
        return {"distances": torch.cat([network(resize(a, size), resize(b, size)) for a, b in pairs]).double()}

    key = content_hash("lpips-alex", packaged.ALEXNET.sha256, size, x, y)
    return cache.get_or_make("lpips", key, make)["distances"].numpy()
