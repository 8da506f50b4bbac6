"""Shortens the imports of an engine's processes.

The replica, its engine core and every worker import vLLM, torch and transformers one after the other, which takes most
of a small model's start. Two measures shorten it. Python's garbage collector, a quarter of the import time, runs rarely
until a process has imported the modules of its task. And the engine core's process is started early, as a spare: it
imports while the replica imports, and then waits for its task. Both are entries of `patches.PATCHES`.
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
from multiprocessing.context import BaseContext, SpawnContext, SpawnProcess, set_spawning_popen
from types import ModuleType
from typing import Any, Final

USUAL: Final = gc.get_threshold()
RARELY: Final = (2_000_000, 50, 1000)
"""Thresholds of the garbage collector, as for `gc.set_threshold`: vLLM's imports leave some 600,000 objects."""
ENGINE_CORE: Final = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
"""Modules that an engine core imports."""


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Make the garbage collector run rarely during a block of imports."""
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*USUAL)


def begin(hurried: bool = True, **handles: int) -> None:
    """Entry point of a spawned process: the garbage collector runs rarely until its task and the task's modules are
    loaded, and as usual when the task runs.

    Args:
        hurried: whether the processes that it spawns begin in the same way.
        handles: those of `multiprocessing.spawn.spawn_main`.
    """
    gc.set_threshold(*RARELY)
    if hurried:
        hurry_children()
    usual = SpawnProcess._after_fork  # type: ignore[attr-defined]

    def loaded() -> None:
        """Called by multiprocessing when the task is loaded, before it runs."""
        if gc.get_threshold() == RARELY:  # the task's modules have not set others
            gc.set_threshold(*USUAL)
        usual()

    SpawnProcess._after_fork = staticmethod(loaded)  # type: ignore[attr-defined]
    spawn.spawn_main(**handles)


def wait_to_begin(modules: Sequence[str], environ_handle: int, hurried: bool, **handles: int) -> None:
    """Entry point of a spare process: imports the modules, and waits until it is used or its parent ends.

    Args:
        modules: modules to import.
        environ_handle: pipe with the environment, as JSON.
        hurried: see `begin`.
        handles: those of `multiprocessing.spawn.spawn_main`.
    """
    gc.set_threshold(*RARELY)
    for module in modules:
        with contextlib.suppress(Exception):  # the code that needs the module reports the error
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
    begin(hurried, **handles)


def hurry_children() -> None:
    """Make spawned processes start with `begin`."""
    spawn.get_command_line = _hurried


def _hurried(**handles: int | None) -> list[str]:
    return _command(begin.__name__, **handles)


def _command(start: str, **arguments: Any) -> list[str]:
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    options: list[str] = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
    program = f"from {__name__} import {start}; {start}({given})"
    return [os.fsdecode(spawn.get_executable()), *options, "-c", program, "--multiprocessing-fork"]


class Spare:
    """A process that imports modules in advance and then serves as the next spawned process.

    Args:
        modules: modules to import.

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
        hurried = spawn.get_command_line is _hurried
        command = _command(wait_to_begin.__name__, modules=tuple(modules), hurried=hurried, **handles)
        self.pid = util.spawnv_passfds(os.fsencode(self.executable), command, [*handles.values(), alive])
        for descriptor in (environ_r, handle, alive):
            os.close(descriptor)

    def fits(self, inherited: Sequence[int]) -> bool:
        """Whether the process is alive and equals a newly spawned one that would inherit these descriptors."""
        alive = os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        return alive and not inherited and self.executable == spawn.get_executable()

    def become(self, payload: memoryview) -> int:
        """Send environment and task to the process; returns a descriptor that closes when this process ends."""
        with open(self._environ, "w") as pipe:
            json.dump(dict(os.environ), pipe)
        with open(self._payload, "wb", closefd=False) as pipe:
            pipe.write(payload)
        return self._payload

    def dismiss(self) -> None:
        """End the process."""
        with contextlib.suppress(ChildProcessError):  # it has ended, and its process id may be reused
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        for descriptor in (self._environ, self._payload, self.sentinel):
            os.close(descriptor)


_spares: list[Spare] = []


def start_spare(modules: Sequence[str]) -> None:
    """Start a spare for the next process of `SparedContext`."""
    _spares.append(Spare(modules))


def start_engine_core_spare() -> None:
    """Start a spare for the engine core; `use_spares` lets vLLM use it."""
    start_spare(ENGINE_CORE)


def use_spares(starter: ModuleType) -> None:
    """Let a module that starts processes in the context ``get_mp_context()`` use the spares, if there are any."""
    if _spares:
        usual = starter.get_mp_context

        def get_mp_context() -> BaseContext:
            context: BaseContext = usual()
            return SparedContext() if context.get_start_method() == "spawn" else context

        starter.get_mp_context = get_mp_context  # type: ignore[attr-defined]


def dismiss_spares() -> None:
    """End unused spares: an engine may run in this process or in Ray actors instead."""
    while _spares:
        _spares.pop().dismiss()


class _Popen(popen_spawn_posix.Popen):
    """Uses a spare if one fits; otherwise starts a process."""

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
    """A spawned process that may be a spare."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)


class SparedContext(SpawnContext):
    """multiprocessing's ``spawn``, with spares."""

    Process = SparedProcess
