"""Running a plugin's code: bounded in time, without harm to this process, and with its own faults told from ours.

`run` calls the code with stdout sent to stderr (stdout may be JSON) and turns whatever it raises into `Raised`, which
keeps the exception. After its time limit the code is ended:

- in the main thread a timer signal raises inside it. Code that swallows that three times ends the process, with the
  plugin's name; a call into C that never returns to Python is ended by `faulthandler`, which prints where it was;
- in other threads, which signals do not reach, the code runs in a thread that is told to raise, and is left behind.

Time in which the code waited for a processor does not count, so a busy machine makes no plugin defective.

What the code changed of the process is put back (`quantserve.plugins.process`). Such a change is a fault of the plugin
as well.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from contextvars import copy_context
from types import FrameType
from typing import Final, TypeVar

from quantserve.errors import UsageError
from quantserve.plugins.process import Process, output_to_stderr
from quantserve.text import harmless

HOOK_S: Final = 10.0
"""Longest time of one hook, in seconds; ``QUANTSERVE_HOOK_TIMEOUT`` sets another, and the two below in proportion."""
IMPORT_PARTS: Final = 6
"""Loading a plugin or a command may take so many times as long as a hook."""
REGISTER_PARTS: Final = 60
"""The engine side's ``register()``, which imports vLLM's modules, may take so many times as long as a hook."""
NOTICE_S: Final = 2.0
"""After so long an import is named on stderr."""
VARIABLE: Final = "QUANTSERVE_HOOK_TIMEOUT"
_LOOK_S: Final = 1.0
_SWALLOWED: Final = 3
_GRACE_S: Final = 15.0
"""How long a signal handler may be kept waiting after the limit."""
_LONGEST: Final = 500

T = TypeVar("T")


class Breach(Exception):
    """A plugin does not keep a contract; the message is the reason, for its author."""


class Late(Breach):
    """Code of a plugin did not end in time."""


class Raised(Exception):
    """Code of a plugin failed.

    Attributes:
        error: what it raised, or a `Breach`.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__)
        try:
            isinstance(error, Breach)
        except BaseException:  # its class is the plugin's, and may replace what every exception has
            error = Breach("raised an exception that cannot be read")
        self.error = error


class _Overdue(BaseException):
    """Raised inside code whose time is up."""


def hook_seconds(environ: Mapping[str, str] = os.environ) -> float:
    """Longest time of one hook in seconds; 0 is no limit.

    Raises:
        UsageError: ``QUANTSERVE_HOOK_TIMEOUT`` is no such number.
    """
    given = environ.get(VARIABLE, "")
    try:
        seconds = float(given or HOOK_S)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e6:
        raise UsageError(f"{VARIABLE} is {given[:40]!r}\n  fix: give seconds, such as {HOOK_S:g}; 0 is no limit")
    return seconds


def run(code: Callable[[], T], what: str, seconds: float, notice: str = "") -> T:
    """Call a plugin's code.

    Args:
        code: what to call.
        what: the plugin and the stage, for messages.
        seconds: time limit; 0 for none.
        notice: a line for stderr after 2 s.

    Raises:
        Raised: the code raised, left damage, or did not end in time.
        KeyboardInterrupt: the user pressed Ctrl-C; one that the code raises by itself is a `Raised`.
    """
    before = Process()
    call = _in_main_thread if _signals_work() else _in_thread
    try:
        with output_to_stderr(), redirect_stdout(sys.stderr):
            result = call(code, what, seconds, notice)
    except BaseException as error:
        before.restore()
        if isinstance(error, _Overdue):  # it came when the code had just ended
            raise _late(seconds) from None
        raise
    if damage := before.restore():
        raise Raised(Breach(damage))
    return result


def reason(error: BaseException, package: str) -> str:
    """An exception of a plugin in one line: type, message, notes, and where in the plugin it was raised.

    Args:
        package: first part of the plugin's module name.
    """
    if isinstance(error, Breach):
        return harmless(str(error), 2 * _LONGEST)
    name = _read(lambda: type(error).__name__)
    text = _read(lambda: str(error).strip().partition("\n")[0])
    notes = _read(lambda: "".join(f" ({note})" for note in getattr(error, "__notes__", ())))
    return f"{name}: {text}{_place(error, package)}{notes}" if text else f"{name}{_place(error, package)}{notes}"


def _read(text: Callable[[], str]) -> str:
    """Text of an exception; "" where the plugin's class fails to give it."""
    try:
        return harmless(text(), _LONGEST)
    except BaseException:
        return ""


