"""Discovery of plugins, one by one, so that a broken one harms nobody else.

Every entry point of the group ``quantserve.plugins`` is imported, checked against the hook contracts
and asked for its method on its own; what goes wrong is kept as a `Failure` and raised only for a model
that needs the plugin. A `Registry` is an instance: tests and servers build their own.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from types import ModuleType
from typing import Any

import pluggy

from quantserve import hookspecs
from quantserve.errors import PluginError, UsageError, one_line, unknown_name
from quantserve.method import Method

GROUP = "quantserve.plugins"
ENGINE_GROUP = "vllm.general_plugins"
# VLLM_PLUGINS filters these groups by name as well; what is installed there is not ours to drop.
OTHER_ENGINE_GROUPS = ("vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")

HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("quantserve_")}


@dataclass(frozen=True)
class Plugin:
    """A plugin that loaded and keeps the contracts.

    Attributes:
        name: entry-point name.
        distribution, version: where it was installed from.
        module: the light module with the hook implementations.
        method: the quantization method it serves, or None for a plugin listed under ``plugins:``.
        has_engine_side: whether vLLM must load its ``vllm.general_plugins`` twin.
    """

    name: str
    distribution: str
    version: str
    module: ModuleType
    method: Method | None
    has_engine_side: bool

    def defect(self, stage: str, reason: str) -> PluginError:
        """The error that blames this plugin."""
        return PluginError(self.name, self.distribution, self.version, stage, reason)


@dataclass(frozen=True)
class Failure:
    """A plugin that is installed and cannot be used; a row in ``quantserve list``.

    Attributes:
        stage: ``duplicate``, ``load``, ``hooks``, ``method``, ``names`` or ``engine``.
        reason: one line.
        claims: method names it would have served, when it got as far as saying so.
    """

    name: str
    distribution: str
    version: str
    stage: str
    reason: str
    claims: tuple[str, ...] = ()
    cause: BaseException | None = None

    def error(self) -> PluginError:
        """The same as an exception, chained to its cause."""
        error = PluginError(self.name, self.distribution, self.version, self.stage, self.reason)
        error.__cause__ = self.cause
        return error


@dataclass(frozen=True)
class Disabled:
    """A plugin left out by ``QUANTSERVE_PLUGINS`` or ``QUANTSERVE_DISABLE``."""

    name: str
    distribution: str
    version: str
    reason: str


@dataclass(frozen=True)
class Registry:
    """The plugins of this environment.

    Attributes:
        plugins: usable plugins by entry-point name.
        failures: plugins that are installed and broken.
        disabled: plugins left out from outside.
        other_engine_plugins: names in vLLM's other plugin groups, which ``VLLM_PLUGINS`` must keep.
        notes: remarks for ``quantserve list``, such as an unknown name in ``QUANTSERVE_DISABLE``.
    """

    plugins: Mapping[str, Plugin]
    failures: tuple[Failure, ...] = ()
    disabled: tuple[Disabled, ...] = ()
    other_engine_plugins: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, installed: EntryPoints | None = None) -> Registry:
        """Discover what is installed. Never raises for a plugin's fault."""
        points = entry_points() if installed is None else installed
        allowed = _names(environ.get("QUANTSERVE_PLUGINS"))
        denied = _names(environ.get("QUANTSERVE_DISABLE")) or frozenset()
        engine_side = defaultdict(set)
        for point in points.select(group=ENGINE_GROUP):
            engine_side[point.name].add(_origin(point)[0])

        plugins: list[Plugin] = []
        failures: list[Failure] = []
        disabled: list[Disabled] = []
        found = sorted(_unique(points.select(group=GROUP)), key=lambda point: (point.name, _origin(point)))
        owners = defaultdict(list)
        for point in found:
            owners[point.name].append(_origin(point))
        for point in found:
            distribution, version = _origin(point)
            left_out = _left_out(point.name, allowed, denied)
            if left_out:
                disabled.append(Disabled(point.name, distribution, version, left_out))
            elif len(owners[point.name]) > 1:
                names = " and ".join(f"{d} {v}" for d, v in owners[point.name])
                reason = f"entry-point name {point.name!r} is claimed by {names}; neither is used"
                failures.append(Failure(point.name, distribution, version, "duplicate", reason))
            else:
                loaded = _load(point, engine_side[point.name])
                (plugins if isinstance(loaded, Plugin) else failures).append(loaded)  # type: ignore[arg-type]

        plugins, clashes = _drop_clashes(plugins)
        unknown = sorted((denied | (allowed or frozenset())) - set(owners))
        return cls(
            plugins={plugin.name: plugin for plugin in plugins},
            failures=(*failures, *clashes),
            disabled=tuple(disabled),
            other_engine_plugins=tuple(
                sorted({point.name for group in OTHER_ENGINE_GROUPS for point in points.select(group=group)})
            ),
            notes=tuple(
                f"QUANTSERVE_PLUGINS / QUANTSERVE_DISABLE: {unknown_name('plugin', name, owners)}" for name in unknown
            ),
        )

    @property
    def methods(self) -> dict[str, Plugin]:
        """Method plugins by method name and alias."""
        return {name: p for p in self.plugins.values() if p.method for name in p.method.names}

    def find_method(self, name: str, where: str = "") -> Plugin:
        """The plugin that serves the method ``name``.

        Raises:
            PluginError: the plugin that would serve it is broken.
            UsageError: nothing installed serves it, or it is switched off.
        """
        if plugin := self.methods.get(name):
            return plugin
        return self._missing("quantization method", name, self.methods, where)

    def find_plugin(self, name: str, where: str = "") -> Plugin:
        """The plugin with entry-point name ``name``; raises like `find_method`."""
        if plugin := self.plugins.get(name):
            return plugin
        return self._missing("plugin", name, self.plugins, where)

    def vllm_plugins(self, composed: Iterable[Plugin]) -> str:
        """The value of ``VLLM_PLUGINS`` that loads the engine sides of ``composed`` and no others."""
        ours = [plugin.name for plugin in composed if plugin.has_engine_side]
        return ",".join(sorted({*ours, *self.other_engine_plugins}))

    def _missing(self, what: str, name: str, known: Iterable[str], where: str) -> Plugin:
        for failure in self.failures:
            if name == failure.name or name in failure.claims:
                raise failure.error()
        prefix = f"{where}: " if where else ""
        for entry in self.disabled:
            if name == entry.name:
                raise UsageError(f"{prefix}{what} {name!r} ({entry.distribution}) is switched off: {entry.reason}")
        raise UsageError(
            f"{prefix}{unknown_name(what, name, known)}\n"
            f"  fix: install the plugin that serves it, e.g. `pip install quantserve-{name}`; "
            "`quantserve list` shows what is installed"
        )


