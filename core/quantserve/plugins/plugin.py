"""One plugin of this environment: loaded, failed or switched off."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, Final

import pluggy

import quantserve.api  # so that the first plugin's import time is its own
from quantserve import __version__, hookspecs
from quantserve.checkpoint.containers import Reader
from quantserve.errors import PluginError, QuantserveError, UsageError, one_line
from quantserve.method import Method
from quantserve.plugins import foreign
from quantserve.plugins.contract import method_of, module_breach
from quantserve.plugins.entry_points import origin, package_of, resolve, unmet_requirement
from quantserve.plugins.readers import reader_of

HEAVY: Final[tuple[str, ...]] = ("torch", "vllm", "ray", "transformers")
"""Packages that a light module must not bring in."""
SLOW_S: Final = 1.0


@dataclass(frozen=True)
class Plugin:
    """A plugin that loaded and keeps the contracts.

    Attributes:
        name: entry-point name.
        distribution, version: where it was installed from.
        module: the light module with the hook implementations.
        method: the quantization method it serves, or None for a plugin listed under ``plugins:``.
        has_engine_side: whether the processes of vLLM must call its ``vllm.general_plugins`` twin.
        import_s: seconds that importing the module took.
        notes: remarks for ``quantserve list``, such as an alias that belongs to another plugin.
        reader: of the containers it teaches the core to read; None for none.
        overdue: hooks that did not end in time, with the error; they are not called again.
    """

    name: str
    distribution: str
    version: str
    module: ModuleType
    method: Method | None
    has_engine_side: bool
    import_s: float = 0.0
    notes: tuple[str, ...] = ()
    reader: Reader | None = None
    overdue: dict[str, PluginError] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        """``awq (quantserve-awq 0.1.0)``."""
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def package(self) -> str:
        """First part of the module's name."""
        return self.module.__name__.partition(".")[0]

    def defect(self, stage: str, reason: str) -> PluginError:
        """The error that blames this plugin."""
        return PluginError(self.name, self.distribution, self.version, stage, reason)

    def run(self, stage: str, code: Callable[[], Any], seconds: float) -> Any:
        """Run code of this plugin.

        Raises:
            PluginError: it failed, or did not end in time; then it is not run again.
        """
        if stage in self.overdue:
            raise self.overdue[stage]
        try:
            return foreign.run(code, f"plugin {self.label} at stage {stage!r}", seconds)
        except foreign.Raised as raised:
            error = self.defect(stage, foreign.reason(raised.error, self.package))
            if isinstance(raised.error, foreign.Late):
                self.overdue[stage] = error
            raise error from raised.error

    @contextmanager
    def tool(self, stage: str, *, alone: bool = True) -> Iterator[None]:
        """Run this plugin's quantizer or converter in the block.

        Args:
            stage: ``quantizer`` or ``converter``.
            alone: whether all of the block is the plugin's; else it answers for exceptions that pass its code.

        Raises:
            UsageError: a file cannot be read or written.
            PluginError: the plugin's code raised what is no mistake of the user.
        """
        try:
            yield
        except QuantserveError:
            raise
        except OSError as error:
            said = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
            raise UsageError(f"{stage} of plugin {self.label}: {said}") from error
        except Exception as error:
            if not alone and not foreign.passes(error, self.package):
                raise
            raise self.defect(stage, foreign.reason(error, self.package)) from error

    def load_callable(self, reference: object) -> Callable[..., Any]:
        """Import the heavy ``"module:callable"`` that one of this plugin's hooks named.

        Raises:
            PluginError: it is no such text, or cannot be imported.
            UsageError: it needs a package that is not installed, such as torch.
        """
        if not isinstance(reference, str) or not all(reference.partition(":")):
            raise self.defect("import", f"{reference!r:.200} is not 'module:callable'")
        module, _, name = reference.partition(":")
        try:
            found = foreign.run(lambda: getattr(import_module(module), name), f"plugin {self.label}", 0)
        except foreign.Raised as raised:
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
            raise self.defect("import", foreign.reason(error, self.package)) from error
        if not callable(found):
            raise self.defect("import", f"{reference} is a {type(found).__name__} and cannot be called")
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Failure:
    """A plugin that is installed and cannot be used; a row in ``quantserve list``.

    Attributes:
        stage: ``duplicate``, ``requires``, ``load``, ``hooks``, ``method``, ``reader`` or ``names``.
        reason: one line.
        claims: method names it would have served, when it got as far as saying so.
        fix: what to do, where it is not to upgrade, uninstall or disable this plugin.
    """

    name: str
    distribution: str
    version: str
    stage: str
    reason: str
    claims: tuple[str, ...] = ()
    fix: str = ""
    cause: BaseException | None = None

    @property
    def label(self) -> str:
        """``awq (quantserve-awq 0.1.0)``."""
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def advice(self) -> str:
        """What to do."""
        return self.error().fix

    def error(self) -> PluginError:
        """The same as an exception, chained to its cause."""
        error = PluginError(self.name, self.distribution, self.version, self.stage, self.reason, self.fix)
        error.__cause__ = self.cause
        return error


