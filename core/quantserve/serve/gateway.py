"""The gateway process, started and controlled by `quantserve serve`.

`python -m quantserve.serve.gateway FD` inherits the listening socket as file descriptor FD.

Standard input has one JSON object per line: first the settings (`models`, `token`, `policy`, `drain_s`), then the
replicas by model id whenever they change. End of file means that the parent has ended, and ends this process.

Standard output has the status, one JSON object per line, at every change and every second as a heartbeat: `wanted`, the
models with queued requests and no replica; `reachable`, the models whose requests are accepted; `settled`, whether all
replicas are healthy and no request is queued; `waiting`, the number of queued requests by model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from typing import Final

import uvloop

from quantserve.serve.directory import Directory
from quantserve.serve.http_server import HttpServer
from quantserve.serve.limits import Policy
from quantserve.serve.served import public_app, timing_of
from quantserve.text import LogFormatter

STATUS_POLL_S: Final = 0.1
HEARTBEAT_S: Final = 1.0
LONGEST_LINE: Final = 64 << 20


async def serve(listener: socket.socket) -> None:
    """Serve until SIGTERM, which drains requests in progress, or until standard input ends."""
    lines = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = json.loads(await lines.readline())
    policy = Policy.model_validate(settings["policy"])
    directory = Directory(settings["models"], settings["token"], timing_of(policy))
    app = public_app(settings["models"], directory, policy)
    server = HttpServer(app, policy)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, setattr, server, "should_exit", True)
    work = [asyncio.create_task(_listen(lines, directory, server)), asyncio.create_task(_report(directory))]
    await server.serve(sockets=[listener])
    for task in work:
        task.cancel()


async def _listen(lines: asyncio.StreamReader, directory: Directory, server: HttpServer) -> None:
    while line := await lines.readline():
        directory.update(json.loads(line))
    server.should_exit = server.force_exit = True


async def _report(directory: Directory) -> None:
    last, when = "", 0.0
    while True:
        line = json.dumps(directory.status)
        if line != last or time.monotonic() - when > HEARTBEAT_S:
            print(line, flush=True)
            last, when = line, time.monotonic()
        await asyncio.sleep(STATUS_POLL_S)


def main(arguments: list[str]) -> None:
    """Run the gateway on an inherited listening socket."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group; the parent handles it
    listener = socket.socket(fileno=int(arguments[0]))
    listener.setblocking(False)
    uvloop.run(serve(listener))


if __name__ == "__main__":
    main(sys.argv[1:])
