"""Timeouts of a client connection of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from math import inf


class Deadline:
    """A deadline that moves with every request; it sets a timer only if none ends before it.

    Args:
        loop: the event loop.
        expired: called when the deadline has passed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]) -> None:
        self._loop = loop
        self._expired = expired
        self._when = inf
        self._timer: asyncio.Handle | None = None
        self._ends = inf
        """When the timer ends."""

    def set(self, seconds: float) -> None:
        """Move the deadline to so many seconds from now."""
        self._when = self._loop.time() + seconds
        if self._timer is not None:
            if self._ends <= self._when:
                return
            self._timer.cancel()
        self._start(seconds)

    def clear(self) -> None:
        """Have no deadline until the next `set`."""
        self._when = inf

    def cancel(self) -> None:
        """End the timer, which holds a reference to the connection."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self._timer = None
        left = self._when - self._loop.time()
        if left <= 0:
            self._expired()
        elif left < inf:
            self._start(left)

    def _start(self, seconds: float) -> None:
        self._ends = self._when
        self._timer = self._loop.call_later(seconds, self._check)  # uvloop's has no `when` for less than half a ms


def notice_lost_client(transport: asyncio.Transport, timeout_s: float) -> None:
    """Let the kernel close a connection whose peer acknowledges or accepts no data for `timeout_s` seconds."""
    probe_s = max(1, int(timeout_s / 4))
    options = {
        "TCP_USER_TIMEOUT": int(timeout_s * 1000),  # Linux
        "TCP_KEEPIDLE": probe_s,
        "TCP_KEEPINTVL": probe_s,
        "TCP_KEEPCNT": 3,
    }
    with (
        contextlib.suppress(OSError),  # the client has left already
        socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if option := getattr(socket, name, None):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
