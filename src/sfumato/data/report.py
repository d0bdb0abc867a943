"""What was found in a data set, and what in it is bad."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sfumato.console import printable
from sfumato.errors import BadData


@dataclass(frozen=True)
class Bad:
    """One record that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """How many records were looked at, how many were left out by choice, and which are bad: ok + bad = total."""

    path: Path
    total: int
    bad: tuple[Bad, ...] = ()
    left_out: int = 0

    @property
    def ok(self) -> int:
        """Records that can be used."""
        return self.total - len(self.bad)

    def summary(self, listing: Path | None = None) -> str:
        """Say it in one line, naming the file that lists the bad ones."""
        text = f"{self.ok} pictures"
        if self.left_out:
            text += f" ({self.left_out} more left out by where or exclude)"
        if self.bad:
            text += f", {len(self.bad)} bad" + (f" (list in {listing})" if listing else "")
        return text

    def to_jsonl(self) -> bytes:
        """List the bad records as JSON lines {"file", "reason"}."""
        return "".join(json.dumps({"file": b.name, "reason": b.reason}) + "\n" for b in self.bad).encode()

    def require(self, limit: float) -> None:
        """Raise BadData if nothing is left, or if the share of bad records is above a limit."""
        where = printable(str(self.path))
        if not self.bad or (self.ok and len(self.bad) <= limit * self.total):
            return
        commonest = Counter(b.reason for b in self.bad).most_common(1)[0]
        first = next(b for b in self.bad if b.reason == commonest[0])
        example = f"such as {printable(first.name)}: {printable(first.reason)}"
        if not self.ok:
            hint = (
                "data.captions=none trains without words" if "caption" in first.reason else "see `sfumato data check`"
            )
            raise BadData(f"{where}: all {self.total} pictures are bad, {example}; {hint}")
        raise BadData(
            f"{where}: {len(self.bad)} of {self.total} pictures are bad, {example}; mend them (`sfumato data check` "
            f"lists them), or go on without them by data.bad_limit={min(1.0, len(self.bad) / self.total + 0.01):.2f}"
        )