@dataclass(frozen=True)
class Disabled:
    """A plugin left out by ``QUANTSERVE_PLUGINS`` or ``QUANTSERVE_DISABLE``."""

    name: str
    distribution: str
    version: str
    reason: str

    @property
    def label(self) -> str:
        """``awq (quantserve-awq 0.1.0)``."""
        return f"{self.name} ({self.distribution} {self.version})"


class _Manager(pluggy.PluginManager):
    """A manager that looks for hooks among the functions of a module only; pluggy inspects every object in it."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """The options that ``@hookimpl`` gave a function; None for anything else."""
        found = vars(plugin).get(name)
        return getattr(found, f"{self.project_name}_impl", None) if inspect.isfunction(found) else None


def manager() -> pluggy.PluginManager:
    """A plugin manager that knows the hooks."""
    made = _Manager(hookspecs.PROJECT)
    made.add_hookspecs(hookspecs)
    return made


def load(point: EntryPoint, has_engine_side: bool, seconds: float) -> Plugin | Failure:
    """Import a plugin's module, check its hooks and ask for its method and reader.

    Args:
        point: its entry point.
        has_engine_side: see `Plugin`.
        seconds: time limit of a hook; all of this may take 6 times as long, 0 is no limit.
    """
    distribution, version = origin(point)
    label = f"{point.name} ({distribution} {version})"

    def failure(stage: str, reason: str, fix: str = "", cause: BaseException | None = None) -> Failure:
        return Failure(point.name, distribution, version, stage, reason, fix=fix, cause=cause)

    if unmet := unmet_requirement(point):
        return failure("requires", *unmet)
    if os.environ.get("QUANTSERVE_DEBUG"):
        foreign.say(f"importing plugin {label}")
    heavy = set(HEAVY) & sys.modules.keys()
    loading = _Loading(point)
    try:
        limit = seconds * foreign.IMPORT_PARTS
        module, method, reader = foreign.run(loading, f"loading plugin {label}", limit, f"loading plugin {label} ...")
    except foreign.Raised as raised:
        error = raised.error
        fix = ""
        if isinstance(error, ImportError) and error.name == quantserve.api.__name__:
            fix = f"upgrade quantserve, which is {__version__} here, or install the version of {distribution} for it"
        elif isinstance(error, _OtherApi):
            fix = error.fix(distribution)
        return failure(loading.stage, foreign.reason(error, package_of(point)), fix, error)
    brought = [name for name in HEAVY if name in sys.modules and name not in heavy]
    return Plugin(
        point.name,
        distribution,
        version,
        module,
        method,
        has_engine_side,
        loading.import_s,
        _import_notes(point.name, distribution, loading.import_s, brought),
        reader,
    )


class _OtherApi(foreign.Breach):
    """A plugin for another version of the plugin API."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        super().__init__(
            f"it was written for version {wanted} of the plugin API; quantserve {__version__} has version "
            f"{hookspecs.API_VERSION}"
        )

    def fix(self, distribution: str) -> str:
        """Which of the two has to change."""
        return f"upgrade {'quantserve' if self._wanted > hookspecs.API_VERSION else distribution}"


class _Loading:
    """What loading a plugin runs of its code, in one call, because each call of `foreign.run` has its price.

    Attributes:
        stage: how far it got, see `Failure`.
        import_s: seconds that the import took.
    """

    def __init__(self, point: EntryPoint) -> None:
        self._point = point
        self.stage = "load"
        self.import_s = 0.0

    def __call__(self) -> tuple[ModuleType, Method | None, Reader | None]:
        """The module, its method and its reader.

        Raises:
            Breach: the plugin does not keep a contract.
        """
        began = time.monotonic()
        module = resolve(self._point)
        self.import_s = time.monotonic() - began
        self.stage = "hooks"
        if reason := module_breach(module):
            raise foreign.Breach(reason)
        hooks = manager()
        hooks.register(module, self._point.name)
        hooks.check_pending()
        self.stage = "method"
        method = self._method(hooks)
        self.stage = "reader"
        read = next(iter(hooks.hook.quantserve_reader()), None)
        return module, method, None if read is None else reader_of(read)

    def _method(self, hooks: pluggy.PluginManager) -> Method | None:
        said = next(iter(hooks.hook.quantserve_method()), None)
        if said is None:
            return None
        method = method_of(said)
        if method.api != hookspecs.API_VERSION:
            raise _OtherApi(method.api)
        return method


def _import_notes(name: str, distribution: str, seconds: float, brought: list[str]) -> tuple[str, ...]:
    """What every command pays for this plugin, when that is much."""
    if seconds < SLOW_S and not brought:
        return ()
    cost = f"importing plugin {name!r} of {distribution} took {seconds:.1f} s"
    what = f" and brought in {', '.join(brought)}" if brought else ""
    return (f"{cost}{what}, in every command; a light module imports quantserve.api and the standard library",)
