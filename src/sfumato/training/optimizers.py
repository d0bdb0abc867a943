"""Optimizers: AdamW, and Muon for hidden matrices, whose iteration runs in fp32 unless this machine is fast in bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadData
from sfumato.training.recipe import OptimizerConfig
from sfumato.training.world import placed_like

# Coefficients of the quintic that drives singular values towards 1 (Jordan et al. 2024, "Muon").
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Bring a matrix's singular values near 1 by Newton–Schulz iteration, keeping its dtype; g (M, N) → (M, N)."""
    a, b, c = QUINTIC
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024); kernels (O, I, h, w) count as matrices (O, I·h·w)."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, bf16: bool = False
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # of the iteration

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every matrix by its rate times √(rows/columns ∨ 1) times an orthogonal matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])  # Nesterov
                direction = orthogonalize(update.flatten(1).to(self.dtype)).view(p.shape).to(p.dtype)
                scale = max(1.0, p.shape[0] / p.flatten(1).shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)


def build_optimizers(module: nn.Module, config: OptimizerConfig, bf16: bool = False) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a recipe; matrices and kernels are decayed, gains, biases and embeddings are not.

    With ``bf16`` Muon iterates in it, as it was published: for machines that multiply faster so.
    Raises BadData for a setting by which a run would learn nothing, or unlearn.
    """
    _check(config)
    if config.name not in ("adamw", "muon"):
        raise BadData(f"optimizer: name is adamw or muon, not {config.name!r}")
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in named.items() if p.ndim >= 2 and not _is_table(n) and not n.endswith("bias")}
    slow = {n: share for n in named for start, share in config.slow.items() if n.startswith(start)}
    for start in config.slow:
        if not any(n.startswith(start) for n in named):
            raise BadData(f"optimizer.slow: no parameter that learns begins with {start!r}")
    hidden = [p for n, p in matrices.items() if config.name == "muon" and not _is_edge(n) and n not in slow]
    chosen = {id(p) for p in hidden}
    groups: list[dict[str, Any]] = []
    for share in (1.0, *sorted(set(slow.values()) - {1.0})):
        own = {n: p for n, p in named.items() if slow.get(n, 1.0) == share and id(p) not in chosen}
        decayed, plain = [p for n, p in own.items() if n in matrices], [p for n, p in own.items() if n not in matrices]
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            groups.append({"params": parameters, "weight_decay": decay, "lr": share * config.rate})
    adamw = torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, fused=True)
    if not hidden:
        return [adamw]
    return [adamw, Muon(hidden, config.muon_rate, config.momentum, config.weight_decay, bf16)]


def _check(config: OptimizerConfig) -> None:
    def must(name: str, right: bool, be: str) -> None:  # NaN is never right
        if not right:
            raise BadData(f"optimizer: {name} must {be}, not {getattr(config, name)!r}")

    for name in ("rate", "muon_rate", "weight_decay"):
        must(name, 0 <= getattr(config, name) < math.inf, "be a number of at least 0")
    must("momentum", 0 <= config.momentum < 1, "lie in [0, 1)")
    must("betas", all(0 <= beta < 1 for beta in config.betas), "be two numbers in [0, 1)")
    must("slow", all(0 <= share < math.inf for share in config.slow.values()), "hold shares of at least 0")
    must("warmup", config.warmup >= 0, "be at least 0 steps")
    must("decay", 0 <= config.decay <= 1, "be a share of the steps, in [0, 1]")
    must("clip", config.clip > 0, "be positive (.inf: no clipping)")


# Matrices next to the input, the output or an embedding, which Muon is not for, and stacks of several.
EDGES = (
    "conv_in", "conv_out", "patches.", "modulation.", "final.", ".time.", ".pooled.", "projector.2", ".experts.",
    "heads.",
)  # fmt: skip


def _is_table(name: str) -> bool:
    return any(part in name for part in ("tokens", "positions", "table"))


def _is_edge(name: str) -> bool:
    return any(part in name for part in EDGES)


# What each kind keeps of a parameter; a step's number is no tensor of its shape.
KEYS: Mapping[type, tuple[str, ...]] = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum",)}


def tensors_of(optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the optimizers' state as flat names, ``key.parameter``, and tensors."""
    return {
        f"{key}.{names[p]}": torch.as_tensor(v)
        for optimizer in optimizers for p, state in optimizer.state.items() for key, v in state.items()
    }  # fmt: skip


def empty_state(optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return zeros, laid out as each parameter is, under all names that ``tensors_of`` may give."""
    return {
        f"{key}.{names[p]}": torch.zeros(()) if key == "step" else torch.zeros_like(p.detach())
        for optimizer in optimizers for p in _parameters(optimizer) for key in KEYS[type(optimizer)]
    }  # fmt: skip


def restore(optimizers: list[torch.optim.Optimizer], flat: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
    """Put back what ``tensors_of`` took; a parameter that had not moved starts anew."""
    for optimizer in optimizers:
        states: dict[int, dict[str, Tensor]] = {}
        for i, p in enumerate(_parameters(optimizer)):
            found = {key: flat[name] for key in KEYS[type(optimizer)] if (name := f"{key}.{names[p]}") in flat}
            # Fused AdamW walks memory in order: moments must be laid out as their parameter is.
            laid = {key: v if v.ndim == 0 else placed_like(v, p.detach()) for key, v in found.items()}
            if laid:
                states[i] = laid
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
