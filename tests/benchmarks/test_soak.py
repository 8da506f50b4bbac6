"""The judgements of the soak on made-up runs, and its users against a scripted server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from bench.tests.fake_server import FakeServer, Step, head, stream, whole
from benchmarks.soak.clients import Book, Kind, Outcome, Users, mixed
from benchmarks.soak.faults import Fault
from benchmarks.soak.judge import explained, flat, idle, loaded, logged, lost, reaped, recovered, slope, stopped
from benchmarks.soak.server import ROLES, Sample, Use
from quantserve_bench.request import Target

ENGINE = Fault("engine core killed", "fp16", at=1000.0, until=1040.0, victims=["r1"])
ONLY = Fault("worker killed", "awq", at=1000.0, until=1040.0, victims=["r3"], only=True)
GATEWAY = Fault("gateway killed", at=1000.0, until=1005.0)
PAUSED = Fault("replica paused", "fp16", loses=False, at=1000.0, until=1010.0)


def failed(began: float, ended: float, model: str = "fp16", status: int = 0) -> Outcome:
    return Outcome("a", "chat", model, began, ended, "failed", status)


@pytest.mark.parametrize(
    ("fault", "outcome", "replica", "yes"),
    [
        (ENGINE, failed(990, 1001), "r1", True),
        (ENGINE, failed(990, 1001), "r2", False),  # the other replica was not touched
        (ENGINE, failed(990, 1001), None, False),
        (ENGINE, failed(990, 999), "r1", False),  # over before the fault
        (ENGINE, failed(1010, 1011), "r1", False),  # the other replica should have got it
        (ENGINE, failed(990, 1001, "awq"), "r1", False),
        (ONLY, failed(1030, 1030.1, "awq", 503), None, True),
        (ONLY, failed(1050, 1050.1, "awq", 503), None, False),  # recovered by then
        (GATEWAY, failed(990, 1000.5), None, True),
        (GATEWAY, failed(1004, 1004.5), None, False),  # new connections wait in the backlog
        (PAUSED, failed(990, 1011), "r1", False),  # slow is not dead
        (ONLY, Outcome("a", "health", "", 1030, 1031, "failed", 503), None, True),
        (ONLY, Outcome("a", "health", "", 1050, 1051, "failed", 503), None, False),
        (PAUSED, Outcome("a", "health", "", 1005, 1006, "failed", 503), None, True),
    ],
)
def test_what_explains_a_failure(fault: Fault, outcome: Outcome, replica: str | None, yes: bool) -> None:
    assert explained(outcome, [fault], replica) is yes
    book = Book()
    book.add(outcome, quiet=False)
    judged = lost(book, [fault], {} if replica is None else {"a": replica})
    assert judged.sound is yes
    assert yes or f"{outcome.kind}, " in judged.detail


def answered(*ids: str, ended: float = 500.0) -> Book:
    book = Book()
    for one in ids:
        book.sent.add(one)
        book.add(Outcome(one, "chat", "fp16", ended - 1, ended, "answered", 200), quiet=False)
    return book


def line(one: str, **fields: Any) -> str:
    return json.dumps({"id": one, **fields})


def test_the_access_log_has_a_line_for_every_response() -> None:
    judged, replicas = logged(answered("a", "b"), [line("a", replica="r1"), line("b")], [])
    assert judged.sound
    assert replicas == {"a": "r1"}
    for lines in ([line("a")], [line("a"), line("b"), line("b")], [line("a"), line("b"), line("c")], [line("a"), "{"]):
        assert not logged(answered("a", "b"), lines, [])[0].sound
    assert logged(answered("a"), [line("a"), line("x", status=408)], [])[0].sound  # half a request
    # What a killed gateway had not written yet is lost, but no more than that.
    assert logged(answered("a", ended=999.5), [], [GATEWAY])[0].sound
    assert not logged(answered("a", ended=990.0), [], [GATEWAY])[0].sound
    # A polled path is logged only if it fails.
    book = Book(sent={"a"})
    book.add(Outcome("a", "health", "", 0, 1, "answered", 200), quiet=True)
    assert logged(book, [], [])[0].sound


def samples(values: Iterable[int], calm: bool = True) -> list[Sample]:
    def uses(value: int) -> dict[str, Use]:
        return {role: Use(value << 20, value << 20, value, value, value) for role in ROLES}

    return [Sample(60.0 * number, calm, uses(value)) for number, value in enumerate(values)]


@pytest.mark.parametrize("name", ["memory", "file descriptors", "threads", "processes"])
def test_growth(name: str) -> None:
    level = [200 + number % 3 for number in range(40)] if name != "processes" else [200] * 40
    warming = [10 * number for number in range(20)]
    assert all(one.sound for one in flat(samples([*warming, *level[:30]]), name))
    assert all(one.sound is False for one in flat(samples(range(100, 300, 5)), name))
    # Replicas that are missing during a fault are no shrinking, and those that come back no growth.
    mixed_samples = samples(level)
    for number in (21, 25, 30):
        mixed_samples[number] = replace(samples([5])[0], at=60.0 * number, calm=False)
    assert all(one.sound for one in flat(mixed_samples, name))
    assert all(one.sound is None for one in flat(samples([1, 2, 3]), name))


def test_single_outliers_have_no_effect_on_the_slope() -> None:
    points = [(float(x), 100.0) for x in range(20)]
    points[-1] = (19.0, 1000.0)
    assert slope(points) == 0
    assert slope([(0.0, 1.0), (10.0, 6.0)]) == 0.5


def test_the_other_judgements() -> None:
    once = [replace(one, zombies=[7] if number == 1 else []) for number, one in enumerate(samples([1, 1, 1]))]
    assert reaped(once).sound
    assert not reaped([replace(one, zombies=[7]) for one in samples([1, 1])]).sound
    assert recovered([ENGINE, GATEWAY]).sound
    assert not recovered([ENGINE, replace(ENGINE, until=0.0)]).sound
    assert not recovered([]).sound
    assert (idle(0.0).sound, idle(1.0).sound, idle(None).sound) == (True, False, False)
    assert loaded(answered("a"), ["chat"]).sound
    assert not loaded(answered("a"), ["chat", "none"]).sound
    assert stopped([]).sound
    assert not stopped(["process 7 is left over"]).sound


def send(kind: str, answer: list[Step], ok_id: bool = True) -> tuple[Book, FakeServer]:
    """One request of a kind, answered by a script in which {id} stands for the request id."""
    book = Book()

    def script(number: int, body: dict[str, Any]) -> Iterable[Step]:
        sent = server.exchanges[number].head.split("x-request-id: ")[1].split("\r\n")[0]
        return [step.replace(b"{id}", sent.encode()) if isinstance(step, bytes) else step for step in answer]

    with FakeServer(script) as server:
        target = Target(server.url, "", "a-key-of-the-server")
        (chosen,) = [one for one in mixed(target, ["m"]) if one.name == kind]

        async def once() -> None:
            users = Users(target, [chosen], book)
            await users._send(chosen, None)

        asyncio.run(once())
    return book, server


ID = "x-request-id: {id}"
REFUSED = {"error": {"message": "no", "code": "queue_full"}}


@pytest.mark.parametrize(
    ("kind", "steps", "result"),
    [
        ("chat, stream", [head(200, "text/event-stream", ID), *list(stream([(0.0, ["a"])]))[1:]], "answered"),
        ("chat, stream", [head(200, "text/event-stream", ID), *list(stream([(0.0, ["a"])]))[1:3], "close"], "failed"),
        ("chat, stream", [*stream([(0.0, ["a"])])], "failed"),  # without the request id
        ("leaves a stream", [head(200, "text/event-stream", ID), *list(stream([(0.0, ["a"])]))[1:]], "left"),
        ("chat", [whole(200, {"choices": []}, ID)], "answered"),
        ("chat", [whole(500, {"error": {"message": "no", "code": None}}, ID)], "failed"),
        ("chat", [whole(429, REFUSED, ID, "Retry-After: 1")], "refused"),
        ("chat", [whole(429, REFUSED, ID)], "failed"),  # without Retry-After
        ("unknown model", [whole(404, REFUSED, ID)], "answered"),
        ("unknown model", [whole(200, {}, ID)], "failed"),
        ("chat", ["reset"], "failed"),
    ],
)
def test_outcomes(kind: str, steps: list[Step], result: str) -> None:
    book, server = send(kind, steps)
    assert book.total(result) == 1, book
    assert len(server.exchanges) == 1
    assert (len(book.answered) == 1) is (result in ("answered", "refused"))


def test_kinds_have_names_of_their_own() -> None:
    kinds: list[Kind] = mixed(Target("http://127.0.0.1:1", "", "key-key-key"), ["a", "b"])
    assert len({(kind.name, kind.model) for kind in kinds}) == len(kinds)
