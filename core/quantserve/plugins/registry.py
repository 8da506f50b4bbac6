"""Discovery of plugins, one by one, so that a broken one harms nobody else.

Every entry point of the group ``quantserve.plugins`` is imported, checked against the hook contracts
and asked for its method on its own; what goes wrong is kept as a `Failure` and raised only for a model
that needs the plugin. A `Registry` is an instance: tests and servers build their own.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoints
from itertools import islice
from pathlib import PurePath
from typing import Any, TypeVar

import pluggy

from quantserve.checkpoint.containers import Contents, Reader
from quantserve.checkpoint.source import Source
from quantserve.errors import UsageError, unknown_name
from quantserve.plugins import commands, foreign
from quantserve.plugins.claims import OURS, settle
from quantserve.plugins.contract import MOST_READ
from quantserve.plugins.entry_points import duplicate, installed, left_out, names_in, origin, unique, unusable_name
from quantserve.plugins.plugin import Disabled, Failure, Plugin, load, manager
from quantserve.plugins.readers import guarded
from quantserve.target import Target

__all__ = ["Disabled", "Failure", "Hooks", "Plugin", "Registry", "how_to_install"]

T = TypeVar("T")
GROUP = "quantserve.plugins"
ENGINE_GROUP = "vllm.general_plugins"
# VLLM_PLUGINS filters these groups by name as well; what is installed there is not ours to drop.
OTHER_ENGINE_GROUPS = ("vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
GROUPS = (GROUP, commands.GROUP, ENGINE_GROUP, *OTHER_ENGINE_GROUPS)
ENGINE_PLUGIN = "quantserve"
"""Our own general plugin, which loads those of a model in vLLM's processes (`engine_plugins`)."""
ENGINE_PLUGINS_VARIABLE = "QUANTSERVE_ENGINE_PLUGINS"
"""Which those are: ``distribution:entry-point`` with commas. Names alone may be another distribution's as well."""

ADAPTERS_VARIABLE = "QUANTSERVE_ENGINE_ADAPTERS"
"""Set where the engine computes LoRA adapters."""


