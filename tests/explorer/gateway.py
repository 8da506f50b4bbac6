"""The gateway with prepared replicas, served to a browser from a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from quantserve.config import ExplorerConfig, HttpConfig
from quantserve.planning.plan import Plan
from quantserve.serve.gateway.app import describe_models, installed_page, public_app
from quantserve.serve.gateway.http.server import HttpServer
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.upstreams.directory import Directory
from quantserve.serve.transport.server import Listener

from .models import FakeModel

TOKEN = "t0ken"


class Served:
    """A gateway and its replicas. Its methods may be called from any thread.

    Attributes:
        base: address of the gateway.
        models: the replica of each model.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, base: str, models: Mapping[str, FakeModel]) -> None:
        self.base, self.models = base, models
        self._loop = loop
        self._listeners: dict[str, Listener] = {}
        self.directory: Directory

    async def _start(self, name: str) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        listener = self._listeners[name] = Listener(self.models[name], TOKEN)
        await listener.start(listening)
        port = listening.getsockname()[1]
        self.directory.update({name: [{"id": f"{name}#r{port}", "host": "127.0.0.1", "port": port}]})

    def kill(self, name: str) -> None:
        """End a model's replica, and let the gateway know."""

        def end() -> None:
            self._listeners.pop(name).close()
            self.directory.update({name: []})

        self._call(end)

    def revive(self, name: str) -> None:
        """Start a new replica."""
        asyncio.run_coroutine_threadsafe(self._start(name), self._loop).result(30)

    def _call(self, work: Callable[[], None]) -> None:
        async def run() -> None:
            work()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)


@contextlib.contextmanager
def served(
    plans: Mapping[str, Plan],
    models: Mapping[str, FakeModel],
    *,
    http: HttpConfig | None = None,
    explorer: ExplorerConfig | None = None,
    limits: Mapping[str, Any] | None = None,
) -> Iterator[Served]:
    """Serve models behind the gateway of `quantserve serve`, with the installed page.

    Args:
        plans: of the models, by id.
        models: their replicas; at least one.
        limits: replace the limits of all models.
    """
    policy = Policy.of(http or HttpConfig(access_log="off"))
    described = describe_models([plans[name] for name in models], 1_790_000_000, policy)
    described = [{**one, "limits": {**one["limits"], **(limits or {})}} for one in described]
    page = installed_page((explorer or ExplorerConfig()).model_dump(mode="json"), policy, described)
    listening = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    gateway = Served(loop, f"http://127.0.0.1:{listening.getsockname()[1]}", models)
    servers: list[HttpServer] = []

    async def serve() -> None:
        gateway.directory = Directory(described, TOKEN)
        for name in models:
            await gateway._start(name)
        servers.append(HttpServer(public_app(described, gateway.directory, policy, page), policy))
        servers[0].config.timeout_graceful_shutdown = 1
        started.set()
        await servers[0].serve(sockets=[listening])
        for listener in gateway._listeners.values():
            listener.close()

    started = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        assert started.wait(60)
        yield gateway
    finally:
        loop.call_soon_threadsafe(setattr, servers[0], "should_exit", True)
        thread.join(30)
        loop.close()
