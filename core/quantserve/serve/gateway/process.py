"""The gateway process, started and controlled by `quantserve serve`.

`python -m quantserve.serve.gateway.process FD` inherits the listening socket as file descriptor FD.

Standard input has one JSON object per line: first the settings (`models`, `token`, `policy`, and maybe `explorer`, the
config of the page at ``/``, and `parent`), then
`{"replicas": ...}` by model id whenever they change, and `{"drain": true}` at shutdown.

Standard output has the status, one JSON object per line, at every change and every second as a heartbeat: `wanted`, the
models with queued requests and no replica; `reachable`, the models whose requests are accepted; `settled`, whether all
replicas are healthy and no request is queued; `waiting`, the number of queued requests by model; `page`, whether there
is a page at ``/``.

SIGTERM, SIGINT and SIGHUP drain it as well, unless they are blocked or ignored; `quantserve serve` blocks them.

The process ends when it has drained; and at once when its parent has ended or control fails, that is at the end of
standard input, at an invalid line or when standard output is closed. Requests in progress then get an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import stat
import sys
import time
from typing import Any, Final, cast

import uvloop

from quantserve.serve.gateway.app import installed_page, public_app, timing_of
from quantserve.serve.gateway.http.server import HttpServer
from quantserve.serve.gateway.middleware.access_log import AccessLog
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.upstreams.directory import Directory
from quantserve.serve.signals import STOP
from quantserve.text import LogFormatter

STATUS_POLL_S: Final = 0.1
HEARTBEAT_S: Final = 1.0
LONGEST_LINE: Final = 64 << 20
LAST_WORDS_S: Final = 1.0
"""Time to send the errors of the requests that the drain timeout has ended."""
GC_THRESHOLDS: Final = (10_000, 10, 10)
"""Young objects are collected by 10,000 and by 100,000, which takes 1 and 20 ms; all objects since the start after
1,000,000 more, if a quarter is new (0.3 us each). Python's 700 causes 7500 collections while 15 MiB of small values
are parsed, these thresholds 500.
"""

logger = logging.getLogger(__name__)


class Gateway:
    """The app of the gateway and its server.

    Args:
        settings: the first line of standard input.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._parent = int(settings.get("parent") or os.getppid())
        self._policy = Policy.model_validate(settings["policy"])
        self._directory = Directory(settings["models"], settings["token"], timing_of(self._policy))
        self._page = installed_page(settings.get("explorer"), self._policy, settings["models"])
        self._app = public_app(settings["models"], self._directory, self._policy, self._page)
        self._server = HttpServer(self._app, self._policy)
        self._server.config.timeout_graceful_shutdown = cast(int, self._policy.drain_timeout_s + LAST_WORDS_S)

    async def serve(self, listener: socket.socket, lines: asyncio.StreamReader) -> None:
        """Serve until drained, or until control ends."""
        for number in STOP:  # blocked in a gateway that `quantserve serve` has started
            if signal.getsignal(number) is not signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, self._drain)
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        control = [asyncio.create_task(self._listen(lines)), asyncio.create_task(self._report())]
        done, _ = await asyncio.wait([serving, *control], return_when=asyncio.FIRST_COMPLETED)
        if serving in done:
            serving.result()
            return
        for task in done:
            if error := task.exception():
                logger.error("control of the gateway failed, the gateway ends: %r", error)
        self._server.should_exit = True
        self._directory.fail_running()
        await asyncio.wait([serving], timeout=LAST_WORDS_S / 2)

    def flush_logs(self) -> None:
        """Write the buffered lines of the access log."""
        for observer in getattr(self._app, "observers", ()):
            if isinstance(observer, AccessLog):
                observer.flush()

    async def _listen(self, lines: asyncio.StreamReader) -> None:
        """Follow control lines until standard input ends, maybe in the middle of a line."""
        while (line := await lines.readline()).endswith(b"\n"):
            message = json.loads(line)
            if message.get("drain"):
                self._drain()
            else:
                self._directory.update(message["replicas"])

    def _drain(self) -> None:
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(self._policy.drain_timeout_s, self._directory.fail_running)

    async def _report(self) -> None:
        """Write the status until nobody reads it; the parent's pipes may be held open by other processes.

        A status waits while the pipe is full: a parent that is suspended must not suspend the gateway. No event loop
        can watch a regular file or ``/dev/null``, so the system call is made here.
        """
        output = sys.stdout.fileno()
        os.set_blocking(output, False)
        last, when, unwritten = "", 0.0, b""
        while os.getppid() == self._parent:
            line = json.dumps({**self._directory.status, "page": self._page is not None})
            if not unwritten and (line != last or time.monotonic() - when > HEARTBEAT_S):
                unwritten = line.encode() + b"\n"
                last, when = line, time.monotonic()
            try:
                unwritten = unwritten[os.write(output, unwritten) :] if unwritten else b""
            except BrokenPipeError:
                return
            except OSError:  # the pipe or the disk is full
                pass
            await asyncio.sleep(STATUS_POLL_S)


async def serve(listener: socket.socket, exits: contextlib.ExitStack) -> None:
    """Read the settings and serve.

    Args:
        exits: gets what must happen after the last request has ended.
    """
    if not _can_be_followed(sys.stdin.fileno()):  # libuv aborts the process for it
        raise ValueError("standard input must be a pipe; quantserve serve starts this process")
    lines = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = await lines.readline()
    if settings.endswith(b"\n"):
        gateway = Gateway(json.loads(settings))
        exits.callback(gateway.flush_logs)
        gc.collect()
        gc.freeze()  # modules and app are never garbage
        await gateway.serve(listener, lines)


def _can_be_followed(descriptor: int) -> bool:
    """Whether an event loop can wait for data from it: not from a regular file or ``/dev/null``."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)


def main(arguments: list[str]) -> None:
    """Run the gateway on an inherited listening socket."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    gc.set_threshold(*GC_THRESHOLDS)
    listener = socket.socket(fileno=int(arguments[0]))
    listener.setblocking(False)
    code = 1
    try:
        with contextlib.ExitStack() as exits:
            uvloop.run(serve(listener, exits))
        code = 0
    except Exception:
        logger.exception("the gateway failed")
    finally:
        os._exit(code)  # a thread that parses a body would delay the exit


if __name__ == "__main__":
    main(sys.argv[1:])