@dataclass(frozen=True)
class Registry:
    """The plugins of this environment.

    Attributes:
        plugins: usable plugins by entry-point name.
        failures: plugins that are installed and broken.
        disabled: plugins left out from outside.
        other_engine_plugins: names in vLLM's other plugin groups, which ``VLLM_PLUGINS`` must keep.
        notes: remarks for ``quantserve list``, such as an unknown name in ``QUANTSERVE_DISABLE``.
        contested: aliases and suffixes that several plugins claim, with the reason why none of them has it.
        points: all entry points of `GROUPS`, those of commands among them.
    """

    plugins: Mapping[str, Plugin]
    failures: tuple[Failure, ...] = ()
    disabled: tuple[Disabled, ...] = ()
    other_engine_plugins: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    contested: Mapping[str, str] = field(default_factory=dict)
    points: EntryPoints = field(default_factory=EntryPoints, repr=False)

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, points: EntryPoints | None = None) -> Registry:
        """Discover what is installed. Never raises for a plugin's fault.

        Raises:
            UsageError: ``QUANTSERVE_HOOK_TIMEOUT`` is no number.
        """
        points, notes = installed(GROUPS) if points is None else (points, [])
        allowed = names_in(environ.get("QUANTSERVE_PLUGINS"))
        denied = names_in(environ.get("QUANTSERVE_DISABLE")) or frozenset()
        seconds = foreign.hook_seconds(environ)
        engine_sides = {(point.name, origin(point)[0]) for point in points.select(group=ENGINE_GROUP)}

        plugins: list[Plugin] = []
        failures: list[Failure] = []
        disabled: list[Disabled] = []
        found = sorted(unique(points.select(group=GROUP)), key=lambda point: (point.name, origin(point)))
        wanted = []
        for point in found:
            if reason := left_out(point, allowed, denied):
                disabled.append(Disabled(point.name, *origin(point), reason))
            else:
                wanted.append(point)
        owners = defaultdict(list)
        for point in wanted:
            owners[point.name].append(origin(point))
        for point in wanted:
            distribution, version = origin(point)
            if clash := duplicate(point.name, owners[point.name], distribution):
                reason, fix = clash
                failures.append(Failure(point.name, distribution, version, "duplicate", reason, fix=fix))
            elif reason := unusable_name(point.name):
                failures.append(Failure(point.name, distribution, version, "names", reason))
            else:
                loaded = load(point, (point.name, distribution) in engine_sides, seconds)
                (plugins if isinstance(loaded, Plugin) else failures).append(loaded)  # type: ignore[arg-type]

        settled = settle(plugins)
        others = points.select(group=commands.GROUP)
        known = {name for point in (*found, *others) for name in (point.name, origin(point)[0])}
        unknown = sorted((denied | (allowed or frozenset())) - known)
        return cls(
            plugins={plugin.name: plugin for plugin in settled.plugins},
            failures=(*failures, *settled.failures),
            disabled=tuple(disabled),
            other_engine_plugins=tuple(
                sorted({point.name for group in OTHER_ENGINE_GROUPS for point in points.select(group=group)})
            ),
            notes=(
                *notes,
                *(
                    f"QUANTSERVE_PLUGINS / QUANTSERVE_DISABLE: {unknown_name('plugin', name, known)}"
                    for name in unknown
                ),
            ),
            contested=settled.contested,
            points=points,
        )

    @property
    def methods(self) -> dict[str, Plugin]:
        """Method plugins by method name and alias."""
        return {name: p for p in self.plugins.values() if p.method for name in p.method.names}

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Readers of the plugins, under their guard; a suffix that belongs to nobody is refused when it is needed."""
        refused = [_refusing(key, why) for key, why in self.contested.items() if key.startswith(".")]
        return (*(guarded(plugin) for plugin in self.plugins.values() if plugin.reader), *refused)

    def reader_plugin(self, names: Sequence[str]) -> Plugin | None:
        """The plugin that reads container files of these names; None for none."""
        suffixes = {PurePath(name).suffix for name in names}
        return next((p for p in self.plugins.values() if p.reader and suffixes & {*p.reader.suffixes}), None)

    def find_method(self, name: str, where: str = "") -> Plugin:
        """The plugin that serves the method ``name``.

        Raises:
            PluginError: the plugin that would serve it is broken.
            UsageError: nothing installed serves it, it is switched off, or it is an alias of several plugins.
        """
        if plugin := self.methods.get(name):
            return plugin
        return self._missing("quantization method", name, self.methods, where)

    def find_plugin(self, name: str, where: str = "") -> Plugin:
        """The plugin with entry-point name ``name``; raises like `find_method`."""
        if plugin := self.plugins.get(name):
            return plugin
        return self._missing("plugin", name, self.plugins, where)

    def engine_environment(
        self, composed: Iterable[Plugin], own: bool = False, adapters: bool = False
    ) -> dict[str, str]:
        """Environment variables with which vLLM's processes load the engine sides of ``composed`` and no others.

        Args:
            composed: the plugins of a model.
            own: whether our own general plugin is needed without them as well.
            adapters: whether the engine computes LoRA adapters.
        """
        sides = sorted(f"{plugin.distribution}:{plugin.name}" for plugin in composed if plugin.has_engine_side)
        names = {*self.other_engine_plugins, *([ENGINE_PLUGIN] if sides or own else [])}
        variables = {"VLLM_PLUGINS": ",".join(sorted(names))}
        if sides:
            variables[ENGINE_PLUGINS_VARIABLE] = ",".join(sides)
        return {**variables, ADAPTERS_VARIABLE: "1"} if adapters else variables

    def why_unusable(self, name: str, what: str = "quantization method", where: str = "") -> None:
        """Raise when a plugin of this name, or one that claims this method, is installed but cannot be used.

        Raises:
            PluginError: it is broken.
            UsageError: it is switched off, or the name is an alias of several plugins.
        """
        for failure in self.failures:
            if name == failure.name or name in failure.claims:
                raise failure.error()
        prefix = f"{where}: " if where else ""
        if reason := self.contested.get(name):
            raise UsageError(f"{prefix}{what} {reason}\n  fix: name the method itself in engine_kwargs.quantization")
        for entry in self.disabled:
            if name == entry.name:
                variable = entry.reason.rpartition(" ")[2]
                raise UsageError(
                    f"{prefix}{what} {name!r} ({entry.distribution}) is switched off: {entry.reason}\n"
                    f"  fix: {'remove it from' if variable.endswith('DISABLE') else 'add it to'} {variable}"
                )

    def _missing(self, what: str, name: str, known: Iterable[str], where: str) -> Plugin:
        self.why_unusable(name, what, where)
        prefix = f"{where}: " if where else ""
        message = unknown_name(what, name, known)
        spelling = name not in OURS and "; did you mean " in message
        fix = "correct the name; `quantserve list` shows what is installed" if spelling else how_to_install(name)
        raise UsageError(f"{prefix}{message}\n  fix: {fix}")


def _as_it_is(returned: Any) -> Any:
    return list(islice(returned, MOST_READ)) if isinstance(returned, Iterator) else returned


class Hooks:
    """The hooks of the plugins one model composes: its own plugin manager, one plugin at a time."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._manager = manager()
        for plugin in self.plugins:
            self._manager.register(plugin.module, plugin.name)

    def call(self, plugin: Plugin, hook: str, take: Callable[[Any], Any] = _as_it_is, **arguments: object) -> Any:
        """Call ``hook`` of one plugin; None when it does not implement the hook, or returns None.

        Args:
            plugin: whose hook.
            hook: its name.
            take: makes plain data of what the hook returned; runs as the plugin's own code.
            arguments: the hook's; a `Target` is copied.

        Raises:
            PluginError: the hook or `take` raised, or they did not end in time.
        """
        caller = self._caller(plugin, hook)
        given = {name: replace(value) if isinstance(value, Target) else value for name, value in arguments.items()}

        def code() -> Any:
            returned = next(iter(caller(**given)), None)
            return None if returned is None else take(returned)

        return plugin.run(hook, code, foreign.hook_seconds())

    def call_each(
        self,
        plugin: Plugin,
        hook: str,
        take: Callable[[Iterable[Any]], T],
        name: str,
        values: Iterable[object],
        **arguments: object,
    ) -> T | None:
        """Call ``hook`` of one plugin for each value of its parameter `name`, in the time of one call.

        None when the plugin does not implement it; else what `take` makes of all the answers. See `call`.
        """
        implementations = self._caller(plugin, hook).get_hookimpls()
        if not implementations:
            return None
        function, names = implementations[0].function, implementations[0].argnames

        def code() -> T:
            given = ({**arguments, name: value} for value in values)
            return take(function(*(one[parameter] for parameter in names)) for one in given)

        return plugin.run(hook, code, foreign.hook_seconds())  # type: ignore[no-any-return]

    def _caller(self, plugin: Plugin, hook: str) -> pluggy.HookCaller:
        others = [other.module for other in self.plugins if other is not plugin]
        return self._manager.subset_hook_caller(hook, others)


def _refusing(suffix: str, why: str) -> Reader:
    """A reader for files that several plugins claim."""

    def read(source: Source, names: tuple[str, ...]) -> Contents:
        raise UsageError(f"{names[0]}: {why}\n  fix: leave all but one of them out with QUANTSERVE_DISABLE")

    return Reader((suffix,), read)


def how_to_install(name: str) -> str:
    """What to do about a plugin that is not installed; a command only for the methods of this project.

    The name may come from a stranger's config.json, so it never becomes part of a command to copy.
    """
    if name in OURS:
        return f"`pip install 'quantserve[{name}]'`"
    return "install the plugin that serves it, if there is one; `quantserve list` shows what is installed"
