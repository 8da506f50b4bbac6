"""The access log: one line per request, nothing secret, nothing that blocks."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.waiting import until
from quantserve.serve.asgi import Guard, Refused
from quantserve.serve.gateway.middleware import access_log
from quantserve.serve.gateway.middleware.access_log import AccessLog
from quantserve.serve.gateway.middleware.limits import Policy, layers
from quantserve.serve.gateway.middleware.trace import Trace, Traced

from .asgi_client import Upstream, request


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finished(name: str = "id", **fields: Any) -> Trace:
    trace = Trace(name, "POST", "/v1/completions", status=200, total_s=0.5)
    for key, value in fields.items():
        setattr(trace, key, value)
    return trace


def test_a_line_per_request(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "logs" / "access.jsonl"))
    body = {"prompt": "a secret prompt", "user": "somebody"}
    headers = {"x-request-id": 'mine"\\', "authorization": "Bearer secret-key"}
    asyncio.run(request(Traced(Upstream("m"), [log]), "POST", "/v1/completions", body, headers=headers))

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        raise Refused(404, "the model `secret` does not exist", code="model_not_found")

    asyncio.run(request(Traced(Guard(refuse), [log]), "POST", "/v1/x", body, headers=headers))
    log.flush()
    text = (tmp_path / "logs" / "access.jsonl").read_text()
    assert "secret" not in text
    assert "somebody" not in text
    first, second = lines(tmp_path / "logs" / "access.jsonl")
    assert (first["id"], first["method"], first["path"], first["status"]) == (
        'mine"\\', "POST", "/v1/completions", 200
    )  # fmt: skip
    assert (first["bytes_in"], first["bytes_out"]) == (len(json.dumps(body)), len(b'{"from": "m"}'))
    assert 0 <= first["first_byte_ms"] <= first["total_ms"] < 1000
    assert "error" not in first
    assert (second["status"], second["error"]) == (404, "model_not_found")


def test_probes_are_not_logged_unless_they_fail(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    for path in ("/health", "/metrics"):
        for status in (200, 503):
            log(finished(path=path, status=status))
    log.flush()
    assert [(line["path"], line["status"]) for line in lines(tmp_path / "log")] == [("/health", 503), ("/metrics", 503)]


def test_stderr_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log = AccessLog("stderr")
    log(finished())
    log.flush()
    assert json.loads(stream.getvalue())["total_ms"] == 500
    asyncio.run(request(layers(Upstream("m"), Policy(access_log="off")), "GET", "/v1/models"))
    time.sleep(2 * access_log.BATCH_S)
    assert len(stream.getvalue().splitlines()) == 1


def test_lines_are_written_without_a_flush(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    log(finished())
    until(lambda: (tmp_path / "log").exists() and lines(tmp_path / "log"))


def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AccessLog(str(path))
    log(finished("one"))
    log.flush()
    path.rename(tmp_path / "log.1")
    log(finished("two"))
    log.flush()
    assert [line["id"] for line in lines(tmp_path / "log.1")] == ["one"]
    assert [line["id"] for line in lines(path)] == ["two"]


def test_a_write_error_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    log = AccessLog(str(tmp_path / "file" / "log"))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            log(finished())
            log.flush()
    assert len(caplog.records) == 1
    (tmp_path / "file").unlink()
    log(finished("later"))
    log.flush()
    assert [line["id"] for line in lines(tmp_path / "file" / "log")] == ["later"]


def test_lines_beyond_the_buffer_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "BUFFER_LINES", 3)
    log = AccessLog(str(tmp_path / "log"))
    with log._writing:  # the disk hangs
        for index in range(5):
            log(finished(str(index)))
    log.flush()
    found = lines(tmp_path / "log")
    assert [line["id"] for line in found[:-1]] == ["2", "3", "4"]
    assert found[-1]["dropped"] == 2
