"""Signals that stop a server, and processes that must not get them.

SIGINT, SIGTERM and SIGHUP reach more processes than the one they are meant for: a terminal sends them to its process
group, systemd to every process of a service. Ray, the replicas, the engines and the gateway would then end before the
requests in progress. They are therefore started with these signals blocked, and only `quantserve serve` reacts to them.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Final, TypeVar, cast

STOP: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""Signals that stop the server."""
BLOCKED: Final = STOP | {signal.SIGQUIT, signal.SIGTSTP}
"""Signals that are blocked in child processes; a terminal sends the last two as well."""
REPEAT_S: Final = 0.5
"""Signals that follow the first one within this time are the same event: `timeout`, for example, sends two."""

T = TypeVar("T")


class Stopped(Exception):
    """A signal to stop has arrived."""


class StopSignal:
    """The signals that stop the server, from now on until the process ends. Create it in the main thread.

    A signal that was ignored when the process started (SIGHUP under nohup, SIGINT in a background job) stays ignored.

    Args:
        at_once: called in a thread of its own when SIGINT or SIGTERM arrives again. SIGHUP does not count: a terminal
            that closes sends several.
    """

    def __init__(self, at_once: Callable[[], object]) -> None:
        self._at_once = at_once
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._awaited = {number for number in STOP if signal.getsignal(number) is not signal.SIG_IGN}
        self._received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self.install()
        threading.Thread(target=self._receive, daemon=True, name="signals").start()

    def install(self) -> None:
        """Install the handlers, again after code that may have replaced them.

        The interpreter writes the number of a signal into a socket, whichever thread gets the signal, and whatever the
        main thread, which runs the handlers, is waiting for.
        """
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in self._awaited:
            signal.signal(number, lambda number, frame: None)

    def check(self) -> None:
        """Raise when a signal has arrived.

        Raises:
            Stopped: a signal has arrived.
        """
        if self._stopped.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Wait.

        Raises:
            Stopped: a signal has arrived.
        """
        if self._stopped.wait(seconds):
            raise Stopped

    def run(self, call: Callable[[], T]) -> T:
        """The result of a call, which runs in a thread of its own because it may hang.

        Raises:
            Stopped: a signal has arrived; the thread is abandoned.
        """
        results: list[Any] = []

        def work() -> None:
            try:
                results.append((call(), None))
            except BaseException as error:
                results.append((None, error))
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=work, daemon=True, name="call").start()
        with self._changed:
            self._changed.wait_for(lambda: results or self._stopped.is_set())
        if not results:
            raise Stopped
        result, error = results[0]
        if error is not None:
            raise error
        return cast(T, result)

    def _receive(self) -> None:
        self._next()
        first = time.monotonic()
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        while self._next() == signal.SIGHUP or time.monotonic() - first < REPEAT_S:
            pass
        self._at_once()

    def _next(self) -> int:
        while (number := self._received.recv(1)[0]) not in self._awaited:
            pass
        return number


@contextmanager
def shielded() -> Iterator[None]:
    """Block the signals in the processes and threads that this thread starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield() -> None:
    """Block the signals in this thread, and in the processes and threads it starts."""
    resource_tracker.ensure_running()  # its first start unblocks SIGINT and SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
