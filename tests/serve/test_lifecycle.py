"""Start, failure, death and end of a server, with real processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from quantserve.serve.cpus import NICEST, STEP_BACK

from .server import HANGS_S, Server, gateway, gone, model, serve, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


@pytest.fixture(scope="module")
def limping(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models, one of which passes the checks and fails in the engine."""
    path = tmp_path_factory.mktemp("limping") / "app.yaml"
    broken = model("broken", demo / "checkpoint", engine_kwargs={"scheduler_cls": "no_such_module.Scheduler"})
    path.write_text(yaml.safe_dump({"models": [model("good", demo / "awq"), broken]}))
    running = serve(path)
    try:
        yield running.ready()
    finally:
        running.stop()


def test_a_failed_model_reports_its_cause_and_the_other_serves(limping: Server) -> None:
    line = limping.wait_for(r"^\s*broken\s+failed: (.*)$").group(1)
    assert "No module named 'no_such_module'" in line
    assert "Traceback" not in limping.output
    assert re.search(r"^\s*good\s+ready in [\d.]+ s$", limping.output, re.MULTILINE)
    assert "/broken/v1" not in limping.output
    answer = limping.client().completions.create(model="good", prompt="Return", max_tokens=3)
    assert answer.choices[0].text


def test_requests_to_the_failed_model_get_an_answer(limping: Server) -> None:
    answer = limping.request("POST", "/v1/completions", {"model": "broken", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
    assert answer.headers["retry-after"]
    health = limping.request("GET", "/health")
    assert (health.status_code, health.json()["models"]) == (503, {"good": "ok", "broken": "unavailable"})


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_ctrl_c_leaves_no_process(limping: Server, number: int) -> None:
    """Last in this module: it ends the server."""
    before = limping.descendants()
    assert len([p for p in before if "EngineCor" in p.name()]) == 1
    assert limping.stop(number) == 4  # a model failed to start
    assert gone(before)
    assert limping.lines[-1].startswith("Stopped in")
    with pytest.raises(httpx.ConnectError):
        httpx.get(limping.base + "/health", timeout=5)


def test_one_model_has_the_address_to_itself_and_dies_with_its_server(demo: Path) -> None:
    running = serve(demo / "checkpoint", "--max-model-len", "256", QUANTSERVE_API_KEYS="from-the-environment")
    try:
        running.ready().key = "from-the-environment"
        listed = running.request("GET", "/v1/models").json()["data"]
        assert [card["max_model_len"] for card in listed] == [256]
        name = listed[0]["id"]
        for prefix in ("", "/" + name):
            answer = running.client(prefix).completions.create(model=name, prompt="Return", max_tokens=3)
            assert answer.choices[0].text
            assert running.request("GET", prefix + "/metrics").status_code == 200
            # What only vLLM's own server has is reached without naming the model, too.
            assert "version" in running.request("GET", prefix + "/version").json()
        assert running.request("POST", "/v1/completions", {"model": "x", "prompt": ""}).status_code == 404
        assert httpx.get(running.base + "/v1/models", timeout=30).status_code == 401
        for process in running.descendants():
            with contextlib.suppress(psutil.Error):
                assert "from-the-environment" not in process.environ().values()
        engine = [p for p in running.descendants() if p.name().startswith(("VLLM::", "ray::ServeReplica"))]
        assert len(engine) >= 3
        door = gateway(running)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert {p.nice() for p in (*engine, door)} == {own}
        ray = [p for p in running.descendants() if p.name().startswith(("gcs_server", "ray::ServeController"))]
        assert [p.nice() for p in ray] == [min(NICEST, own + STEP_BACK)] * 2
        os.kill(running.process.pid, signal.SIGKILL)  # no chance to clean up
        until(lambda: gone([door]))
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.base + "/health", timeout=5)
        until(lambda: gone(engine), 50)  # Ray's own agents notice after a minute
    finally:
        running.stop(signal.SIGKILL)


@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, "group"), (signal.SIGTERM, "every process")])
def test_stopped_while_starting(demo: Path, tmp_path: Path, number: int, to: str) -> None:
    """No request is in progress, so nothing waits for the drain timeout."""
    app = {"http": {"drain_timeout_s": 3 * HANGS_S}, "models": [model("demo", demo / "checkpoint")]}
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(app))
    running = serve(tmp_path / "app.yaml")
    try:
        running.wait_for("Starting Ray")
        until(lambda: any("ServeReplica" in p.name() for p in running.descendants()))
        before = running.descendants()
    finally:
        code = running.stop(number, to=to)
    assert code == 0
    assert gone(before)
    assert "Traceback" not in running.output


def test_a_port_in_use_fails_before_ray_starts(demo: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = serve(demo / "checkpoint", "--port", str(port))
        assert running.process.wait(HANGS_S) == 4
    running.wait_for(rf"port {port} on 127.0.0.1 is already in use")
    assert "Starting Ray" not in running.output


def test_a_missing_keys_file_fails_before_ray_starts(demo: Path) -> None:
    running = serve(demo / "checkpoint", "--api-keys-file", "/nowhere/keys")
    assert running.process.wait(HANGS_S) == 2
    running.wait_for("API keys file /nowhere/keys: No such file")
    assert "Starting Ray" not in running.output
