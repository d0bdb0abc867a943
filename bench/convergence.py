"""Steps against error for every sampler, on a Gaussian mixture whose ODE is solved exactly: docs/convergence.png.

    python bench/convergence.py [--out docs/convergence.png]

The error is the root mean square over 64 points in float64, against an adaptive solver at 1e-12. Samplers that draw
noise are measured on one Gaussian instead, by the exact variance of their result. Equal loops share a line.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path as File
from typing import Any

import numpy as np

ROOT = File(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "diffusion"))

from mixtures import CURVES, GAUSSIAN, MIXTURE, exact, moments, smooth_path  # noqa: E402

from sfumato.diffusion import SAMPLERS  # noqa: E402

STEPS = [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def ode_errors(sampler: Any, curve: str) -> list[float]:
    rng = np.random.default_rng(0)
    p, q = smooth_path(curve, 1)
    x = p.alpha * MIXTURE.draw(64, rng) + p.sigma * rng.standard_normal((64, 2))
    want = exact(MIXTURE, x, p, q)
    errors: list[float] = []
    for steps in STEPS:
        *_, last = sampler(MIXTURE, x, smooth_path(curve, steps), None)
        errors.append(float(np.sqrt(np.mean((last.x - want) ** 2))))
    return errors


def law_errors(sampler: Any, curve: str) -> list[float]:
    p, q = smooth_path(curve, 1)
    mean, variance = GAUSSIAN.means[0], GAUSSIAN.variances[0]
    deviation = np.sqrt(p.alpha**2 * variance + p.sigma**2)
    errors: list[float] = []
    for steps in STEPS:
        _, spread = moments(sampler, smooth_path(curve, steps), p.alpha * mean, deviation)
        errors.append(float(np.abs(spread - (q.alpha**2 * variance + q.sigma**2)).max()))
    return errors


def measure() -> dict[str, dict[str, list[float]]]:
    loops: dict[Any, list[str]] = {}
    for sampler in SAMPLERS.values():
        if sampler.order and sampler.name != "ddim-inversion":
            key = (getattr(sampler.run, "func", sampler.run), sampler.stochastic)
            loops.setdefault(key, []).append(sampler.name)
    results: dict[str, dict[str, list[float]]] = {}
    for (_, stochastic), names in loops.items():
        errors = law_errors if stochastic else ode_errors
        results[", ".join(names)] = {curve: errors(SAMPLERS[names[0]], curve) for curve in CURVES}
    return results


def plot(results: dict[str, dict[str, list[float]]], out: File) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(17, 5.2), sharey=True)
    panels = [*((curve, False) for curve in CURVES), ("vp", True)]
    titles = {"vp": "VP", "ve": "VE (EDM)", "flow": "flow"}
    for axis, (curve, stochastic) in zip(axes, panels, strict=True):
        chosen = [names for names in results if SAMPLERS[names.split(",")[0]].stochastic == stochastic]
        for i, names in enumerate(chosen):
            calls = [SAMPLERS[names.split(",")[0]].calls * n for n in STEPS]
            style = "o--" if i % 2 else "o-"
            axis.loglog(calls, results[names][curve], style, lw=1.2, ms=2.5, color=f"C{i}", label=names)
        axis.set_title(f"{titles[curve]}: variance of the result" if stochastic else f"{titles[curve]}: the ODE")
        axis.set_xlabel("calls of the denoiser")
        axis.grid(alpha=0.3, which="both", lw=0.4)
        axis.set_ylim(1e-9, 2)
    axes[0].set_ylabel("error")
    for axis in (axes[2], axes[3]):
        axis.legend(fontsize=7.5, loc="lower left")
    fig.suptitle("Samplers on a Gaussian mixture in float64, from σ/α = 8 to 0.1", fontsize=11)
    fig.tight_layout()
    fig.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=File, default=ROOT / "docs" / "convergence.png")
    out = parser.parse_args().out
    begin = time.perf_counter()
    results = measure()
    print(f"{'sampler':44} {'stated':>6}  observed order (256 to 512 steps) on {', '.join(CURVES)}")
    for names, errors in results.items():
        low, high = STEPS.index(256), STEPS.index(512)
        orders = [float(np.log2(e[low] / e[high])) for e in errors.values()]
        print(f"{names:44} {SAMPLERS[names.split(',')[0]].order:6}  {'  '.join(f'{o:.2f}' for o in orders)}")
    plot(results, out)
    print(f"{out}: {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
