"""Stopping Ray while calls of Ray run: this process goes on, also as a child of process 1, as under systemd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .server import until

PROGRAM = """
import os, sys, threading, time
import quantserve.serve.driver.run  # as the command does
from quantserve.serve.driver.processes import Processes
from quantserve.serve.driver.ray_cluster import start_ray, stop_ray

print("parent", os.getppid(), flush=True)
processes = Processes()
start_ray()
import ray
from ray import serve

def ask():
    while True:
        try:
            serve.status()
        except Exception:
            time.sleep(0.01)

@ray.remote
def raylet():
    return os.environ["RAY_RAYLET_PID"] == str(os.getppid())

print("own raylet", ray.get(raylet.remote()), flush=True)
for _ in range(4):
    threading.Thread(target=ask, daemon=True).start()
time.sleep(2)
stop_ray(processes)
print("stopped", flush=True)
os._exit(0)
"""


@pytest.mark.ray
def test_calls_that_run_when_ray_is_stopped_do_not_end_this_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    orphan = 'sleep 0.5; exec "$0" -c "$1" >"$2" 2>&1'
    leaves = ["sh", "-c", f"({orphan}) & exit 0", sys.executable, PROGRAM, str(log)]
    subprocess.run(leaves, check=True, stdin=subprocess.DEVNULL)
    lines: list[str] = []

    def ended() -> bool:
        lines[:] = [line for line in log.read_text().splitlines() if not line.startswith("[")] if log.exists() else []
        return lines[-1:] == ["stopped"]

    try:
        until(ended)
    except AssertionError:
        pytest.fail(f"it ended without a word: {lines}")
    assert lines[-2:] == ["own raylet True", "stopped"]
