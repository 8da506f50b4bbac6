"""What a plugin's code may not change of this process, and how that is put back.

`Process` remembers the environment, the working folder, ``sys.path``, imported modules, the functions of quantserve and
of a few modules that it works with, standard streams, signal handlers and the recursion limit. `output_to_stderr` keeps
file descriptor 1 clean, which child processes and C libraries write to.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final

from quantserve.text import harmless

_GUARDED_VARIABLES: Final = ("VLLM_", "QUANTSERVE_")
"""Variables that steer the engine and quantserve: code of a plugin may not set them either."""
_GUARDED_MODULES: Final = ("quantserve", "builtins", "json", "pathlib")
"""Packages in which no function, method or class may be replaced."""
_KEPT_MODULES: Final = frozenset({*sys.stdlib_module_names, "quantserve", "click", "rich"})
"""Packages that may not be removed from ``sys.modules``."""
_CODE: Final = (FunctionType, BuiltinFunctionType, type, staticmethod, classmethod, property)
_STREAMS: Final = ("stdin", "stderr", "__stdout__", "__stderr__")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Names:
    """Names of modules that were ever imported, sorted out once: a process with an engine has thousands."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._kept: list[str] = []
        self._guarded: list[str] = []

    def kept(self) -> list[str]:
        """Those that may not be removed."""
        self._look()
        return self._kept

    def guarded(self) -> list[str]:
        """Those whose functions and classes may not be replaced."""
        self._look()
        return self._guarded

    def _look(self) -> None:
        fresh = set(sys.modules) - self._seen
        self._seen |= fresh
        self._kept += sorted(name for name in fresh if _top(name) in _KEPT_MODULES)
        self._guarded += sorted(name for name in fresh if _top(name) in _GUARDED_MODULES)


_names: Final = _Names()


class Process:
    """The state of this process before code of a plugin runs."""

    def __init__(self) -> None:
        self._environ = dict(os.environ)
        self._path = list(sys.path)
        self._finders = list(sys.meta_path)
        self._modules = {name: sys.modules[name] for name in _names.kept() if name in sys.modules}
        self._code = {name: (owner, vars(owner).copy()) for name, owner in _owners()}
        self._streams = {name: getattr(sys, name) for name in _STREAMS}
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._recursion = sys.getrecursionlimit()
        self._folder = _folder()

    def restore(self) -> str:
        """Put back what was changed; gives what that was, "" for nothing."""
        return "; ".join(filter(None, (self._restore_environ(), *self._restore_others())))

    def _restore_environ(self) -> str:
        now = dict(os.environ)
        removed = sorted(self._environ.keys() - now.keys())
        changed = sorted(
            name
            for name, value in now.items()
            if name.startswith(_GUARDED_VARIABLES) and self._environ.get(name) != value
        )
        for name in changed:
            os.environ.pop(name)
        os.environ.update({name: self._environ[name] for name in (*removed, *changed) if name in self._environ})
        done = [f"removed {_some(removed)}"] if removed else []
        done += [f"set {_some(changed)}"] if changed else []
        return f"{' and '.join(done)} in the environment; put back" if done else ""

    def _restore_others(self) -> Iterator[str]:
        if self._folder and _folder() != self._folder:
            os.chdir(self._folder)
            yield "changed the working folder; put back"
        lists: list[tuple[str, list[Any], list[Any]]] = [
            ("sys.path", self._path, sys.path),
            ("sys.meta_path", self._finders, sys.meta_path),
        ]
        for where, before, now in lists:
            if missing := [entry for entry in before if entry not in now and _stays(entry)]:
                now[:] = before
                yield f"removed {_some(missing)} from {where}; put back"
        if missing := [name for name, module in self._modules.items() if sys.modules.get(name) is not module]:
            sys.modules.update(self._modules)
            yield f"removed {_some(missing)} from sys.modules; put back"
        if replaced := list(self._restore_code()):
            yield f"replaced {_some(replaced)}; put back"
        if replaced := [name for name, stream in self._streams.items() if getattr(sys, name) is not stream]:
            for name in replaced:
                setattr(sys, name, self._streams[name])
            yield f"replaced {_some([f'sys.{name}' for name in replaced])}; put back"
        if threading.current_thread() is threading.main_thread():
            yield from self._restore_handlers()
        if sys.getrecursionlimit() < self._recursion:
            yield f"set the recursion limit to {sys.getrecursionlimit()}; put back"
            sys.setrecursionlimit(self._recursion)

    def _restore_code(self) -> Iterator[str]:
        for where, (owner, before) in self._code.items():
            now = vars(owner)
            if list(before) == list(now) and all(map(is_, before.values(), now.values())):
                continue  # nearly always, and there are thousands of functions
            for name, value in before.items():
                if now.get(name) is not value and isinstance(value, _CODE):
                    setattr(owner, name, value)
                    yield f"{where}.{name}"

    def _restore_handlers(self) -> Iterator[str]:
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
                yield f"changed the handler of {number.name}; put back"


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Connect file descriptor 1 with stderr, and put back 1 and 2 afterwards, whatever was done to them."""
    _flush()
    try:
        kept = [os.dup(1), os.dup(2)]
    except OSError:  # there are none
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        _flush()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]


def _owners() -> Iterator[tuple[str, Any]]:
    """The guarded modules and their classes, by name."""
    for name in _names.guarded():
        module = sys.modules.get(name)
        if module is not None:
            yield name, module
            yield from _classes(name, module, len(vars(module)))


@lru_cache(maxsize=4096)
def _classes(name: str, module: Any, size: int) -> list[tuple[str, Any]]:
    """The classes of a module by name; `size` is its number of attributes, which grows while it is imported."""
    return [
        (f"{name}.{key}", value)
        for key, value in list(vars(module).items())
        if isinstance(value, type) and value.__module__ == name and value.__flags__ & _HEAP_TYPE
    ]


_HEAP_TYPE: Final = 1 << 9
"""Flag of classes made by Python code, whose attributes can be set."""


def _stays(entry: Any) -> bool:
    """Whether an entry of ``sys.path`` or ``sys.meta_path`` is one that no code removes by right.

    A library's own finder is not: vLLM's wait for one module to be imported, by anybody, and then remove themselves.
    """
    if isinstance(entry, str):
        return True
    module = str(getattr(entry if isinstance(entry, type) else type(entry), "__module__", ""))
    return _top(module) in sys.stdlib_module_names or module.startswith("__editable__")


def _top(name: str) -> str:
    return name.partition(".")[0]


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def _some(names: list[Any]) -> str:
    first = ", ".join(harmless(str(name), 80) for name in names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
