"""How long a newcomer waits: whole processes, from the shell's prompt back to the shell's prompt.

    python bench/cold_start.py [--runs 10] [--model M] [--json]

Each command runs once to warm the disk's cache, then ``--runs`` times; the median and the least are told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS: dict[str, tuple[list[str], float | None]] = {  # what, and the most it may take
    "python": (["-c", "pass"], None),
    "import sfumato": (["-c", "import sfumato"], None),
    "sfumato --help": (["-m", "sfumato", "--help"], 0.4),
    "sfumato generate --help": (["-m", "sfumato", "generate", "--help"], 0.4),
    "sfumato samplers": (["-m", "sfumato", "samplers"], None),
    "sfumato info emoji-64": (["-m", "sfumato", "info", "emoji-64"], 0.4),
    "import sfumato.diffusion": (["-c", "import sfumato.diffusion"], None),
    "import torch": (["-c", "import torch"], None),
    "sfumato generate": (["-m", "sfumato", "generate", "a red apple", "--seed", "0"], 10.0),
}


def seconds(argv: list[str], folder: str) -> float:
    before = time.perf_counter()
    done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed: {done.stderr}")
    return time.perf_counter() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--model", help="model for generate (default: the one built in)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: list[dict[str, str | float | bool | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (argv, limit) in COMMANDS.items():
            if "generate" in argv and "--help" not in argv and args.model:
                argv = [*argv, "--model", args.model]
            seconds(argv, folder)
            times = [seconds(argv, folder) for _ in range(args.runs)]
            median = statistics.median(times)
            ok = limit is None or median <= limit
            results.append({"command": name, "median": median, "least": min(times), "limit": limit, "ok": ok})
            if not args.json:
                told = "" if limit is None else f"  {'within' if ok else 'BEYOND'} {limit:g} s"
                print(f"{name:<26} median {median:6.3f} s  least {min(times):6.3f} s{told}", flush=True)
    if args.json:
        print(json.dumps(results))
    return 0 if all(r["ok"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
