"""What another distribution adds beside plugins, through an entry point: a command, a page.

A defect stays with its extension: it is an error when that extension is used, and of no other one.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, TypeVar

from quantserve.errors import PluginError, QuantserveError, UsageError
from quantserve.plugins import foreign
from quantserve.plugins.entry_points import duplicate, left_out, origin, package_of, resolve, unmet_requirement
from quantserve.text import harmless

E = TypeVar("E", bound="Extension")


@dataclass(frozen=True)
class Extension:
    """Something of another distribution.

    Attributes:
        name: of the entry point.
        distribution, version: where it was installed from.
        point: the entry point.
        ours: whether it is one of this project's, so that its defects are bugs of quantserve.
        refusal: why it cannot be used, whatever its module holds.
    """

    kind: ClassVar[str]

    name: str
    distribution: str
    version: str
    point: EntryPoint
    ours: bool = False
    refusal: QuantserveError | None = None

    @classmethod
    def of(cls: type[E], point: EntryPoint) -> E:
        """What an entry point stands for."""
        return cls(point.name, *origin(point), point)

    @property
    def origin(self) -> str:
        """``quantserve-hello 1.0``, harmless for a terminal."""
        return harmless(f"{self.distribution} {self.version}", 100)

    def load(self, seconds: float | None = None) -> Any:
        """Import what the entry point names.

        Args:
            seconds: time limit; default: that of plugins.

        Raises:
            PluginError: it is defective, or its name belongs to another distribution.
            UsageError: it is switched off.
        """
        if self.refusal:
            raise self.refusal
        if unmet := unmet_requirement(self.point):
            raise self.defect("requires", *unmet)
        what = f"{self.kind} {self.name} ({self.origin})"
        if os.environ.get("QUANTSERVE_DEBUG"):
            foreign.say(f"importing {what}")
        try:
            limit = foreign.hook_seconds() * foreign.IMPORT_PARTS if seconds is None else seconds
            return foreign.run(self._resolve, what, limit, f"loading {what} ...")
        except foreign.Raised as raised:
            raise self.blame(raised.error, "load") from raised.error

    def blame(self, error: BaseException, stage: str = "run") -> PluginError:
        """The error that blames this extension for an exception of its code."""
        return self.defect(stage, foreign.reason(error, package_of(self.point)))

    def defect(self, stage: str, reason: str, fix: str = "") -> PluginError:
        """The error that blames this extension."""
        return PluginError(self.name, self.distribution, self.version, stage, reason, fix, kind=self.kind)

    def problem(self, found: object) -> str:
        """Why what the entry point names is not usable; "" when it is."""
        raise NotImplementedError

    def _resolve(self) -> Any:
        found = resolve(self.point)
        if problem := self.problem(found):
            raise foreign.Breach(f"{self.point.value!r:.80} {problem}")
        return found


def switched_off(extension: Extension, denied: frozenset[str]) -> UsageError | None:
    """The error of an extension that is named in ``QUANTSERVE_DISABLE``; None when it is not."""
    if not (off := left_out(extension.point, None, denied)):
        return None
    return UsageError(
        f"{extension.kind} {extension.name!r} of {extension.origin} is switched off: {off}\n"
        "  fix: remove it from QUANTSERVE_DISABLE"
    )


def without_rivals(extensions: Sequence[E]) -> list[E]:
    """The extensions, of which those refuse whose name belongs to another one; see `entry_points.duplicate`."""
    owners = defaultdict(list)
    for one in extensions:
        if not one.refusal:
            owners[one.name].append((one.distribution, one.version))
    made = []
    for one in extensions:
        clash = None if one.refusal else duplicate(one.name, owners[one.name], one.distribution)
        made.append(replace(one, refusal=one.defect("duplicate", *clash)) if clash else one)
    return made
