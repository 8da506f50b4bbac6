"""Overload by ten times more clients than slots: accepted requests are served normally, others are refused at once."""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from .load import ASK, Asked, Clients
from .server import Server, gateway, metric, model, serve, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.alone, pytest.mark.timeout(300)]

PLACES = 4
QUEUE = 4
CLIENTS = 10 * PLACES
SECONDS = 10.0
LONG = 490
"""Tokens of an answer that takes long enough to be left in the middle."""


@pytest.fixture(scope="module")
def small(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model for four requests at a time, with a queue for four more."""
    narrow = model("narrow", demo / "awq", engine_kwargs={"max_num_seqs": PLACES})
    narrow["deployment_config"] = {"max_ongoing_requests": PLACES, "max_queued_requests": QUEUE}
    path = tmp_path_factory.mktemp("overload") / "app.yaml"
    path.write_text(yaml.safe_dump({"models": [narrow]}))
    running = serve(path)
    try:
        yield running.ready()
    finally:
        running.stop()


def kinds(count: int) -> list[Asked]:
    return [Asked("narrow", stream=bool(index % 2)) for index in range(count)]


def load(server: Server, name: str) -> float:
    return metric(server, "narrow", f"vllm:num_requests_{name}")


def tokens(server: Server, kind: str) -> float:
    return metric(server, "narrow", f"vllm:{kind}_tokens_total")


def in_progress(server: Server) -> float:
    """Requests that hold a slot."""
    return metric(server, "", "quantserve_requests_in_progress")


def waiting(server: Server) -> float:
    """Requests in the gateway's queue."""
    return metric(server, "", "quantserve_queue_length")


def test_overload_is_refused_and_the_accepted_keep_their_latency(small: Server) -> None:
    process = gateway(small)
    memory, inside, held, queued = [], [], [], []
    began = time.monotonic()
    with Clients(small, kinds(CLIENTS)) as crowd:
        while time.monotonic() - began < SECONDS:
            time.sleep(0.5)
            memory.append(process.memory_info().rss)
            inside.append(load(small, "running") + load(small, "waiting"))
            held.append(in_progress(small))
            queued.append(waiting(small))
    accepted = [outcome for outcome in crowd.outcomes if outcome.kind == "ok"]
    refused = [outcome for outcome in crowd.outcomes if outcome.kind == "refused"]
    assert len(accepted) + len(refused) == len(crowd.outcomes)
    assert len(accepted) > 2 * PLACES
    assert len(refused) > CLIENTS
    for outcome in refused:
        assert (outcome.status, outcome.error["code"]) == (429, "queue_full")
        assert outcome.error["type"] == "rate_limit_error"
        assert 1 <= int(outcome.headers["retry-after"]) <= 60
    # An accepted request waits for at most one other, in the gateway; no request queues in the engine.
    assert max(inside) <= PLACES
    assert max(queued) <= QUEUE
    # The crowd leaves no slot unused.
    assert statistics.median(held) >= PLACES - 1
    assert statistics.median(outcome.took for outcome in refused) < statistics.median(one.took for one in accepted)
    assert memory[-1] - memory[len(memory) // 4] < 16 << 20


def ask(server: Server, stream: bool) -> socket.socket:
    """Send a request for a long answer; closing the socket disconnects the client."""
    body = json.dumps({"model": "narrow", **ASK, "max_tokens": LONG, "stream": stream}).encode()
    url = httpx.URL(server.base)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {url.host}\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection((url.host, url.port or 80), timeout=30)
    connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    return connection


def test_disconnected_clients_free_their_slots_and_queue_entries(small: Server) -> None:
    until(lambda: load(small, "running") == 0)
    usage = small.request("POST", "/v1/completions", {"model": "narrow", **ASK}).json()["usage"]
    written, read = tokens(small, "generation"), tokens(small, "prompt")
    served = [ask(small, stream=bool(index % 2)) for index in range(PLACES)]
    until(lambda: in_progress(small) == PLACES)
    queued = [ask(small, stream=bool(index % 2)) for index in range(QUEUE)]
    until(lambda: waiting(small) == QUEUE)
    for connection in queued:
        connection.close()
    until(lambda: waiting(small) == 0)
    for connection in served:
        connection.close()
    until(lambda: load(small, "running") == 0)
    until(lambda: metric(small, "narrow", "vllm:kv_cache_usage_perc") == 0)
    # They were stopped and did not finish; those in the queue never came to the engine.
    assert tokens(small, "generation") - written < 0.9 * PLACES * LONG
    assert tokens(small, "prompt") - read == PLACES * usage["prompt_tokens"]
    answers = [small.request("POST", "/v1/completions", {"model": "narrow", **ASK}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
