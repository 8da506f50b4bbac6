"""The front door as a process of its own, started and fed by `quantserve serve`.

`python -m quantserve.serve.gateway FD` inherits the listening socket as file descriptor FD. On standard input comes one
JSON object per line: first the settings (`models`, `token`, `policy`), then the replicas by model id whenever they
change; the end of input is the end of the server it belongs to, and ends this process. On standard output it names the
models that requests wait for and that have no replica (`wanted`) and those whose requests are taken (`reachable`), and
says whether all replicas are well and no request waits (`settled`): when that changes, and every second as a sign of
life.
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

import uvicorn
import uvloop

from quantserve.serve.directory import Directory
from quantserve.serve.limits import Policy
from quantserve.serve.served import public_app

KEEP_ALIVE_S: Final = 75
LOOK_S: Final = 0.1
TELL_S: Final = 1.0
LONGEST_LINE: Final = 64 << 20


async def serve(listener: socket.socket) -> None:
    """Serve until SIGTERM, which lets requests in progress finish, or until the end of input."""
    lines = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = json.loads(await lines.readline())
    policy = Policy.model_validate(settings["policy"])
    directory = Directory(settings["models"], settings["token"])
    app = public_app(settings["models"], directory, policy)
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings["drain_s"]),
    )
    server = uvicorn.Server(config)
    work = [asyncio.create_task(_listen(lines, directory, server)), asyncio.create_task(_tell(directory))]
    await server.serve(sockets=[listener])
    for task in work:
        task.cancel()


async def _listen(lines: asyncio.StreamReader, directory: Directory, server: uvicorn.Server) -> None:
    while line := await lines.readline():
        directory.update(json.loads(line))
    server.should_exit = server.force_exit = True


async def _tell(directory: Directory) -> None:
    told, when = "", 0.0
    while True:
        line = json.dumps({"wanted": directory.wanted, "reachable": directory.reachable, "settled": directory.settled})
        if line != told or time.monotonic() - when > TELL_S:
            print(line, flush=True)
            told, when = line, time.monotonic()
        await asyncio.sleep(LOOK_S)


def main(arguments: list[str]) -> None:
    """Run the gateway on an inherited listening socket."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the whole group; our parent decides what it means
    listener = socket.socket(fileno=int(arguments[0]))
    listener.setblocking(False)
    uvloop.run(serve(listener))


if __name__ == "__main__":
    main(sys.argv[1:])
