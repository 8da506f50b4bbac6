"""Signals as terminals, shells and systemd send them: streams drain, and nothing is left over or starts again."""

from __future__ import annotations

import json
import os
import pty
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from .server import BIN, HANGS_S, Server, gone, metric, model, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(500)]


class Stream:
    """A request for tokens in a thread; it takes a second or two."""

    def __init__(self, base: str) -> None:
        self.lines: list[str] = []
        self._base = base
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        until(lambda: bool(self.lines))

    def _run(self) -> None:
        body = {"model": "demo", "prompt": "def", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{self._base}/v1/completions", json=body, timeout=HANGS_S, trust_env=False
        ) as answer:
            self.lines.extend(line for line in answer.iter_lines() if line)

    def end(self) -> str:
        """The last event."""
        self._thread.join(HANGS_S)
        assert not self._thread.is_alive()
        return self.lines[-1]


@pytest.fixture
def config(demo: Path, tmp_path: Path) -> Path:
    path = tmp_path / "app.yaml"
    http = {"access_log": str(tmp_path / "access.jsonl"), "drain_timeout_s": HANGS_S}
    path.write_text(yaml.safe_dump({"http": http, "models": [model("demo", demo / "checkpoint")]}))
    return path


@pytest.fixture
def command(config: Path) -> list[str]:
    return [str(BIN / "quantserve"), "serve", str(config), "--port", "0"]


def logged(config: Path) -> list[int]:
    """The status of the requests in the access log."""
    text = (config.parent / "access.jsonl").read_text()
    return [line["status"] for line in map(json.loads, text.splitlines()) if line["path"] == "/v1/completions"]


def test_sigterm_to_every_process_drains(command: list[str], config: Path) -> None:
    running = Server(command)
    try:
        running.ready()
        stream = Stream(running.base)
        before = running.descendants()
        ending = [process.name() for process in before if ends_by_signals(process)]
        code = running.stop(signal.SIGTERM, to="every process")
    finally:
        running.stop(signal.SIGKILL) if running.process.poll() is None else None
    assert ending == []
    assert code == 0
    assert stream.end() == "data: [DONE]"
    assert logged(config) == [200]
    assert gone(before)
    assert running.lines[-1].startswith("Stopped in")
    assert running.output.count("Starting Ray") == running.output.count("Logs: ") == 1


def ends_by_signals(process: psutil.Process) -> bool:
    """Whether a thread of it accepts SIGINT, SIGTERM or SIGHUP."""
    stops = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            status = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
            if (int(status["SigBlk"], 16) | int(status["SigIgn"], 16)) & stops != stops:
                return True
    return False


def test_a_closed_terminal_drains(command: list[str], config: Path) -> None:
    ours, theirs = pty.openpty()
    running = Server(command, terminal=theirs)
    os.close(theirs)
    shown = b""
    while b"Press Ctrl-C to stop" not in shown:
        shown += os.read(ours, 4096)
    base = next(word for word in shown.decode().split() if word.endswith("/v1/chat/completions"))
    stream = Stream(base.removesuffix("/v1/chat/completions"))
    before = running.descendants()
    os.close(ours)
    assert running.process.wait(120) == 0
    assert stream.end() == "data: [DONE]"
    assert logged(config) == [200]
    assert gone(before)


def test_ignored_signals_stay_ignored_and_a_second_signal_stops_at_once(command: list[str], config: Path) -> None:
    running = Server(["sh", "-c", 'trap "" HUP INT; exec "$@"', "sh", *command])  # nohup in the background
    try:
        running.ready()
        for number in (signal.SIGHUP, signal.SIGINT):
            running.send(number, to="group")
        stream = Stream(running.base)
        assert stream.end() == "data: [DONE]"
        assert "Stopping" not in running.output
        before = running.descendants()
        for engine in (process for process in before if process.name().startswith("VLLM::")):
            engine.send_signal(signal.SIGSTOP)  # the next request does not end by itself
        body = {"model": "demo", "prompt": "def"}
        with ThreadPoolExecutor(1) as client:
            cut = client.submit(running.request, "POST", "/v1/completions", body)
            until(lambda: metric(running, "", "quantserve_requests_in_progress") == 1)
            running.send(signal.SIGTERM)
            running.wait_for("^Stopping: ")
            time.sleep(0.6)  # two signals within 0.5 s are one
            code = running.stop(signal.SIGTERM)
    finally:
        running.stop(signal.SIGKILL) if running.process.poll() is None else None
    assert running.lines[-1] == "Stopped at once."
    assert code == 130
    assert (cut.result().status_code, cut.result().json()["error"]["code"]) == (503, "shutdown")
    assert gone(before)
    assert logged(config) == [200, 503]
