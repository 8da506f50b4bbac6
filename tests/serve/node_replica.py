"""A replica in a process of its own: ``python node_replica.py HOST``. It prints its port, then events of requests.

``/hold`` sends one piece and waits for the client to leave, ``/stream`` sends pieces until then; other paths send the
length of the body.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import uvloop
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import read_body
from quantserve.serve.transport.server import Listener


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    body = await read_body(receive)
    print("begun", scope["path"], flush=True)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/hold":
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await receive()
        print("cancelled", scope["path"], flush=True)
    elif scope["path"] == "/stream":
        leaving = asyncio.create_task(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"piece", "more_body": True})
            await asyncio.wait([leaving], timeout=0.02)
        print("cancelled", scope["path"], flush=True)
    else:
        await send({"type": "http.response.body", "body": b"%d" % len(body)})


async def main() -> None:
    listening = socket.create_server((sys.argv[1], 0))
    await Listener(app, "t0ken").start(listening)
    print(listening.getsockname()[1], flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    uvloop.run(main())
