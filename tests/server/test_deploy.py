"""What ``deploy/`` says is what the command understands, and systemd finds nothing wrong with its unit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.server.cli import _parser

ROOT = Path(__file__).parents[2]
UNIT, CONTAINER = ROOT / "deploy" / "sfumato.service", ROOT / "deploy" / "Containerfile"


def test_the_container_runs_a_command_that_there_is_on_files_that_there_are() -> None:
    text = CONTAINER.read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    assert entry[:2] == ["sfumato", "serve"]
    args = _parser().parse_args(entry[2:])
    assert (args.host, args.folder) == ("0.0.0.0", "/data")
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    extras = re.findall(r'"\.\[(.*?)\]"', text)[0].split(",")
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)


def test_the_unit_runs_a_command_that_there_is() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    command, serve, *flags = line.split()
    assert (command, serve) == ("/opt/sfumato/bin/sfumato", "serve")
    args = _parser().parse_args(flags)
    assert args.drain < int(re.findall(r"TimeoutStopSec=(\d+)", UNIT.read_text())[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "sfumato.service"
    unit.write_text(UNIT.read_text().replace("/opt/sfumato/bin/sfumato", sys.executable))
    told = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "sfumato.service" not in told.stderr, told.stderr
