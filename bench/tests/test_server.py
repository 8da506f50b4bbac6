"""The server a benchmark starts: waited for, and stopped whatever happens. The engine's part is played by a script."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from helpers.waiting import until
from quantserve.config import ModelConfig, load
from quantserve.errors import EngineError, UsageError
from quantserve_bench import server as module
from quantserve_bench.server import Server, choose

ROOT = Path(__file__).parents[2]

FAKE = """
import http.server, json, os, signal, subprocess, sys, time
config, port = sys.argv[1], int(sys.argv[3])
print("models:", [m["engine_config"]["model_id"] for m in json.load(open(config))["models"]], flush=True)
open(os.path.join(os.path.dirname(config), "pid"), "w").write(str(os.getpid()))
mode = os.environ.get("FAKE_MODE", "")
if mode == "fails":
    sys.exit("the engine has no memory left")
signal.signal(signal.SIGTERM, signal.default_int_handler)
if mode == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "100"], start_new_session=True)
began = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() - began > 0.7 else 503)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *args): pass
try:
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
except KeyboardInterrupt:
    open(os.path.join(os.path.dirname(config), "stopped"), "w").write("in order")
"""


@pytest.fixture
def models() -> list[ModelConfig]:
    return load([ROOT / "models" / "demo.yaml"]).models


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake_serve.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


def alive(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_waits_until_healthy_and_stops_in_order(tmp_path: Path, models: list[ModelConfig], command: list[str]) -> None:
    waited: list[float] = []
    began = time.monotonic()
    with Server(models[:2], tmp_path, waited.append, command) as target:
        assert time.monotonic() - began > 0.7
        assert target.url.startswith("http://127.0.0.1:")
        assert alive(tmp_path)
    assert waited
    assert waited == sorted(waited)
    assert not alive(tmp_path)
    assert (tmp_path / "stopped").read_text() == "in order"
    assert "['demo-fp16', 'demo-awq']" in (tmp_path / "serve.log").read_text()
    # The config it got is one that serve accepts, with absolute paths.
    again = load([tmp_path / "models.json"]).models
    assert [model.model_id for model in again] == ["demo-fp16", "demo-awq"]
    assert again[0].engine_config == models[0].engine_config


def test_is_stopped_when_the_benchmark_fails(tmp_path: Path, models: list[ModelConfig], command: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Server(models, tmp_path, command=command):
        raise KeyboardInterrupt
    assert not alive(tmp_path)


def test_is_stopped_when_interrupted_while_it_starts(
    tmp_path: Path, models: list[ModelConfig], command: list[str]
) -> None:
    def interrupt(seconds: float) -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Server(models, tmp_path, interrupt, command):
        pass
    assert not alive(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_server_is_stopped_when_the_benchmark_gets_a_signal(
    tmp_path: Path, models: list[ModelConfig], command: list[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Server(models, tmp_path, command=command):
        signal.raise_signal(number)
    assert not alive(tmp_path)
    assert signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored(tmp_path: Path, models: list[ModelConfig], command: list[str]) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Server(models, tmp_path, command=command):
            signal.raise_signal(signal.SIGHUP)
            assert alive(tmp_path)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_is_killed_with_its_processes_when_a_second_signal_arrives(
    tmp_path: Path, models: list[ModelConfig], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "stubborn")
    monkeypatch.setattr(module, "KILL_S", 0.3)
    interrupt = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM])
    server = Server(models, tmp_path, command=command)
    server.__enter__()
    (child,) = psutil.Process(int((tmp_path / "pid").read_text())).children()
    interrupt.start()  # while the server does not stop
    with pytest.raises(KeyboardInterrupt):
        server.__exit__(None, None, None)
    assert not alive(tmp_path)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_is_killed_when_it_does_not_listen(
    tmp_path: Path, models: list[ModelConfig], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "stubborn")
    monkeypatch.setattr(module, "STOP_S", 0.3)
    monkeypatch.setattr(module, "KILL_S", 0.3)
    with Server(models, tmp_path, command=command):
        pass
    assert not alive(tmp_path)


def test_a_failed_start_is_reported_with_the_last_lines(
    tmp_path: Path, models: list[ModelConfig], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "fails")
    with (
        pytest.raises(EngineError, match=r"exited with code 1 during its start:(\n.*)*the engine has no memory left"),
        Server(models, tmp_path, command=command),
    ):
        pass


def test_choosing_models(models: list[ModelConfig]) -> None:
    methods = {"demo-fp16": "fp16", "demo-awq": "awq", "demo-squeezellm": "squeezellm"}

    def ids(*names: str) -> list[str]:
        return [model.model_id for model in choose(models, names, methods)]

    assert ids() == list(methods)
    assert ids("awq", "demo-fp16") == ["demo-awq", "demo-fp16"]
    with pytest.raises(UsageError, match=r"did you mean 'awq'\? \(known: .*demo-awq"):
        ids("akq")
    with pytest.raises(UsageError, match="awq is the method of several models: demo-fp16, demo-awq"):
        choose(models, ["awq"], {**methods, "demo-fp16": "awq"})


def test_the_config_is_json(models: list[ModelConfig]) -> None:
    assert json.loads(models[0].model_dump_json(exclude_unset=True))["engine_config"]["model_id"] == "demo-fp16"
