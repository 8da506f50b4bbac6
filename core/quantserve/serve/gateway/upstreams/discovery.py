"""Service discovery: polls Ray Serve for the replicas of every model, each model by itself."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeGuard

POLL_S: Final = 1.0
"""Poll interval while replicas come and go. A rolling update stops an old replica 2 s after the new one is ready,
and the new one must be discovered before that.
"""
HURRY_S: Final = 0.2
"""Shortest poll interval, while a model that should have a replica has none."""
BACKOFF: Final = 0.01
"""Poll interval of a model without a replica, as a part of the time since it had one, within `HURRY_S` and `CALM_S`."""
CALM_S: Final = 5.0
"""Poll interval while all replicas are healthy: each poll costs the engines time."""
ANSWER_S: Final = 2.0
"""Timeout of one poll of one model. A slow replica is not removed for it, but delays the discovery of others by it."""
MISSES: Final = 3
"""Consecutive polls without a replica in Ray Serve's list until it counts as removed."""
LOG_S: Final = 60.0
"""Shortest time between two log lines about one model."""

logger = logging.getLogger(__name__)

Addresses = Mapping[str, Sequence[Mapping[str, Any]]]


class ReplicaSink(Protocol):
    """What `poll_replicas` updates: a `Directory`, or the gateway process that holds one."""

    def update(self, addresses: Addresses) -> None:
        """Set the replicas of each model in `addresses`; see `Pool.update`."""

    @property
    def wanted(self) -> Sequence[str]:
        """Models with queued requests and no replica that accepts requests."""

    @property
    def reachable(self) -> Sequence[str]:
        """Models whose requests are accepted."""

    @property
    def settled(self) -> bool:
        """Whether all replicas are healthy and no request is queued."""

    @property
    def waiting(self) -> Mapping[str, int]:
        """Number of queued requests by model id."""


class Roster:
    """The replicas of one model, from the results of consecutive polls.

    An error among the results does not say whose it is. A replica is removed when its actor is dead, or when Ray Serve
    has not listed it `MISSES` times in succession; one that is slow or raises is listed, and stays.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._actors: dict[str, str] = {}
        self._misses: dict[str, int] = {}

    @property
    def unsure(self) -> bool:
        """Whether a replica did not answer the last poll."""
        return bool(self._misses)

    def update(self, results: Sequence[object]) -> list[dict[str, Any]]:
        """The replicas after a poll, as for `Pool.update`, once also those that died.

        Args:
            results: what `ModelServer.describe` of each listed replica returned or raised.
        """
        answers = {str(result["id"]): result for result in results if _is_answer(result)}
        dead = {actor for result in results if (actor := _dead_actor(result))}
        died = [{**one, "state": "dead"} for name, one in self._known.items() if self._actors[name] in dead]
        silent = [name for name in self._known if name not in answers and self._actors[name] not in dead]
        errors = sum(not _is_answer(result) and not _dead_actor(result) for result in results)
        missed = errors < len(silent)  # otherwise all of them may be listed
        self._misses = {name: self._misses.get(name, 0) + 1 if missed else 0 for name in silent}
        self._misses = {name: misses for name, misses in self._misses.items() if misses < MISSES}
        known = {name: self._known[name] for name in self._misses}
        for one in known.values():
            one["state"] = "unknown" if one["state"] == "ready" else one["state"]
        for name, answer in answers.items():
            self._actors[name] = str(answer.get("actor", ""))
            known[name] = {
                "id": name,
                "host": answer["host"],
                "port": answer["port"],
                "cpus": answer.get("cpus", []),
                "state": "draining" if answer.get("draining") else "ready",
            }
        self._known = known
        self._actors = {name: self._actors[name] for name in known}
        return [*(dict(one) for one in known.values()), *died]


def _is_answer(result: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether it can be used: an invalid address, maybe of another version, would end the gateway."""
    if not (isinstance(result, Mapping) and isinstance(result.get("id"), str) and isinstance(result.get("host"), str)):
        return False
    port, cpus = result.get("port"), result.get("cpus", [])
    return isinstance(port, int) and 0 < port < 1 << 16 and isinstance(cpus, list) and all(map(_is_number, cpus))


