"""A run's figures over time: JSON lines always, TensorBoard if asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self, TextIO

from sfumato.errors import NoResources
from sfumato.files import write_atomically


class RunLog:
    """Appends to ``log.jsonl``, after dropping lines from beyond the step at which the run is taken up.

    Args:
        run: the run's folder; ``start``: the step at which it is taken up.
        tensorboard: whether to write event files too.
        quiet: write nothing, as all ranks but the first do.
    """

    def __init__(self, run: Path, start: int, tensorboard: bool, quiet: bool = False):
        self.evaluated: set[int] = set()
        self._board: Any = None
        self._file: TextIO | None = None
        if quiet:
            return
        path = run / "log.jsonl"
        if path.exists():  # a killed run may have logged steps that it will take again, or half a line
            lines = [line for line in path.read_text(errors="replace").splitlines() if _step(line) <= start]
            write_atomically(path, "".join(line + "\n" for line in lines).encode())
            self.evaluated = {int(_step(line)) for line in lines if "evaluation" in json.loads(line)}
        self._file = path.open("a")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise NoResources("tensorboard=true needs the package: pip install tensorboard") from None
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Log the figures of one step; lists become one curve per entry on the board, NaN becomes null."""
        self._write({"step": step, **figures})
        if self._board is not None:
            for name, value in figures.items():
                for i, v in enumerate(value if isinstance(value, list) else [value]):
                    self._board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, v, step)

    def write_evaluation(self, step: int, evaluation: dict[str, Any]) -> None:
        """Log an evaluation of the weights after a step, in a line of its own."""
        self._write({"step": step, "evaluation": evaluation})
        self.evaluated.add(step)
        if self._board is not None:
            for f in evaluation["figures"]:
                self._board.add_scalar(f"{f['metric']} {f['split']}", f["value"], step)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(_finite(line)) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def spoken(evaluation: dict[str, Any]) -> str:
    """Say an evaluation's figures in one line."""
    return ", ".join(
        f"{f['metric']} {f['split']} {f['value']:.4g} [{f['interval'][0]:.4g}, {f['interval'][1]:.4g}], N {f['n']}"
        for f in evaluation["figures"]
    )
