"""Where the replicas of every model are, as Ray Serve knows them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from quantserve.serve.replicas import Limits, Pool

POLL_S: Final = 1.0
"""How often one looks where replicas come and go. A rolling update stops an old replica 2 s after the new one is ready,
and by then the new one must be known.
"""
HURRY_S: Final = 0.2
"""How often one looks while a model has no replica although it should."""
ANSWER_S: Final = 5.0

logger = logging.getLogger(__name__)


class Directory:
    """The pools of all models.

    Args:
        models: each with its ``card`` and ``limits``.
        token: sent to replicas with every request.
    """

    def __init__(self, models: Sequence[Mapping[str, Any]], token: str) -> None:
        self.pools = {
            str(model["card"]["id"]): Pool(str(model["card"]["id"]), Limits(**model["limits"]), token)
            for model in models
        }

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Take in the replicas by model id; models that are not named keep what they have."""
        for model_id, replicas in addresses.items():
            if (pool := self.pools.get(model_id)) is not None:
                pool.update(replicas)

    @property
    def wanted(self) -> list[str]:
        """Models that requests wait for and that have no replica."""
        return [model_id for model_id, pool in self.pools.items() if pool.wanted]

    @property
    def reachable(self) -> list[str]:
        """Models whose requests are taken: they have a replica, or are scaled to zero and get one when asked."""
        return [model_id for model_id, pool in self.pools.items() if pool.reachable]

    @property
    def settled(self) -> bool:
        """Whether no replica is about to come or to go, for all that can be seen from here."""
        return all(pool.settled for pool in self.pools.values())


class Book(Protocol):
    """What `follow` keeps in step: a `Directory`, or the gateway that has one."""

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Take in the replicas by model id."""

    @property
    def wanted(self) -> list[str]:
        """Models that requests wait for and that have no replica."""

    @property
    def reachable(self) -> list[str]:
        """Models whose requests are taken."""

    @property
    def settled(self) -> bool:
        """Whether no replica is about to come or to go."""


async def follow(book: Book, handles: Mapping[str, Any], calm_s: float = POLL_S) -> None:
    """Keep the book in step with Ray Serve, for ever.

    Args:
        book: what is kept.
        handles: of the deployments, by model id.
        calm_s: seconds between two looks while all replicas are well and no request waits.
    """
    waking: dict[str, asyncio.Future[Any]] = {}
    looked = -math.inf
    while True:
        hurry = book.wanted or len(book.reachable) < len(handles)
        pause = HURRY_S if hurry else calm_s if book.settled else POLL_S
        if time.monotonic() - looked >= pause:
            book.update(await look_up(handles))
            looked = time.monotonic()
        for model_id in book.wanted:
            wake(model_id, handles, waking)
        await asyncio.sleep(HURRY_S)


async def look_up(handles: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The replicas by model id, of all models that can be asked."""
    found = await asyncio.gather(*(replicas_of(handle) for handle in handles.values()))
    return {name: there for name, there in zip(handles, found, strict=True) if there is not None}


async def replicas_of(handle: Any) -> list[dict[str, Any]] | None:
    """Addresses of a deployment's running replicas; None when that cannot be said now."""
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        answers = await asyncio.to_thread(
            lambda: handle.broadcast("describe").results(timeout_s=ANSWER_S, return_exceptions=True)
        )
    except DeploymentUnavailableError:  # there is none
        return []
    except Exception as error:
        logger.debug("no answer from the replicas: %s", type(error).__name__)
        return None
    return [answer for answer in answers if isinstance(answer, dict)]


def wake(model_id: str, handles: Mapping[str, Any], waking: dict[str, asyncio.Future[Any]]) -> None:
    """Ask Serve for a replica of a model that was scaled to zero, once at a time: a request that waits is one."""
    if (pending := waking.get(model_id)) is None or pending.done():
        waking[model_id] = asyncio.ensure_future(_ask(handles[model_id]))


async def _ask(handle: Any) -> None:
    try:
        await handle.describe.remote()
    except Exception as error:
        logger.warning("no replica could be started: %s", type(error).__name__)
