"""`quantserve serve` and `serve run` as processes, watched by a test."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil  # type: ignore[import-untyped]

from helpers import waiting
from helpers.waiting import HANGS_S

BIN = Path(sys.executable).parent
DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
START_S = 400.0
"""Three engines that start at once on two busy cores."""
KEY = "sesame-0123456789"
EAGER = {"enforce_eager": True, "max_num_seqs": 16}
"""Engine arguments of all tests: compiling takes a minute the first time and changes nothing here."""


class Server:
    """A server process in a session of its own, as a terminal and systemd start it; its output is collected by line.

    Args:
        command: its command line.
        terminal: file descriptor of a terminal that controls it and gets its output, which is not collected then.
    """

    def __init__(self, command: list[str], terminal: int | None = None, **env: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **env}
        environment.pop("QUANTSERVE_API_KEYS", None) if "QUANTSERVE_API_KEYS" not in env else None
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(_prepare, terminal),
        )
        self.lines: list[str] = []
        self.key: str | None = None
        self.base = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = START_S) -> re.Match[str]:
        """The first match in the output; fails when the process ends or time is up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.output, re.MULTILINE):
                return match
            if self.process.poll() is not None:
                self._reader.join(5)
                if match := re.search(pattern, self.output, re.MULTILINE):
                    return match
                break
            time.sleep(0.2)
        raise AssertionError(f"no {pattern!r} in {seconds} s; exit {self.process.poll()}; output:\n{self.output}")

    def ready(self) -> Server:
        """Wait until the models are ready."""
        self.wait_for(r"^Press Ctrl-C to stop")
        self.base = self.wait_for(r"(http://\S+?)/v1/chat/completions").group(1)
        return self

    def descendants(self) -> list[Any]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def send(self, number: int, to: str = "command") -> None:
        """Send a signal to the command; to its process group, as a terminal; or to every process, as systemd."""
        if to == "group":
            os.killpg(self.process.pid, number)
        else:
            for process in self.descendants() if to == "every process" else ():
                with suppress(psutil.Error):
                    process.send_signal(number)
            self.process.send_signal(number)

    def stop(self, number: int = signal.SIGINT, seconds: float = HANGS_S, to: str = "command") -> int:
        """Send a signal and wait for the end; returns the exit code."""
        if self.process.poll() is None:
            self.send(number, to)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            left = self.descendants()
            self.process.kill()
            for process in left:
                process.kill()
            raise AssertionError(f"not stopped after {seconds} s; output:\n{self.output}") from None
        self._reader.join(5)
        return code

    def request(self, method: str, path: str, json: object = None, **kwargs: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= kwargs.pop("headers", {})
        return httpx.request(method, self.base + path, json=json, timeout=60, headers=headers, **kwargs)

    def client(self, route: str = "") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base}{route}/v1", api_key=self.key or "none", timeout=60, max_retries=0)


def _prepare(terminal: int | None) -> None:
    """In the new process: it gets SIGTERM when the tests are killed, and becomes controlled by the terminal."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if terminal is not None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def serve(*arguments: str | Path, **env: str) -> Server:
    return Server([str(BIN / "quantserve"), "serve", "--port", "0", *map(str, arguments)], None, **env)


def free_port() -> int:
    """A TCP port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gateway(server: Server) -> Any:
    """The gateway process."""
    (found,) = [
        p for p in psutil.Process(server.process.pid).children() if "quantserve.serve.gateway.process" in p.cmdline()
    ]
    return found


def replicas(server: Server, app: str) -> list[Any]:
    """The processes of a model's replicas; `app` is the name of its application."""
    return [p for p in server.descendants() if p.name().startswith("ray::") and f"ServeReplica:{app}:" in _title(p)]


def engines(server: Server, app: str) -> list[Any]:
    """The processes of a model's engines, engine cores before their workers."""
    return [engine for replica in replicas(server, app) for engine in replica.children(recursive=True)
            if engine.name().startswith("VLLM::")]  # fmt: skip


def _title(process: Any) -> str:
    try:
        return str(process.cmdline()[0])
    except (psutil.Error, IndexError):
        return ""


def gone(processes: list[Any]) -> bool:
    """Whether none of them runs any more."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def metric(server: Server, app: str, name: str) -> float:
    """The sum of a metric over all its labels; `app` is the model's route, or empty for the gateway."""
    answer = server.request("GET", f"/{app}/metrics" if app else "/metrics")
    assert answer.status_code == 200
    values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", answer.text, re.MULTILINE)
    assert values, f"no {name}"
    return sum(map(float, values))


def until(check: Callable[[], bool], seconds: float = HANGS_S) -> None:
    """Wait until `check` holds; connection errors count as not yet."""
    waiting.until(check, seconds, not_yet=httpx.HTTPError)


def model(model_id: str, folder: Path | str, **engine_config: Any) -> dict[str, Any]:
    """A model of an app config."""
    kwargs = {**EAGER, **engine_config.pop("engine_kwargs", {})}
    return {
        "engine_config": {
            "model_id": model_id,
            "hf_model_id": str(folder),
            "max_total_tokens": 512,
            "engine_kwargs": kwargs,
            **engine_config,
        },
        "deployment_config": {"max_ongoing_requests": 32},
        "scaling_config": {"num_gpus_per_worker": 0},
    }