class Hooks:
    """The hooks of the plugins one model composes: its own plugin manager, one plugin at a time."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._manager = _manager()
        for plugin in self.plugins:
            self._manager.register(plugin.module, plugin.name)

    def call(self, plugin: Plugin, hook: str, **arguments: object) -> Any:
        """Call ``hook`` of one plugin; None when it does not implement the hook.

        Raises:
            PluginError: the hook raised.
        """
        others = [other.module for other in self.plugins if other is not plugin]
        caller = self._manager.subset_hook_caller(hook, others)
        try:
            results = caller(**arguments)
            # A generator hook runs here, where its exceptions are still this plugin's.
            return list(results[0]) if results and inspect.isgenerator(results[0]) else next(iter(results), None)
        except Exception as error:
            raise plugin.defect(hook, one_line(error)) from error


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _names(value: str | None) -> frozenset[str] | None:
    """Names of a comma-separated variable; None when unset, empty set when empty."""
    return None if value is None else frozenset(name.strip() for name in value.split(",") if name.strip())


def _left_out(name: str, allowed: frozenset[str] | None, denied: frozenset[str]) -> str:
    if name in denied:
        return "named in QUANTSERVE_DISABLE"
    if allowed is not None and name not in allowed:
        return "not named in QUANTSERVE_PLUGINS"
    return ""


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Distribution name and version of an entry point."""
    dist = point.dist
    return (dist.name or "unknown distribution", dist.version or "?") if dist else ("unknown distribution", "?")


