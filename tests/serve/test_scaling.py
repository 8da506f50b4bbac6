"""Replicas come with the load and go without it; those there are share it; a model at zero wakes for a request."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .load import ASK, Asked, Clients
from .server import Server, gone, model, replicas, serve, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.alone, pytest.mark.timeout(400)]

QUICK = {
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 8,
    "look_back_period_s": 2,
    "metrics_interval_s": 0.5,
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One that no other run of pytest on this machine tidies up."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def elastic(demo: Path, folder: Path) -> Iterator[Server]:
    """A model with one or two replicas, and one with zero or one; the access log has the replica of each request."""
    one, zero = model("one", demo / "awq"), model("zero", demo / "checkpoint")
    one["deployment_config"] |= {"autoscaling_config": {**QUICK, "min_replicas": 1}, "affinity": "session"}
    zero["deployment_config"] |= {"autoscaling_config": {**QUICK, "min_replicas": 0, "max_replicas": 1}}
    app = {"http": {"access_log": str(folder / "log"), "queue_timeout_s": 240}, "models": [one, zero]}
    (folder / "app.yaml").write_text(yaml.safe_dump(app))
    running = serve(folder / "app.yaml")
    try:
        running.ready()
        running.log = folder / "log"  # type: ignore[attr-defined]
        yield running
    finally:
        running.stop()


def logged(server: Server, since: int = 0) -> list[dict[str, Any]]:
    """The records of requests for text, but for the first so many."""
    lines = server.log.read_text().splitlines()  # type: ignore[attr-defined]
    return [record for line in lines if (record := json.loads(line)).get("path") == "/v1/completions"][since:]


def test_a_model_at_zero_wakes_for_a_request_and_falls_asleep_again(elastic: Server) -> None:
    until(lambda: not replicas(elastic, "zero"))
    health = elastic.request("GET", "/health")
    assert (health.status_code, health.json()["models"]["zero"]) == (200, "ok")  # asleep is not ill
    kinds = [Asked("zero", True), Asked("zero", False)]
    with Clients(elastic, kinds) as load:
        load.wait(lambda: bool(load.outcomes), 240)
    assert {outcome.kind for outcome in load.outcomes} == {"ok"}, load.outcomes
    assert max(outcome.took for outcome in load.outcomes) > 3  # they waited for the engine to start
    awake = replicas(elastic, "zero")
    assert len(awake) == 1
    until(lambda: gone(awake), 90)
    until(lambda: elastic.request("GET", "/health").status_code == 200)


def test_one_replica_becomes_two_under_load_which_share_it_and_one_again(elastic: Server) -> None:
    assert len(replicas(elastic, "one")) == 1
    kinds = [Asked("one", stream=bool(index % 2), fields={"max_tokens": 100}) for index in range(8)]
    with Clients(elastic, kinds) as load:
        load.wait(lambda: len({record["replica"] for record in logged(elastic)[-8:] if "replica" in record}) == 2, 200)
        time.sleep(2)
        before = len(logged(elastic))
        load.wait(load.served("one", time.monotonic(), 60))
        shared = Counter(record["replica"] for record in logged(elastic, before))
    assert {outcome.kind for outcome in load.outcomes} == {"ok"}
    assert len(shared) == 2
    # The one with fewer requests in progress gets the next, so an engine that others keep from its core gets fewer.
    assert min(shared.values()) > 0.2 * sum(shared.values()), shared

    # A session stays where it is while the load allows, and different ones are on both replicas.
    where: dict[str, set[str]] = {}
    for turn in range(3):
        for name in (f"session-{number}" for number in range(10)):
            headers = {"x-session-id": name, "x-request-id": f"{name}-{turn}"}
            body = {"model": "one", **ASK, "max_tokens": 2}
            assert elastic.request("POST", "/v1/completions", body, headers=headers).status_code == 200
    until(lambda: any(record["id"] == "session-9-2" for record in logged(elastic)))
    for record in logged(elastic):
        if record["id"].startswith("session-"):
            where.setdefault(record["id"].rpartition("-")[0], set()).add(record["replica"])
    assert [len(places) for places in where.values()] == [1] * 10
    assert len(set.union(*where.values())) == 2

    with Clients(elastic, [Asked("one", True), Asked("one")], pause_s=0.1) as load:
        until(lambda: len(replicas(elastic, "one")) == 1, 90)
        load.wait(load.served("one", time.monotonic()))
    assert {outcome.kind for outcome in load.outcomes} == {"ok"}  # scaling down affects no request
