"""A server for the duration of a benchmark: ``quantserve serve`` as a child process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

from quantserve.config import ModelConfig
from quantserve.errors import EngineError, UsageError, unknown_name
from quantserve_bench.request import Target
from quantserve_bench.tokens import Session

START_S: Final = 900.0
POLL_S: Final = 0.5
STOP_S: Final = 60.0
KILL_S: Final = 10.0
LINES_SHOWN: Final = 12


class Server:
    """Serves models while its context is active; always stops the server at the end.

    Args:
        models: models to serve.
        folder: for config and log.
        waiting: called during the start, with the seconds so far.
        command: server command; the config and ``--port N`` are appended.
    """

    def __init__(
        self,
        models: Sequence[ModelConfig],
        folder: Path,
        waiting: Callable[[float], None] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "quantserve", "serve"),
    ) -> None:
        self._models = models
        self._command = command
        self._waiting = waiting or (lambda seconds: None)
        self._config = folder / "models.json"
        self.log = folder / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Target:
        """Start the server and wait until every model is healthy.

        Raises:
            EngineError: the server exited, or the start timeout passed; the message has its last lines.
        """
        models = [json.loads(model.model_dump_json(exclude_unset=True)) for model in self._models]
        self._config.write_text(json.dumps({"models": models}))
        port = free_port()
        command = [*self._command, str(self._config), "--port", str(port)]
        environment = {key: value for key, value in os.environ.items() if key != "QUANTSERVE_API_KEYS"}
        self._take_signals()
        with self.log.open("wb") as log:
            # In its own session, because Ctrl-C must reach only this process, which then stops the server.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        target = Target(f"http://127.0.0.1:{port}", "")
        try:
            self._wait(target)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        try:
            self.stop()
        finally:
            self._give_signals_back()

    def _take_signals(self) -> None:
        """Make SIGTERM and SIGHUP act like Ctrl-C, so that the server is stopped; ignored signals stay ignored.

        Possible in the main thread only.
        """

        def interrupt(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, interrupt)

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def stop(self) -> None:
        """Stop the server: SIGTERM, after a timeout or a signal SIGTERM again, which stops it at once, then SIGKILL."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        try:
            with suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(STOP_S)
        finally:  # also after another Ctrl-C; a third one changes nothing
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
            try:
                self._end(process)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is not None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(KILL_S)
        if process.poll() is None:
            import psutil  # type: ignore[import-untyped]  # where servers can be started

            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                with suppress(psutil.Error):
                    one.kill()
            process.wait()

    def _wait(self, target: Target) -> None:
        assert self._process is not None
        began = time.monotonic()
        while (passed := time.monotonic() - began) < START_S:
            if (code := self._process.poll()) is not None:
                raise EngineError(f"the server exited with code {code} during its start:\n{self._last_lines()}")
            if is_healthy(target):
                return
            self._waiting(passed)
            time.sleep(POLL_S)
        raise EngineError(f"the server was not ready within {START_S:.0f} s:\n{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        return "\n".join(f"  | {line}" for line in lines)


def is_healthy(target: Target) -> bool:
    """Whether ``/health`` returns 200."""
    session = Session(target, timeout_s=5)
    try:
        return session.ask("GET", "/health")[0] == 200
    except EngineError:
        return False
    finally:
        session.close()


def free_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def choose(models: Sequence[ModelConfig], names: Sequence[str], methods: dict[str, str]) -> list[ModelConfig]:
    """The models of a config with these ids or methods, in the order of the names.

    Args:
        models: of the config.
        names: ids or methods; empty takes all.
        methods: model id -> method.

    Raises:
        UsageError: a name is neither, or a method is that of several models.
    """
    if not names:
        return list(models)
    chosen = []
    for name in names:
        found = [model for model in models if name == model.model_id] or [
            model for model in models if name == methods.get(model.model_id)
        ]
        if not found:
            known = {model.model_id for model in models} | set(methods.values())
            raise UsageError(unknown_name("model or method", name, known))
        if len(found) > 1:
            ids = ", ".join(model.model_id for model in found)
            raise UsageError(f"{name} is the method of several models: {ids}\n  fix: select them by id")
        chosen += found
    return chosen
