"""Discovery of plugins, one by one, so that a broken one harms nobody else.

Every entry point of the group ``quantserve.plugins`` is imported, checked against the hook contracts
and asked for its method on its own; what goes wrong is kept as a `Failure` and raised only for a model
that needs the plugin. A `Registry` is an instance: tests and servers build their own.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, PackageNotFoundError, distributions, entry_points, metadata
from types import ModuleType
from typing import Any

import pluggy

from quantserve import hookspecs
from quantserve.contract import method_breach, module_breach
from quantserve.errors import PluginError, UsageError, one_line, unknown_name
from quantserve.method import Method

GROUP = "quantserve.plugins"
ENGINE_GROUP = "vllm.general_plugins"
# VLLM_PLUGINS filters these groups by name as well; what is installed there is not ours to drop.
OTHER_ENGINE_GROUPS = ("vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
GROUPS = (GROUP, ENGINE_GROUP, *OTHER_ENGINE_GROUPS)


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

    def load_callable(self, reference: object) -> Callable[..., Any]:
        """Import the heavy ``"module:callable"`` that one of this plugin's hooks named.

        Raises:
            PluginError: it is no such text, or cannot be imported.
            UsageError: it needs a package that is not installed, such as torch.
        """
        if not isinstance(reference, str) or not all(reference.partition(":")):
            raise self.defect("import", f"{reference!r} is not 'module:callable'")
        module, _, name = reference.partition(":")
        try:
            with _foreign_code():
                found = getattr(import_module(module), name)
        except _Raised as raised:
            error = raised.error
            if (
                isinstance(error, ModuleNotFoundError)
                and error.name
                and error.name.partition(".")[0] != module.partition(".")[0]
            ):
                raise UsageError(
                    f"{self.name} needs the package {error.name!r}, which is not installed\n"
                    "  fix: install the engine, `pip install 'quantserve[cpu]'` or `'quantserve[cuda]'`"
                ) from error
            raise self.defect("import", one_line(error)) from error
        if not callable(found):
            raise self.defect("import", f"{reference} is a {type(found).__name__} and cannot be called")
        return found  # type: ignore[no-any-return]


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
        points, notes = _installed() if installed is None else (installed, [])
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
            notes=(
                *notes,
                *(
                    f"QUANTSERVE_PLUGINS / QUANTSERVE_DISABLE: {unknown_name('plugin', name, owners)}"
                    for name in unknown
                ),
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

    def why_unusable(self, name: str, what: str = "quantization method", where: str = "") -> None:
        """Raise when a plugin of this name, or one that claims this method, is installed but cannot be used.

        Raises:
            PluginError: it is broken.
            UsageError: it is switched off.
        """
        for failure in self.failures:
            if name == failure.name or name in failure.claims:
                raise failure.error()
        prefix = f"{where}: " if where else ""
        for entry in self.disabled:
            if name == entry.name:
                raise UsageError(f"{prefix}{what} {name!r} ({entry.distribution}) is switched off: {entry.reason}")

    def _missing(self, what: str, name: str, known: Iterable[str], where: str) -> Plugin:
        self.why_unusable(name, what, where)
        prefix = f"{where}: " if where else ""
        raise UsageError(f"{prefix}{unknown_name(what, name, known)}\n  fix: {how_to_install(name)}")


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
            with _foreign_code():
                result = next(iter(caller(**arguments)), None)
                # Generators, map objects and the like run here, where their exceptions are still this plugin's.
                return list(result) if isinstance(result, Iterator) else result
        except _Raised as raised:
            raise plugin.defect(hook, one_line(raised.error)) from raised.error


class _Raised(Exception):
    """What code of a plugin raised."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _foreign_code() -> Iterator[None]:
    """Run a plugin's code: its prints go to stderr, because stdout may be JSON; whatever it raises is a `_Raised`.

    A KeyboardInterrupt stays one: the person at the keyboard may have meant us.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit and pytest.skip are no Exceptions
        raise _Raised(error) from error


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def how_to_install(name: str) -> str:
    """What to do about a plugin that is not installed; a command only for the project's own extras.

    The name may come from a stranger's config.json, so it never becomes part of a command to copy.
    """
    try:
        ours = metadata("quantserve").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        ours = []
    if name in ours:
        return f"`pip install 'quantserve[{name}]'`"
    return "install the plugin that serves it, if there is one; `quantserve list` shows what is installed"


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


def _installed() -> tuple[EntryPoints, list[str]]:
    """The entry points of our groups; where a distribution's file cannot be parsed, those of the others and a note."""
    try:
        every = entry_points()
        return EntryPoints(point for group in GROUPS for point in every.select(group=group)), []
    except Exception:
        found: list[EntryPoint] = []
        notes = []
        for dist in distributions():
            try:
                found += dist.entry_points
            except Exception as error:
                notes.append(f"entry_points.txt of {dist.name} cannot be read: {one_line(error)}")
        return EntryPoints(found), notes


def _unique(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Drop what one distribution seen twice on sys.path repeats word for word."""
    return list({(point.name, point.value, _origin(point)[0]): point for point in points}.values())


def _load(point: EntryPoint, engine_owners: set[str]) -> Plugin | Failure:
    distribution, version = _origin(point)

    def failure(stage: str, reason: str, claims: tuple[str, ...] = (), cause: BaseException | None = None) -> Failure:
        return Failure(point.name, distribution, version, stage, reason, claims, cause)

    stage = "load"
    try:
        with _foreign_code():
            module = point.load()
            stage = "hooks"
            if reason := module_breach(module):
                return failure(stage, reason)
            manager = _manager()
            manager.register(module, point.name)
            manager.check_pending()
            stage = "method"
            method = next(iter(manager.hook.quantserve_method()), None)
            if method is not None and (reason := method_breach(method)):
                return failure(stage, reason)
    except _Raised as raised:
        return failure(stage, one_line(raised.error), cause=raised.error)
    strangers = engine_owners - {distribution}
    if distribution in engine_owners and strangers:
        reason = f"the name {point.name!r} in {ENGINE_GROUP} is claimed by {' and '.join(sorted(engine_owners))}"
        return failure("engine", reason, method.names if method else ())
    return Plugin(point.name, distribution, version, module, method, distribution in engine_owners)


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
