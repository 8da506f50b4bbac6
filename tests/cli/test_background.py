"""`quantserve status`, `quantserve stop` and what `serve --detach` does around a start, with a light stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.waiting import HANGS_S, until
from quantserve.cli.main import run
from quantserve.system.servers import folder, running, start_ticks

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts stand-ins; all processes that have a record are killed at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("QUANTSERVE_API_KEY", raising=False)
    begun: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cli.background", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield start
    for server in running():
        os.kill(server.pid, signal.SIGKILL)
    for process in begun:
        process.kill()
        process.communicate()


def foreground(start: Start, *arguments: str) -> subprocess.Popen[str]:
    process = start(*arguments)
    assert process.stdout is not None
    until(lambda: any(server.pid == process.pid and server.state == "ready" for server in running()))
    return process


def status(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["status", "--json"]) == 0
    shown: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return shown


def test_a_server_is_shown_and_stopped(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(capsys) == []
    assert run(["stop"]) == 0
    assert "no server of this user runs" in capsys.readouterr().out
    process = foreground(start, "--drain", "0.5")
    (shown,) = status(capsys)
    assert (shown["pid"], shown["state"], shown["sources"], shown["log"]) == (process.pid, "ready", ["app.yaml"], "")
    assert shown["models"] == [{"id": "m", "state": "ready"}]
    assert 0 <= shown["uptime_s"] < HANGS_S
    assert run(["status"]) == 0
    assert shown["url"] in capsys.readouterr().out
    (file,) = folder().glob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder().stat().st_mode & 0o777 == 0o700
    assert run(["stop"]) == 0
    assert "have up to 1 s to finish" in capsys.readouterr().out
    assert process.wait(HANGS_S) == 0
    assert status(capsys) == []
    assert not list(folder().iterdir())


def test_one_of_several_is_named(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = foreground(start), foreground(start, "--state", "unhealthy")
    url = {one["pid"]: one["url"] for one in status(capsys)}
    assert [one["state"] for one in status(capsys)] == ["ready", "down"]
    assert run(["stop"]) == 2
    shown = capsys.readouterr().err
    assert f"2 servers of this user run\n  fix: name one of these: --pid {first.pid} ({url[first.pid]})" in shown
    assert run(["stop", "--pid", str(os.getpid())]) == 2
    assert f"process {os.getpid()} is no running server of this user" in capsys.readouterr().err
    assert run(["stop", "--url", "http://127.0.0.1:1"]) == 2
    assert run(["stop", "--all", "--pid", "7"]) == 2
    assert run(["stop", "--url", url[first.pid].replace("127.0.0.1", "localhost")]) == 0
    assert (first.wait(HANGS_S), second.poll()) == (0, None)
    assert run(["stop", "--all"]) == 0
    assert second.wait(HANGS_S) == 0


def test_a_record_of_another_process_harms_nobody(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of a server that was killed belongs to another process now."""
    process = foreground(start)
    (file,) = folder().glob("*.json")
    record = json.loads(file.read_text())
    process.kill()
    process.wait()
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        file.write_text(json.dumps({**record, "pid": bystander.pid}))
        assert run(["stop", "--pid", str(bystander.pid)]) == 2
        assert run(["stop", "--all"]) == 0
        assert bystander.poll() is None
        assert not file.exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_records_that_are_not_ours_are_left_alone(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    foreground(start)
    (file,) = folder().glob("*.json")
    record = json.loads(file.read_text())
    others = {
        "host": {**record, "host": "elsewhere", "pid": 1},  # the folder is on a network file system
        "container": {**record, "pids": "pid:[1]"},
        "text": "text",
        "form": {"pid": "x"},
        "empty": [],
    }
    for name, value in others.items():
        (folder() / f"{name}.json").write_text(json.dumps(value))
    (folder() / "cut.json").write_text('{"pid": ')
    (folder() / "link.json").symlink_to(file)
    os.mkfifo(folder() / "fifo.json")
    (shared := folder() / "shared.json").write_text(json.dumps(record))
    shared.chmod(0o666)
    assert len(status(capsys)) == 1
    assert len(list(folder().iterdir())) == len(others) + 5
    file.write_text(json.dumps({**record, "boot": "an earlier one"}))
    assert status(capsys) == []
    assert not file.exists()


def test_a_server_that_does_not_end_is_told(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    process = foreground(start, "--drain", "30")
    assert run(["stop", "--timeout", "0.3"]) == 4
    shown = capsys.readouterr().err
    assert f"server {process.pid}" in shown
    assert f"fix: wait, or `quantserve stop --pid {process.pid} --now`" in shown
    assert [one["state"] for one in status(capsys)] == ["stopping"]


def test_now_does_not_wait_for_the_drain(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    process = foreground(start, "--drain", "1000")
    assert run(["stop", "--now"]) == 0
    assert "to finish" not in capsys.readouterr().out
    assert process.wait(HANGS_S) == 0


def test_a_server_without_an_answer_is_shown(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    foreground(start)
    (file,) = folder().glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "url": "http://127.0.0.1:9"}))
    assert [one["state"] for one in status(capsys)] == ["no answer"]


def test_detach_returns_when_the_server_is_ready(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "serve.log"
    waiting = start("--detach", str(log))
    output, _ = waiting.communicate(timeout=HANGS_S)
    (server,) = running()
    assert waiting.returncode == 0
    assert output.splitlines() == [
        "starting",
        f"Log: {log}",
        f"`quantserve status` shows the server, `quantserve stop --pid {server.pid}` stops it.",
    ]
    assert os.getsid(server.pid) == server.pid != waiting.pid
    assert log.stat().st_mode & 0o777 == 0o600
    (shown,) = status(capsys)
    assert (shown["state"], shown["log"]) == ("ready", str(log))
    assert run(["stop"]) == 0
    assert log.read_text().endswith("stopped\n")
    assert start_ticks(server.pid) is None


@pytest.mark.parametrize(("failure", "code"), [(["--fail", "2"], 2), (["--fail", "0"], 4), (["--in-part"], 4)])
def test_a_start_that_fails_is_loud(failure: list[str], code: int, start: Start, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    log.write_text("an earlier start\n")
    waiting = start("--detach", str(log), *failure)
    output, _ = waiting.communicate(timeout=HANGS_S)
    assert waiting.returncode == code
    assert "an earlier start" not in output
    if "--fail" in failure:
        assert "error: no weights" in output
        assert f"ended with exit code {failure[1]} before it was ready\n  log: {log}" in output


def test_ctrl_c_while_it_starts_stops_it(start: Start, tmp_path: Path) -> None:
    waiting = start("--detach", str(tmp_path / "serve.log"), "--hang")
    until(lambda: bool(running()))
    os.killpg(waiting.pid, signal.SIGINT)
    output, _ = waiting.communicate(timeout=HANGS_S)
    assert waiting.returncode == 130
    assert "stopped" in output
    assert not running()


def test_a_log_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "app.yaml", "--log", "x"]) == 2
    assert "--log is the log of --detach" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(["serve", "app.yaml", "--detach", "--log", str(tmp_path / "file" / "log")]) == 2
    assert "fix: name a file with --log" in capsys.readouterr().err
