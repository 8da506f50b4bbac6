"""An ASGI request through a Ray Serve handle: the client's half and the replica's half.

The handle brings Serve's choice of replica, queue limits and autoscaling; bytes pass through as they are. What has
piled up while the other side was busy travels together, and nothing ever waits for more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.serve.asgi import Refused, internal_error, read_body, request_scope, wait_for_disconnect

DROPPED: Final = frozenset({b"authorization", b"connection", b"keep-alive", b"te", b"trailer", b"upgrade",
                            b"proxy-authorization", b"transfer-encoding"})  # fmt: skip
"""Request headers that end at the front door: those of one connection, and the client's key."""

LATE_S: Final = 2.0
"""After this long without a sign of an answer it is worth asking whether anybody is there to give one."""
STATUS_AGE_S: Final = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers; the first thing a replica sends. Then come bytes."""


async def answer(app: ASGIApp, request: Request) -> AsyncIterator[Head | bytes]:
    """Run one request through `app`, in the replica: yields the head, then the body as it comes.

    When the consumer goes away the generator is closed, which cancels the request in the engine.
    """
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        queue.put_nowait(message)

    scope = request_scope(request.method, request.path, request.headers, request.query)
    task: asyncio.Task[None] = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while True:
            message = await queue.get()
            body: list[bytes] = []
            while message is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], list(message["headers"])
                elif chunk := message.get("body"):
                    body.append(chunk)
                if queue.empty():
                    break
                message = queue.get_nowait()
            if body:
                yield b"".join(body)
            if message is None:
                break
        await task
    finally:
        gone.set()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Replicas:
    """Whether a deployment can answer at all; asked only when an answer is late, and at most once a second."""

    def __init__(self, application: str, deployment: str) -> None:
        self._application = application
        self._deployment = deployment
        self._asked = 0.0
        self._none = False

    async def none_can_come(self) -> bool:
        """Whether no replica runs and none is kept away merely by scaling to zero."""
        if time.monotonic() - self._asked > STATUS_AGE_S:
            self._asked = time.monotonic()
            try:
                applications = (await asyncio.to_thread(serve.status)).applications
            except Exception as error:
                logger.warning("Ray Serve's controller does not answer: %s", type(error).__name__)
                return self._none
            application = applications.get(self._application)
            deployment = application.deployments.get(self._deployment) if application else None
            running = deployment.replica_states.get("RUNNING", 0) if deployment else 0
            self._none = running == 0 and (application is None or application.status != "RUNNING")
        return self._none


class RemoteModel:
    """ASGI app that answers from a replica of a model's deployment.

    Args:
        model_id: for messages.
        handle: of the deployment whose method ``relay`` runs `answer`.
    """

    def __init__(self, model_id: str, handle: DeploymentHandle[Any]) -> None:
        self.model_id = model_id
        self._handle = handle.options(stream=True, method_name="relay")
        self._replicas = Replicas(handle.app_name, handle.deployment_name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one HTTP request; a client that leaves cancels it in the replica.

        Raises:
            Refused: the model cannot be reached, or its queue is full.
        """
        request = Request(
            method=scope["method"],
            path=scope["path"],
            query=scope.get("query_string", b""),
            headers=[(bytes(key), bytes(value)) for key, value in scope["headers"] if key not in DROPPED],
            body=await read_body(receive),
        )
        forwarding = asyncio.create_task(self._forward(request, send))
        leaving = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait((forwarding, leaving), return_when=asyncio.FIRST_COMPLETED)
            if forwarding.done():
                await forwarding
        finally:
            leaving.cancel()
            if not forwarding.done():
                forwarding.cancel()
            await asyncio.gather(forwarding, leaving, return_exceptions=True)

    async def _forward(self, request: Request, send: Send) -> None:
        """Send what a replica answers. A replica that died before it said anything gets one successor."""
        for attempt in (1, 2):
            stream = self._handle.remote(request)
            streaming = False
            content_type = b""
            try:
                async for part in self._while_possible(stream):
                    if isinstance(part, bytes):
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                    else:
                        status, headers = part
                        content_type = next((value for key, value in headers if key == b"content-type"), b"")
                        await send({"type": "http.response.start", "status": status, "headers": headers})
                        streaming = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except (BackPressureError, DeploymentUnavailableError, RayError) as error:
                logger.warning("model %s: %s", self.model_id, type(error).__name__)
                if not streaming:
                    if isinstance(error, RayActorError) and attempt == 1:
                        continue
                    raise self._refusal(error) from None
                if not content_type.startswith(b"text/event-stream"):
                    raise
                # The status is gone; an event is the one place left to say what happened.
                event = b"data: " + bytes(internal_error(503).response.body) + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})
                return

    async def _while_possible(self, stream: Any) -> AsyncIterator[Head | bytes]:
        """The parts of an answer; gives up on the first when nobody is there to send it.

        Raises:
            Refused: the model has no replica.
        """
        parts = aiter(stream)
        first = asyncio.ensure_future(anext(parts))
        try:
            while not (await asyncio.wait({first}, timeout=LATE_S))[0]:
                if await self._replicas.none_can_come():
                    raise self._unavailable()
            yield first.result()
        except StopAsyncIteration:
            return
        finally:
            if not first.done():
                first.cancel()
                stream.cancel()
        async for part in parts:
            yield part

    def _unavailable(self) -> Refused:
        message = f"the model `{self.model_id}` is not available at the moment; try again"
        return Refused(503, message, code="model_unavailable", headers={"retry-after": "5"})

    def _refusal(self, error: Exception) -> Refused:
        if isinstance(error, BackPressureError):
            retry = str(max(1, round(error.retry_after_s or 1)))
            message = f"the model `{self.model_id}` has its queue full; try again in {retry} s"
            return Refused(429, message, code="queue_full", headers={"retry-after": retry})
        if isinstance(error, RayActorError | DeploymentUnavailableError):
            return self._unavailable()
        return internal_error(500)
