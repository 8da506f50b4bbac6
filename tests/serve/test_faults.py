"""Processes that die or hang under load: they come back, the other model does not notice, clients get an answer."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .load import Asked, Clients
from .server import Server, engines, gateway, gone, metric, model, replicas, serve, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.alone, pytest.mark.timeout(400)]

LONG = {"max_tokens": 400}
"""An answer that takes a second or two, so that a fault finds some in the middle."""
KINDS = [
    Asked("victim", True, LONG),
    Asked("victim", True, LONG),
    Asked("victim", False, LONG),
    Asked("other", True),
    Asked("other"),
]


@pytest.fixture(scope="module")
def pair(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models; the health of one is judged with little patience."""
    victim = model("victim", demo / "awq")
    victim["deployment_config"] |= {"health_check_timeout_s": 3, "health_check_period_s": 2}
    path = tmp_path_factory.mktemp("faults") / "app.yaml"
    path.write_text(yaml.safe_dump({"models": [victim, model("other", demo / "checkpoint")]}))
    running = serve(path)
    try:
        yield running.ready()
    finally:
        running.stop()


def health(server: Server) -> tuple[int, dict[str, str]]:
    answer = server.request("GET", "/health")
    return answer.status_code, answer.json()["models"]


@pytest.mark.parametrize("fault", ["engine killed", "replica killed", "engine hangs"])
def test_a_lost_replica_is_replaced(pair: Server, fault: str) -> None:
    replica, (core, *workers) = replicas(pair, "victim")[0], engines(pair, "victim")
    with Clients(pair, KINDS) as load:
        load.wait(lambda: load.served("victim", 0)() and load.served("other", 0)())
        assert health(pair) == (200, {"victim": "ok", "other": "ok"})
        load.wait(lambda: load.streaming("victim"))
        hit = time.monotonic()
        target = replica if fault == "replica killed" else core
        target.send_signal(signal.SIGSTOP if fault == "engine hangs" else signal.SIGKILL)
        until(lambda: health(pair) == (503, {"victim": "unavailable", "other": "ok"}))
        load.wait(lambda: any(outcome.kind == "refused" for outcome in load.of("victim", hit)))
        down = time.monotonic()
        load.wait(load.served("victim", down), 180)
        until(lambda: health(pair)[0] == 200)
        until(lambda: gone([replica, core, *workers]))

    others = load.of("other")
    assert {outcome.kind for outcome in others} == {"ok"}
    assert len([outcome for outcome in others if outcome.began > hit]) > 5
    victims = load.of("victim")
    assert {outcome.kind for outcome in victims} <= {"ok", "refused", "event"}, victims
    for outcome in victims:
        assert outcome.took < 60
        assert "Traceback" not in outcome.body
        if outcome.kind != "ok":
            error = outcome.error
            assert error["type"] == "service_unavailable_error", outcome
            assert "Engine" not in error["message"]
        if outcome.kind == "refused":
            assert outcome.status == 503
            assert outcome.headers["retry-after"]
    # A stream of which a part was sent ends with an error event.
    broken = [outcome for outcome in victims if outcome.began < hit < outcome.ended]
    begun = [outcome for outcome in broken if outcome.asked.stream and outcome.began + outcome.first_s < hit]
    assert {outcome.kind for outcome in begun} == {"event"}
    assert {outcome.kind for outcome in broken if not outcome.asked.stream} <= {"refused", "ok"}


def test_a_killed_gateway_is_replaced(pair: Server) -> None:
    process = gateway(pair)
    with Clients(pair, KINDS) as load:
        load.wait(lambda: load.served("victim", 0)() and load.served("other", 0)())
        hit = time.monotonic()
        process.kill()
        process.wait(120)
        died = time.monotonic()
        load.wait(lambda: load.served("victim", died)() and load.served("other", died)())
    pair.wait_for(r"Gateway process was killed \(signal 9\); restarting it\.")
    later = [outcome for outcome in load.outcomes if outcome.began > died]
    assert {outcome.kind for outcome in later} == {"ok"}, later
    before = [outcome for outcome in load.outcomes if outcome.ended < hit]
    assert {outcome.kind for outcome in before} == {"ok"}
    assert gateway(pair).pid != process.pid
    # Nobody reads the answers that the first gateway had asked for.
    until(lambda: metric(pair, "victim", "vllm:num_requests_running") == 0)
    assert health(pair)[0] == 200