def say(line: str) -> None:
    """Write a line to stderr, if there is one."""
    with suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def _place(error: BaseException, package: str) -> str:
    """`` at plugin.py:17``: the innermost line of the plugin itself."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
            return f" at {os.path.basename(frame.f_code.co_filename)}:{line}"
    return ""


def passes(error: BaseException, package: str) -> bool:
    """Whether an exception was raised in code of this package, or in what that code called."""
    return bool(_place(error, package))


def _signals_work() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


def _late(seconds: float) -> Raised:
    return Raised(Late(f"did not end within {seconds:g} s and was ended; {VARIABLE} sets the limit"))


class Clock:
    """Time of a thread, without that in which it waited for a processor.

    Args:
        thread: its id in the system.
        process: that of its process, this one by default.
    """

    def __init__(self, thread: int, process: int | str = "self") -> None:
        self._path = f"/proc/{process}/task/{thread}/schedstat"
        self._began = self._now()

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._began

    def _now(self) -> float:
        try:
            with open(self._path, "rb") as file:
                waited = int(file.read().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # not Linux, or the thread has ended
            waited = 0.0
        return time.monotonic() - waited


def _in_main_thread(code: Callable[[], T], what: str, seconds: float, notice: str) -> T:
    clock = Clock(threading.get_native_id())
    unsaid = [notice] if notice else []
    overdue: list[float] = []
    interrupts: list[int] = []
    previous_interrupt = signal.getsignal(signal.SIGINT)

    def look(number: int, frame: FrameType | None) -> None:
        elapsed = clock.elapsed()
        if seconds:
            _end_process_after(max(0.0, seconds - elapsed) + _GRACE_S)
        if unsaid and elapsed >= NOTICE_S:
            say(unsaid.pop())
        if seconds and elapsed >= seconds:
            overdue.append(elapsed)
            if len(overdue) > _SWALLOWED:
                say(f"error: {what} did not end within {seconds:g} s and cannot be ended; leaving")
                os._exit(3)
            raise _Overdue

    def interrupted(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        if callable(previous_interrupt):
            previous_interrupt(number, frame)

    with ExitStack() as stack:
        if callable(previous_interrupt):
            stack.enter_context(_handler(signal.SIGINT, interrupted))
        if seconds or notice:
            stack.enter_context(_handler(signal.SIGALRM, look))
            stack.enter_context(_timer(min(seconds or _LOOK_S, _LOOK_S)))
        if seconds:
            _end_process_after(seconds + _GRACE_S)
            stack.callback(faulthandler.cancel_dump_traceback_later)
        stack.callback(_end_copy, os.getpid())
        try:
            result = code()
        except KeyboardInterrupt as error:
            if interrupts:
                raise
            raise Raised(error) from error
        except BaseException as error:  # sys.exit and pytest.skip are no Exceptions
            raise (_late(seconds) if overdue else Raised(error)) from error
        if overdue:
            raise _late(seconds)
        return result


def _end_copy(process: int) -> None:
    """End a process that the code has forked and that came back here: it would do everything a second time."""
    if os.getpid() != process:
        os._exit(1)


@contextmanager
def _handler(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def _timer(first: float) -> Iterator[None]:
    """SIGALRM after `first` seconds and then every second; a timer that ran before goes on afterwards."""
    began = time.monotonic()
    delay, interval = signal.setitimer(signal.ITIMER_REAL, first, _LOOK_S)
    try:
        yield
    finally:
        left = max(0.001, delay - (time.monotonic() - began)) if delay else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def _end_process_after(seconds: float) -> None:
    """End the process with a traceback, unless called again: not even a signal handler gets to run."""
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # stderr is no file
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


def _in_thread(code: Callable[[], T], what: str, seconds: float, notice: str) -> T:
    results: list[T] = []
    errors: list[BaseException] = []
    context = copy_context()

    def work() -> None:
        try:
            results.append(context.run(code))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"quantserve: {what}", daemon=True)
    thread.start()
    clock = Clock(thread.native_id or 0)
    unsaid = [notice] if notice else []
    while thread.is_alive() and not (seconds and clock.elapsed() >= seconds):
        thread.join(min(seconds or _LOOK_S, _LOOK_S))
        if unsaid and thread.is_alive() and clock.elapsed() >= NOTICE_S:
            say(unsaid.pop())
    if thread.is_alive():
        import ctypes

        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Overdue))
        thread.join(_LOOK_S)
        raise _late(seconds)
    if errors:
        raise Raised(errors[0]) from errors[0]
    return results[0]
