"""What one call of each part of a published model holds beside its weights, reckoned without computing.

    python bench/activations.py sd1 sd2 sdxl sd3 flux [--sides 512 1024] [--batches 1 8]

The networks of the true shapes run on tensors without numbers (torch's fake ones), and the bytes of those that are
there at one time are counted, where ``bench/memory.py`` measures a process: it takes no weights, no memory and a few
seconds. What libraries beneath torch take for themselves is not among them. A batch of n is n pictures; with guidance
the denoiser sees 2n rows (FLUX n). The decoder gets as many pictures at once as the pipeline gives it.
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

from memory import configs, network


def held(call: Any) -> int:
    """The most bytes that tensors made by a call hold at one time."""
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now, self.peak, self.known = 0, 0, set[int]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for t in tree_leaves(result):
                if isinstance(t, Tensor) and id_of(t) not in self.known | given:
                    size = t.untyped_storage().nbytes()
                    self.known.add(id_of(t))
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(t.untyped_storage(), self.freed, id_of(t), size)
            return result

        def freed(self, which: int, size: int) -> None:
            self.known.discard(which)
            self.now -= size

    def id_of(t: Tensor) -> int:
        return t.untyped_storage()._cdata

    with torch.no_grad(), Live() as live:
        call()
    return live.peak


def reckon(family: str, side: int, batch: int) -> dict[str, float]:
    """MiB that the words, one call of the denoiser and the decoding of a batch of pictures hold."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sfumato.pipeline.pipeline import SHARED

    parts = configs(family, [])
    body = parts.get("unet") or parts["transformer"]
    channels = parts["vae"]["latent_channels"]
    cells, rows = side // 8, batch * (1 if family == "flux" else 2)
    found: dict[str, float] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part, c in parts.items():
            if part.startswith("text_encoder"):
                tower, words = network(c), 77 if "vocab_size" in c and c["vocab_size"] > 40_000 else 512
                ids = torch.zeros(2, words, dtype=torch.int64)
                found["words"] = max(found.get("words", 0), held(lambda tower=tower, ids=ids: tower(ids)))
        x, clock = torch.zeros(rows, channels, cells, cells), torch.zeros(rows)
        told: dict[str, Any] = {
            "sd1": {"context": (77, 768)}, "sd2": {"context": (77, 1024)},
            "sdxl": {"context": (77, 2048), "pooled": (1280,), "sizes": (6,)},
            "sd3": {"context": (77 + 256, 4096), "pooled": (2048,)},
            "flux": {"context": (512, 4096), "pooled": (768,), "guidance": ()},
        }[family]  # fmt: skip
        denoiser = network(body)
        words_of = {k: torch.zeros(rows, *shape) for k, shape in told.items()}
        found["denoiser"] = held(lambda: denoiser(x, clock, **words_of))
        vae, latents = network(parts["vae"]), torch.zeros(batch, channels, cells, cells)
        found["decoder"] = held(lambda: [vae.decode(part) for part in latents.split(max(1, SHARED // side**2))])
    return {k: v / 2**20 for k, v in found.items()}


def main() -> None:
    """Print a line for each family, side and batch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="+")
    parser.add_argument("--sides", type=int, nargs="+", default=[512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    a = parser.parse_args()
    for family in a.families:
        for side in a.sides:
            for batch in a.batches:
                facts = reckon(family, side, batch)
                print(
                    f"{family:<5} {side:>5}² x{batch:<2}", *(f"{k} {v:.0f} MiB;" for k, v in facts.items()), flush=True
                )


if __name__ == "__main__":
    main()
