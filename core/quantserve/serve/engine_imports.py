"""An engine's processes get through their imports in less time.

The replica, its engine core and every worker import vLLM, torch and transformers, each for itself and one after the
other: that is most of the time which a small model needs to start. Python's garbage collector looks through all that
was imported so far again and again, a quarter of the time, so it looks less often meanwhile. And the engine core's
process starts with the replica's own imports instead of after them, as a spare that waits to be told what it is for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import popen_spawn_posix, process, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from typing import Any, Final

USUAL: Final = gc.get_threshold()
RARELY: Final = (2_000_000, 50, 1000)
"""Thresholds of the garbage collector, as for `gc.set_threshold`: vLLM's imports leave some 600,000 objects."""
ENGINE_CORE: Final = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
"""Modules that an engine core imports."""


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Let the garbage collector look rarely for as long as a block of imports takes."""
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        collect_as_usual()


def collect_as_usual() -> None:
    """Let the garbage collector look as often as it does by default."""
    gc.set_threshold(*USUAL)


def begin(**handles: int) -> None:
    """What a spawned process does first: see `hurry_children`.

    Args:
        handles: multiprocessing's own.
    """
    gc.set_threshold(*RARELY)
    hurry_children()
    spawn.spawn_main(**handles)


def wait_to_begin(modules: Sequence[str], environ_handle: int, **handles: int) -> None:
    """What a spare does: it imports, and waits until it is needed or its parent has gone.

    Args:
        modules: what to import.
        environ_handle: pipe that brings the environment, as JSON.
        handles: multiprocessing's own.
    """
    gc.set_threshold(*RARELY)
    for module in modules:
        with contextlib.suppress(Exception):  # who needs it will say what is wrong with it
            importlib.import_module(module)
    with open(environ_handle, "rb") as pipe:
        environ = json.loads(pipe.read() or "null")
    if environ is None:
        return
    threads = os.environ.get("OMP_NUM_THREADS")
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update({name: value for name, value in environ.items() if os.environ.get(name) != value})
    if environ.get("OMP_NUM_THREADS", threads) != threads:  # torch has read it already
        import torch

        torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    begin(**handles)


def hurry_children() -> None:
    """Let the processes that this one spawns collect rarely until the engine's plugin is loaded in them."""
    spawn.get_command_line = _hurried


def _hurried(**handles: int | None) -> list[str]:
    return _command(begin.__name__, **handles)


def _command(start: str, **arguments: Any) -> list[str]:
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    options: list[str] = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
    program = f"from {__name__} import {start}; {start}({given})"
    return [os.fsdecode(spawn.get_executable()), *options, "-c", program, "--multiprocessing-fork"]


class Spare:
    """A process that imports what it will need, and becomes the next one that this process spawns.

    Args:
        modules: what to import.

    Attributes:
        executable: the interpreter that runs it.
        pid: its process id.
        sentinel: descriptor that becomes readable when it ends.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.executable = spawn.get_executable()
        environ_r, self._environ = os.pipe()
        handle, self._payload = os.pipe()
        self.sentinel, alive = os.pipe()
        tracker: int = resource_tracker.getfd()  # type: ignore[assignment]
        handles = {"environ_handle": environ_r, "pipe_handle": handle, "tracker_fd": tracker}
        command = _command(wait_to_begin.__name__, modules=tuple(modules), **handles)
        self.pid = util.spawnv_passfds(os.fsencode(self.executable), command, [*handles.values(), alive])
        for descriptor in (environ_r, handle, alive):
            os.close(descriptor)

    def fits(self, inherited: Sequence[int]) -> bool:
        """Whether the process lives and was started as that one would be, which inherits these descriptors."""
        alive = os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        return alive and not inherited and self.executable == spawn.get_executable()

    def become(self, payload: memoryview) -> int:
        """Tell the process what it is; returns the descriptor whose closing tells it that its parent has gone."""
        with open(self._environ, "w") as pipe:
            json.dump(dict(os.environ), pipe)
        with open(self._payload, "wb", closefd=False) as pipe:
            pipe.write(payload)
        return self._payload

    def dismiss(self) -> None:
        """End the process."""
        with contextlib.suppress(ChildProcessError):  # it has ended, and its id may be another's
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        for descriptor in (self._environ, self._payload, self.sentinel):
            os.close(descriptor)


_spares: list[Spare] = []


def start_spare(modules: Sequence[str]) -> None:
    """Start the process that the next one of `SparedContext` will be."""
    _spares.append(Spare(modules))


def dismiss_spares() -> None:
    """End the spares that nobody took: an engine may run in this process, or in actors of Ray's."""
    while _spares:
        _spares.pop().dismiss()


class _Popen(popen_spawn_posix.Popen):
    """Takes the spare, if there is one that fits; starts a process otherwise."""

    _fds: list[int]

    def _launch(self, process_obj: process.BaseProcess) -> None:
        if not (_spares and self._become(_spares.pop(), process_obj)):
            self._fds = []
            super()._launch(process_obj)  # type: ignore[misc]

    def _become(self, spare: Spare, process_obj: process.BaseProcess) -> bool:
        payload = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), payload)
            reduction.dump(process_obj, payload)
        finally:
            set_spawning_popen(None)
        if not spare.fits(self._fds):
            spare.dismiss()
            return False
        self.pid, self.sentinel = spare.pid, spare.sentinel
        descriptors = (spare.sentinel, spare.become(payload.getbuffer()))
        self.finalizer = util.Finalize(self, util.close_fds, descriptors)  # type: ignore[attr-defined]
        return True


class SparedProcess(SpawnProcess):
    """A spawned process that may have been there before."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)


class SparedContext(SpawnContext):
    """multiprocessing's ``spawn``, with spares."""

    Process = SparedProcess
