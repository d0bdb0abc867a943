"""``sfumato serve --ray`` on a local cluster: two replicas, one queue, one gallery."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from serving import END, HERE, START, until


def test_two_replicas_share_the_work(tmp_path: Path, model_file: Path, soak: bool) -> None:
    if not soak:
        pytest.skip("a local Ray cluster takes a gigabyte and half a minute: --soak")
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sfumato[ray]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "sfumato", "serve", "--ray", "--workers", "2", "--port", str(port), "--batch", "1"]
    argv += ["--threads", "1", "--folder", str(tmp_path / "serve"), "--model", str(model_file)]
    # Ray's own patience is that of an idle machine, and it ends processes when the machine's memory is nearly full.
    patient = {"RAY_agent_register_timeout_ms": "300000", "RAY_memory_monitor_refresh_ms": "0"}
    env = os.environ | patient | {"PYTHONPATH": str(HERE.parents[1] / "src"), "RAY_ADDRESS": "local"}
    process = subprocess.Popen(argv, env=env, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START) as http:

            def ready() -> bool:
                assert process.poll() is None, "it ended"
                try:
                    return all(http.get("/readyz").status_code == 200 for _ in range(8))
                except httpx.TransportError:
                    return False

            until(ready, 4 * START)
            jobs = [http.post("/jobs", json={"prompt": f"prompt {i}", "seed": i, "steps": 4}).json() for i in range(20)]

            def ended(id: str) -> Any:
                return (j := http.get(f"/jobs/{id}").json())["state"] in ("done", "failed", "cancelled") and j

            done = [until(lambda job=job: ended(job["id"]), START) for job in jobs]
            assert all(j["state"] == "done" for j in done)
            assert http.get("/pictures", params={"limit": 100}).json()["total"] == 20
            assert len(list((tmp_path / "serve" / "owners").iterdir())) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(END) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
