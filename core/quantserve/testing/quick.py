"""Plugins whose hooks run without the guard of each call, under one guard for many.

Guarding one call takes milliseconds, and the kit makes thousands. What hooks change of the process is looked for where
the good checkpoint is checked, with the guard of every day.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from quantserve.errors import PluginError, QuantserveError
from quantserve.plugins import foreign
from quantserve.plugins.plugin import Plugin
from quantserve.plugins.registry import Registry

T = TypeVar("T")


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

    Args:
        plugin: to blame.
    """

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._late: PluginError | None = None

    def __call__(self, code: Callable[[], T]) -> T:
        """Run code within the time of an import.

        Raises:
            PluginError: a hook failed, changed the process, or did not end.
        """
        if self._late:
            raise self._late
        seconds = foreign.hook_seconds() * foreign.IMPORT_PARTS
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
