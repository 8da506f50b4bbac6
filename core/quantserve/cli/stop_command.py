"""``quantserve stop``: ends servers of this user on this machine."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import click
from rich.console import Console
from rich.markup import escape

from quantserve.cli.output import console
from quantserve.errors import EngineError, UsageError
from quantserve.system.servers import Server, running

MARGIN_S: Final = 30.0
"""Time that a server needs beside its drain timeout to stop Ray and the engines."""
AGAIN_S: Final = 1.0
"""A second signal within half a second counts as the first one."""
POLL_S: Final = 0.2


@click.command("stop")
@click.option("--url", metavar="URL", help="The server at this address.")
@click.option("--pid", type=click.IntRange(min=1), metavar="N", help="The server with this process number.")
@click.option("--all", "everything", is_flag=True, help="All servers of this user on this machine.")
@click.option("--now", is_flag=True, help="Do not wait for requests in progress.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="S",
              help="Longest wait; default: the server's drain timeout and 30 s.")  # fmt: skip
def command(url: str | None, pid: int | None, everything: bool, now: bool, timeout_s: float | None) -> int:
    """Stop a server that this user started on this machine; without an option the only one.

    Requests in progress may finish until the server's drain timeout. Returns when the process has ended. Only processes
    that `quantserve status` shows get a signal.
    """
    if sum((url is not None, pid is not None, everything)) > 1:
        raise UsageError("--url, --pid and --all exclude each other\n  fix: give one of them")
    servers = chosen(running(), url, pid, everything)
    out = console()
    if not servers:
        out.print("no server of this user runs on this machine")
        return 0
    with contextlib.ExitStack() as stack:
        handles = []
        for server in servers:
            if (handle := _handle(server)) is not None:
                stack.callback(os.close, handle)
                handles.append((server, handle))
        for server, handle in handles:
            _signal(out, server, handle, now)
        if now and handles:
            time.sleep(AGAIN_S)
            for _, handle in handles:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGTERM)
        for server, handle in handles:
            _wait(out, server, handle, timeout_s)
    return 0


def chosen(servers: Sequence[Server], url: str | None, pid: int | None, everything: bool) -> list[Server]:
    """The servers that the options name.

    Raises:
        UsageError: none is the named one, or several run and none is named.
    """
    if pid is not None:
        if found := [server for server in servers if server.pid == pid]:
            return found
        raise UsageError(f"process {pid} is no running server of this user\n  fix: {_fix(servers)}")
    if url is not None:
        if found := [server for server in servers if _place(server.url) == _place(url)]:
            return found
        raise UsageError(f"no running server of this user has the address {url}\n  fix: {_fix(servers)}")
    if len(servers) > 1 and not everything:
        raise UsageError(f"{len(servers)} servers of this user run\n  fix: {_fix(servers)}, or --all")
    return list(servers)


def _fix(servers: Sequence[Server]) -> str:
    shown = ", ".join(f"--pid {server.pid} ({server.url})" for server in servers)
    return f"name one of these: {shown}" if shown else "see `quantserve status`; none runs"


def _place(url: str) -> tuple[str, int | None]:
    """Host and port; names of this machine count as one."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return url, None
    return ("127.0.0.1" if host in ("localhost", "0.0.0.0") else host), port


def _handle(server: Server) -> int | None:
    """A descriptor of the server's process, which cannot become another one any more; None if it has ended."""
    try:
        handle = os.pidfd_open(server.pid)
    except ProcessLookupError:
        return None
    if server.runs:
        return handle
    os.close(handle)
    return None


def _signal(out: Console, server: Server, handle: int, now: bool) -> None:
    wait = "" if now else f"; requests in progress have up to {server.drain_s:g} s to finish"
    out.print(f"stopping {server.pid} ({escape(server.url)}){wait}", soft_wrap=True)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGTERM)


def _wait(out: Console, server: Server, handle: int, timeout_s: float | None) -> None:
    """Wait for the end of a process.

    Raises:
        EngineError: time is up.
    """
    began = time.monotonic()
    limit = timeout_s or server.drain_s + MARGIN_S
    with out.status("waiting") if out.is_terminal else contextlib.nullcontext() as shown:
        while not select.select([handle], [], [], POLL_S)[0]:
            passed = time.monotonic() - began
            if passed > limit:
                raise EngineError(
                    f"server {server.pid} ({server.url}) still runs after {passed:.0f} s\n"
                    f"  fix: wait, or `quantserve stop --pid {server.pid} --now`, which breaks requests in progress; "
                    f"then `kill -KILL {server.pid}`"
                )
            if shown is not None:
                shown.update(f"waiting for {server.pid}: {passed:.0f} of at most {limit:.0f} s")
    out.print(f"stopped {server.pid} in {time.monotonic() - began:.1f} s")