def _is_number(value: object) -> bool:
    return isinstance(value, int)


def _dead_actor(result: object) -> str:
    """The id of the dead actor that an error is about; empty for other results."""
    from ray.exceptions import ActorDiedError

    return str(result.actor_id or "") if isinstance(result, ActorDiedError) else ""


async def poll_replicas(sink: ReplicaSink, handles: Mapping[str, Any], calm_s: float = CALM_S) -> None:
    """Poll Ray Serve for replicas and update the sink, without end: an error is logged, and polling goes on.

    Args:
        sink: gets the replicas.
        handles: Ray Serve handles of the deployments, by model id.
        calm_s: poll interval in seconds while all replicas are healthy and no request is queued.
    """
    gateway = uuid.uuid4().hex
    with ThreadPoolExecutor(max(1, len(handles)), "discovery") as threads:
        await asyncio.gather(
            *(_Model(name, handle, sink, gateway, threads, calm_s).poll() for name, handle in handles.items())
        )


class _Model:
    """Polls one model. Each has its own thread, because a poll may hang."""

    def __init__(
        self, name: str, handle: Any, sink: ReplicaSink, gateway: str, threads: ThreadPoolExecutor, calm_s: float
    ) -> None:
        self._name = name
        self._handle = handle
        self._sink = sink
        self._gateway = gateway
        self._threads = threads
        self._calm_s = calm_s
        self._roster = Roster()
        self._waking: asyncio.Future[None] | None = None
        self._without_since: float | None = None
        self._logged = -math.inf
        self._time = asyncio.get_running_loop().time

    async def poll(self) -> None:
        polled = -math.inf
        while True:
            try:
                if self._time() - polled >= self._interval():
                    try:
                        await self._look_up()
                    finally:
                        polled = self._time()
                if self._name in self._sink.wanted and (self._waking is None or self._waking.done()):
                    self._waking = asyncio.ensure_future(self._ask())
            except Exception as error:
                self._log("polling its replicas failed, and is tried again", error)
            await asyncio.sleep(HURRY_S)

    async def _look_up(self) -> None:
        results = await asyncio.get_running_loop().run_in_executor(
            self._threads, list_replicas, self._handle, self._gateway, self._sink.waiting.get(self._name, 0)
        )
        if results is not None:
            self._sink.update({self._name: self._roster.update(results)})

    async def _ask(self) -> None:
        """Make Serve start a replica of a model scaled to zero, by a pending request."""
        try:
            await self._handle.describe.remote()
        except Exception as error:
            self._log("scaling up from zero failed, and is tried again", error)
        await asyncio.sleep(POLL_S)

    def _interval(self) -> float:
        """Seconds between two polls; longer and longer while the model has no replica, which may be for ever."""
        wanted = self._name in self._sink.wanted
        if wanted or self._name not in self._sink.reachable:
            if self._without_since is None:
                self._without_since = self._time()
            longest = POLL_S if wanted else self._calm_s
            return min(longest, max(HURRY_S, BACKOFF * (self._time() - self._without_since)))
        self._without_since = None
        return self._calm_s if self._sink.settled and not self._roster.unsure else POLL_S

    def _log(self, text: str, error: Exception) -> None:
        if self._time() - self._logged >= LOG_S:
            self._logged = self._time()
            logger.warning("model %s: %s: %s: %s", self._name, text, type(error).__name__, str(error)[:200])


def list_replicas(handle: Any, gateway: str, waiting: int) -> list[object] | None:
    """What `ModelServer.describe` of each replica in Ray Serve's list returned or raised; None when that is unknown.

    Args:
        gateway: id of the asking gateway.
        waiting: number of requests in its queue, for autoscaling.
    """
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        return list(handle.broadcast("describe", gateway, waiting).results(timeout_s=ANSWER_S, return_exceptions=True))
    except DeploymentUnavailableError:  # the list is empty
        return []
    except TimeoutError:
        return None