def _unique(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Drop what one distribution seen twice on sys.path repeats word for word."""
    return list({(point.name, point.value, _origin(point)[0]): point for point in points}.values())


def _load(point: EntryPoint, engine_owners: set[str]) -> Plugin | Failure:
    distribution, version = _origin(point)

    def failure(stage: str, reason: str, claims: tuple[str, ...] = (), cause: BaseException | None = None) -> Failure:
        return Failure(point.name, distribution, version, stage, reason, claims, cause)

    try:
        module = point.load()
    except (Exception, SystemExit) as error:
        return failure("load", one_line(error), cause=error)
    if reason := _contract_breach(module):
        return failure("hooks", reason)
    manager = _manager()
    try:
        manager.register(module, point.name)
        manager.check_pending()
    except Exception as error:
        return failure("hooks", one_line(error), cause=error)
    try:
        method = next(iter(manager.hook.quantserve_method()), None)
    except (Exception, SystemExit) as error:
        return failure("method", one_line(error), cause=error)
    if method is not None and (reason := _bad_method(method)):
        return failure("method", reason)
    strangers = engine_owners - {distribution}
    if distribution in engine_owners and strangers:
        reason = f"the name {point.name!r} in {ENGINE_GROUP} is claimed by {' and '.join(sorted(engine_owners))}"
        return failure("engine", reason, method.names if method else ())
    return Plugin(point.name, distribution, version, module, method, distribution in engine_owners)


def _contract_breach(module: ModuleType) -> str:
    """What pluggy would let pass in silence: unmarked hooks and keyword-only parameters."""
    if not hasattr(module, "__dict__"):
        return f"the entry point names {type(module).__name__!r}, not a module"
    for name, function in vars(module).items():
        if not name.startswith("quantserve_") or not inspect.isfunction(function):
            continue
        if not hasattr(function, f"{hookspecs.PROJECT}_impl"):
            if name in HOOKS:
                return f"{name} lacks the @hookimpl decorator"
            continue
        if name not in HOOKS:
            return f"{name} is not a hook: {unknown_name('hook', name, HOOKS)}"
        known = list(inspect.signature(HOOKS[name]).parameters)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                return (
                    f"{name}{inspect.signature(function)}: parameter {parameter.name!r} must be a plain positional one"
                )
            if parameter.name not in known:
                return (
                    f"{name}{inspect.signature(function)}: unknown parameter {parameter.name!r}; the hook has {known}"
                )
    return ""


def _bad_method(method: object) -> str:
    if not isinstance(method, Method):
        return f"quantserve_method returned {type(method).__name__}, not quantserve.api.Method"
    for name in method.names:
        if not isinstance(name, str) or not name or name != name.lower() or name.strip() != name:
            return f"method name {name!r} must be a lower-case word"
    repeated = [name for name, count in Counter(method.names).items() if count > 1]
    return f"method name {repeated[0]!r} is given twice" if repeated else ""


def _drop_clashes(plugins: list[Plugin]) -> tuple[list[Plugin], list[Failure]]:
    """Take out every plugin that claims a method name or alias another one claims as well."""
    claimants: dict[str, list[Plugin]] = defaultdict(list)
    for plugin in plugins:
        for name in plugin.method.names if plugin.method else ():
            claimants[name].append(plugin)
    reasons: dict[str, str] = {}
    for name, owners in claimants.items():
        if len(owners) > 1:
            who = " and ".join(f"{p.name} ({p.distribution} {p.version})" for p in owners)
            for plugin in owners:
                reasons.setdefault(plugin.name, f"method name {name!r} is claimed by {who}; neither is used")
    failures = [
        Failure(p.name, p.distribution, p.version, "names", reasons[p.name], p.method.names if p.method else ())
        for p in plugins
        if p.name in reasons
    ]
    return [plugin for plugin in plugins if plugin.name not in reasons], failures
