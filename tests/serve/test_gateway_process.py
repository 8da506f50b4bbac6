"""The gateway process: its status, and its restart when the heartbeat stops."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from quantserve.config import ExplorerConfig
from quantserve.serve.driver import gateway_process
from quantserve.serve.driver.gateway_process import GatewayProcess
from quantserve.serve.gateway.middleware.limits import Policy

from .server import until

REPLICA = {"id": "r1", "host": "127.0.0.1", "port": 9, "draining": False, "ongoing": 0, "cpus": []}


def described(model_id: str, **limits: object) -> dict[str, object]:
    card = {"id": model_id, "object": "model", "metadata": {}}
    return {"card": card, "route": f"/{model_id}", "aliases": [], "limits": limits}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[GatewayProcess, str, list[str]]]:
    """A gateway for three models, its address and the reported lines."""
    monkeypatch.setattr(gateway_process, "HANGS_S", 8.0)
    listener = socket.create_server(("127.0.0.1", 0))
    reported: list[str] = []
    models = [described("here"), described("away"), described("asleep", wakes=True)]
    settings = {"models": models, "token": "t", "policy": Policy().model_dump(mode="json")}
    process = GatewayProcess(listener, settings, reported.append)
    try:
        yield process, f"http://127.0.0.1:{listener.getsockname()[1]}", reported
    finally:
        process.stop(5)


def test_it_reports_reachable_models_and_is_restarted_when_it_hangs(
    started: tuple[GatewayProcess, str, list[str]],
) -> None:
    process, base, reported = started
    until(lambda: process.reachable == ["asleep"])
    process.update({"here": [REPLICA]})
    until(lambda: process.reachable == ["here", "asleep"])
    assert httpx.get(f"{base}/v1/models", trust_env=False).status_code == 200
    (child,) = [p for p in psutil.Process().children() if "quantserve.serve.gateway.process" in p.cmdline()]
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: len(reported) == 2)
    assert reported[0] == "Gateway process sent no heartbeat for 8 s; killing it."
    assert reported[1] == "Gateway process was killed (signal 9); restarting it."
    until(lambda: process.reachable == ["here", "asleep"])  # the new process got the replicas of the old one
    assert httpx.get(f"{base}/v1/models", trust_env=False).status_code == 200


def test_it_has_the_page_and_tells_so(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    explorer = ExplorerConfig(votes=True, votes_file=str(tmp_path / "votes")).model_dump(mode="json")
    settings = {"models": [described("a"), described("b")], "token": "t", "policy": Policy().model_dump(mode="json")}
    process = GatewayProcess(listener, {**settings, "explorer": explorer}, print)
    try:
        until(lambda: process.page)
        with httpx.Client(base_url=base, trust_env=False) as client:
            for path, target in (("/explorer/", "/"), ("/explorer", "/")):
                answer = client.get(path, follow_redirects=True)
                assert (answer.url.path, answer.headers["content-type"]) == (target, "text/html; charset=utf-8")
            for path in re.findall(r'(?:src|href)="(explorer/[^"]+)"', answer.text):
                assert client.get(f"/{path}").status_code == 200, path
            vote = {"models": ["a", "b"], "winner": "b"}
            assert client.post("/explorer/votes", json=vote).json() == {"votes": 1}
            assert client.post("/explorer/votes", json={**vote, "blind": 3}).json()["error"]["param"] == "blind"
            assert [model["state"] for model in client.get("/status").json()["models"]] == ["starting"] * 2
    finally:
        process.stop(5)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_it_keeps_off_the_cpus_that_replicas_compute_on(started: tuple[GatewayProcess, str, list[str]]) -> None:
    process, _, said = started
    cpus = os.sched_getaffinity(0)
    bound = min(cpus)

    def gateway() -> int:
        (child,) = [p for p in psutil.Process().children() if "quantserve.serve.gateway.process" in p.cmdline()]
        return int(child.pid)

    until(lambda: process.reachable == ["asleep"])
    assert os.sched_getaffinity(gateway()) == cpus
    process.update({"here": [{**REPLICA, "cpus": [bound]}]})
    assert os.sched_getaffinity(gateway()) == cpus - {bound}
    os.kill(gateway(), signal.SIGKILL)
    until(lambda: len(said) == 1 and process.reachable == ["here", "asleep"])
    assert os.sched_getaffinity(gateway()) == cpus - {bound}  # its successor, too
    process.update({"here": []})
    assert os.sched_getaffinity(gateway()) == cpus
