"""Plugins whose hooks run without the guard of each call, under one guard for many.

Guarding one call takes milliseconds, and the kit makes thousands. What hooks change of the process is looked for where
the good checkpoint is checked, with the guard of every day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any, Final, TypeVar

from quantserve.errors import PluginError, QuantserveError
from quantserve.plugins import foreign
from quantserve.plugins.plugin import Plugin
from quantserve.plugins.registry import Registry

T = TypeVar("T")
V = TypeVar("V")
AT_ONCE: Final = 16
"""Values under one guard."""


@dataclass(frozen=True)
class QuickPlugin(Plugin):
    """A plugin that is called as it is."""

    def run(self, stage: str, code: Callable[[], Any], seconds: float) -> Any:
        """Call it.

        Raises:
            PluginError: it failed.
        """
        try:
            return code()
        except (Exception, SystemExit) as error:
            raise self.defect(stage, foreign.reason(error, self.package)) from error


def quick(registry: Registry) -> Registry:
    """The same plugins, without guards."""
    made = {
        name: QuickPlugin(**{field.name: getattr(plugin, field.name) for field in fields(plugin)})
        for name, plugin in registry.plugins.items()
    }
    return replace(registry, plugins=made)


class Guard:
    """One guard around code that calls a plugin many times; after it was ended once, the plugin is not called again.

    Code may call it again while it is guarded: one guard for all then, because each takes a snapshot of the process.

    Args:
        plugin: to blame.
    """

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._late: PluginError | None = None
        self._inside = False

    def __call__(self, code: Callable[[], T]) -> T:
        """Run code within the time of an import.

        Raises:
            PluginError: a hook failed, changed the process, or did not end.
        """
        if self._late:
            raise self._late
        if self._inside:
            return code()
        seconds = foreign.hook_seconds() * foreign.IMPORT_PARTS
        self._inside = True
        try:
            return foreign.run(code, f"plugin {self._plugin.label}", seconds)
        except foreign.Raised as raised:
            error = raised.error
            if isinstance(error, QuantserveError) or not isinstance(error, foreign.Breach):
                raise error from raised
            defect = self._plugin.defect("hooks", str(error))
            if isinstance(error, foreign.Late):
                self._late = defect
            raise defect from raised
        finally:
            self._inside = False

    def each(self, code: Callable[[V], T], values: Iterable[V]) -> Iterator[tuple[V, T | PluginError]]:
        """Run code for each value, many under one guard; gives the value with what it made, or how it failed.

        A guard that ends, or finds the process changed, fails for all values that it had.
        """

        def tried(value: V) -> T | PluginError:
            try:
                return code(value)
            except PluginError as error:
                return error

        every = iter(values)
        while some := list(islice(every, AT_ONCE)):
            try:
                made = self(partial(_all, tried, some))
            except PluginError as error:
                made = [error] * len(some)
            yield from zip(some, made, strict=True)


def _all(code: Callable[[V], T], values: Iterable[V]) -> list[T]:
    return [code(value) for value in values]
