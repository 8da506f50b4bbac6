"""The server of a soak: `quantserve serve` on two small models, its processes by role, and what they use."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]

from benchmarks.console import ROOT, BenchError
from benchmarks.serving.processes import Tree, alive
from benchmarks.serving.servers import environment
from quantserve_bench.request import Target
from quantserve_bench.server import free_port

MODELS: Final = {"fp16": ("checkpoint", 2), "awq": ("awq", 1)}
"""Model id -> folder of the demo, replicas."""
KEY: Final = "soak-0123456789abcdef"
START_S: Final = 600.0
STOP_S: Final = 90.0
ROLES: Final = ("command", "gateway", "Ray", "replicas", "engines")
READY: Final = re.compile(r'^quantserve_replicas\{(?=[^}]*model="([^"]*)")(?=[^}]*state="ready")[^}]*\} (\S+)', re.M)
REPLICA: Final = re.compile(r'^vllm:num_requests_running\{(?=[^}]*replica="([^"]*)")(?=[^}]*model="([^"]*)")', re.M)
BUSY: Final = re.compile(r"^(?:quantserve_requests_in_progress|quantserve_queue_length|vllm:num_requests_running|"
                         r"vllm:num_requests_waiting)(?:\{[^}]*\})? (\S+)", re.M)  # fmt: skip


@dataclass
class Use:
    """What the processes of one role use.

    Attributes:
        rss: bytes of resident memory, shared pages counted in each process.
        private: bytes that only these processes hold.
    """

    rss: int = 0
    private: int = 0
    fds: int = 0
    processes: int = 0
    threads: int = 0


@dataclass
class Sample:
    """One look at the server.

    Attributes:
        at: Unix time.
        calm: whether no fault was being recovered from.
        zombies: process ids.
    """

    at: float
    calm: bool
    roles: dict[str, Use] = field(default_factory=dict)
    zombies: list[int] = field(default_factory=list)


class Server:
    """`quantserve serve` with two models, API keys and an access log.

    Args:
        folder: for its config, keys and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.access_log = folder / "access.log"
        self.log = folder / "serve.log"
        self.port = free_port()
        self.target = Target(f"http://127.0.0.1:{self.port}", "", KEY)
        self.exit_code: int | None = None
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._tree: Tree | None = None

    def start(self) -> None:
        """Start it and wait until it prints that it is ready.

        Raises:
            BenchError: it ended, was not ready in time, or serves only some of the models.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self.access_log.unlink(missing_ok=True)
        keys = self._folder / "keys.txt"
        keys.write_text(f"{KEY}\nanother-key-0123456789\n")
        config = self._folder / "app.json"
        limits = {"access_log": str(self.access_log), "api_keys_file": str(keys)}
        config.write_text(json.dumps({"models": [_model(*one) for one in MODELS.items()], "http": limits}, indent=2))
        command = [sys.executable, "-m", "quantserve", "serve", str(config), "--port", str(self.port)]
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment({}),
                start_new_session=True,
            )  # fmt: skip
        self._tree = Tree(self._process.pid)
        deadline = time.monotonic() + START_S
        while b"Press Ctrl-C to stop." not in self.log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                last = self.log.read_text(errors="replace").splitlines()[-8:]
                raise BenchError("the server did not start:\n" + "\n".join(f"  | {line}" for line in last))
            self._tree.look()
            time.sleep(1)
        if not self.complete():
            text = self.log.read_text(errors="replace")
            failed = [f"  | {line}" for line in text.splitlines() if "failed" in line]
            raise BenchError("\n".join(["a model failed to start:", *failed]))

    def stop(self) -> list[str]:
        """Stop it with SIGTERM; returns what is wrong with the way it stopped."""
        if not self._process or not self._tree:
            return []
        self._tree.look()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.exit_code = self._process.wait(STOP_S)
        time.sleep(1)
        left = [process for process in self._tree.look() if process.pid != os.getpid()]
        wrong = [f"process {process.pid} is left over: {_title(process)[:80]}" for process in left]
        if self.exit_code != 0:
            wrong.append(
                f"exit code {self.exit_code}" if self.exit_code is not None else f"no exit within {STOP_S:.0f} s"
            )
        self._tree.stop(wait=((signal.SIGTERM, 1.0),))
        return wrong

    def kill(self) -> None:
        """End all its processes at once."""
        if self._tree:
            self._tree.stop(wait=((signal.SIGINT, 30.0),))

    def by_role(self) -> dict[str, list[psutil.Process]]:
        """Its processes."""
        assert self._tree
        assert self._process
        found: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
        living = self._tree.look()
        titles = {process.pid: _title(process) for process in living}
        replicas = {pid for pid, title in titles.items() if title.startswith("ray::ServeReplica")}
        for process in living:
            if process.pid == self._process.pid:
                role = "command"
            elif "quantserve.serve.gateway.process" in titles[process.pid]:
                role = "gateway"
            elif process.pid in replicas:
                role = "replicas"
            else:
                role = "engines" if replicas & set(_parents(process)) else "Ray"
            found[role].append(process)
        return found

    def replicas(self, model: str) -> list[psutil.Process]:
        """The replica processes of a model."""
        return [process for process in self.by_role()["replicas"] if f":{model}:" in _title(process)]

    def sample(self, calm: bool) -> Sample:
        """What its processes use now."""
        out = Sample(time.time(), calm)
        for role, processes in self.by_role().items():
            use = out.roles[role] = Use()
            for process in processes:
                with contextlib.suppress(psutil.Error), process.oneshot():
                    memory, fds, threads = process.memory_full_info(), process.num_fds(), process.num_threads()
                    use.rss += memory.rss
                    use.private += memory.uss
                    use.fds += fds
                    use.threads += threads
                    use.processes += 1
        assert self._process
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
            out.zombies = [child.pid for child in children if _is_zombie(child)]
        return out

    def metrics(self) -> str:
        """The text of `/metrics`; empty if the gateway does not respond."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()
        return text if response.status == 200 else ""

    def complete(self) -> bool:
        """Whether every replica is ready."""
        ready = {model: float(count) for model, count in READY.findall(self.metrics())}
        return all(ready.get(model) == replicas for model, (_, replicas) in MODELS.items())

    def replica_ids(self) -> dict[str, set[str]]:
        """Model id -> ids of the replicas whose metrics are scraped."""
        found: dict[str, set[str]] = {model: set() for model in MODELS}
        for replica, model in REPLICA.findall(self.metrics()):
            found.setdefault(model, set()).add(replica)
        return found

    def busy(self) -> float | None:
        """Requests that gateway and engines count as running or queued; None without metrics."""
        text = self.metrics()
        return sum(map(float, BUSY.findall(text))) if text else None


def _model(model: str, of: Sequence[Any]) -> dict[str, Any]:
    folder, replicas = of
    return {
        "engine_config": {
            "model_id": model,
            "hf_model_id": str(ROOT / "examples" / "demo-model" / folder),
            "max_total_tokens": 512,
            "engine_kwargs": {"max_num_seqs": 16, "enforce_eager": True},
        },
        "deployment_config": {"max_ongoing_requests": 32, "num_replicas": replicas},
        "scaling_config": {"num_gpus_per_worker": 0},
    }


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _parents(process: psutil.Process) -> list[int]:
    try:
        return [parent.pid for parent in process.parents()]
    except psutil.Error:
        return []


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended."""
    return not alive(process)
