"""A run's figures over time: JSON lines always, TensorBoard if asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self

from sfumato.errors import NoResources
from sfumato.files import write_atomically


class RunLog:
    """Appends to ``log.jsonl``, after dropping lines from beyond the step at which the run is taken up."""

    def __init__(self, run: Path, start: int, tensorboard: bool):
        path = run / "log.jsonl"
        if path.exists():  # a killed run may have logged steps that it will take again, or half a line
            lines = [line for line in path.read_text(errors="replace").splitlines() if _step(line) <= start]
            write_atomically(path, "".join(line + "\n" for line in lines).encode())
        self._file = path.open("a")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise NoResources("tensorboard=true needs the package: pip install tensorboard") from None
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Log the figures of one step; lists become one curve per entry on the board, NaN becomes null."""
        self._file.write(json.dumps(_finite({"step": step, **figures})) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                for i, v in enumerate(value if isinstance(value, list) else [value]):
                    self._board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, v, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
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
