"""Who sets what: values of the core, of plugins and of the user, merged, with conflicts between plugins named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantserve.finding import Finding

CORE: Final = "core"
CONFIG: Final = "config"
_MERGED: Final = frozenset({"hf_overrides"})
"""Arguments that are merged field by field, because several plugins may each set a part of them."""

Path = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A value and who set it: ``core``, ``config``, a plugin's name, or several of these with commas."""

    value: object
    source: str

    @property
    def sources(self) -> tuple[str, ...]:
        """All who set a part of the value."""
        return tuple(self.source.split(", "))


class Settings:
    """Values by name. A later source replaces the core's values; of two plugins the first keeps its own.

    Args:
        section: where a user sets such values: ``engine_kwargs``.
        users: what the user sets, which wins.
    """

    def __init__(self, section: str, users: Mapping[str, object]) -> None:
        self.conflicts: list[Finding] = []
        self._section = section
        self._users = dict(_leaves(users))
        self._leaves: dict[Path, Setting] = {}

    def add(self, source: str, values: Mapping[str, object]) -> None:
        """Add the values of the core or of a plugin."""
        for path, value in _leaves(values):
            rivals = list(_overlapping(path, self._leaves))
            others = [rival for rival in rivals if self._leaves[rival].source not in (CORE, source)]
            if not others:
                for rival in rivals:
                    del self._leaves[rival]
                self._leaves[path] = Setting(value, source)
            elif not any(_overlapping(path, self._users)):
                self._compare(path, value, source, others[0])

    def _compare(self, path: Path, value: object, source: str, other: Path) -> None:
        first = self._leaves[other]
        if other == path and first.value == value:
            return
        message = f"{first.source} sets {'.'.join(other)}={first.value!r} and {source} sets {'.'.join(path)}={value!r}"
        fix = f"set {'.'.join(path)} in {self._section}, which wins, or drop one of the two plugins"
        self.conflicts.append(Finding.error("plugins-conflict", message, (first.source, source), fix).said_by(CORE))

    def merged(self) -> dict[str, Setting]:
        """The values by name, the user's included, without those that are None."""
        leaves = dict(self._leaves)
        for path, value in self._users.items():
            for rival in list(_overlapping(path, leaves)):
                del leaves[rival]
            leaves[path] = Setting(value, CONFIG)
        made: dict[str, Setting] = {}
        merged: dict[str, dict[str, Any]] = {}
        for (name, *rest), setting in leaves.items():
            if rest:
                fields = merged.setdefault(name, {})
                _put(fields, rest, setting.value)
                sources = (*made[name].sources, setting.source) if name in made else (setting.source,)
                made[name] = Setting(fields, ", ".join(dict.fromkeys(sources)))
            else:
                made[name] = setting
        return {name: setting for name, setting in made.items() if setting.value is not None}


def _leaves(values: Mapping[str, object]) -> Iterator[tuple[Path, object]]:
    for name, value in values.items():
        if name in _MERGED and isinstance(value, Mapping):
            yield from _fields((name,), value)
        else:
            yield (name,), value


def _fields(path: Path, value: object) -> Iterator[tuple[Path, object]]:
    if isinstance(value, Mapping) and value:
        for key, field in value.items():
            yield from _fields((*path, str(key)), field)
    else:
        yield path, value


def _overlapping(path: Path, among: Iterable[Path]) -> Iterator[Path]:
    """Paths of the same value, of a part of it or of what it is a part of."""
    return (other for other in among if all(a == b for a, b in zip(path, other, strict=False)))


def _put(mapping: dict[str, Any], path: list[str], value: object) -> None:
    for key in path[:-1]:
        mapping = mapping.setdefault(key, {})
    mapping[path[-1]] = value
