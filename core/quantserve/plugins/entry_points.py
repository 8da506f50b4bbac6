"""Entry points of installed distributions: found, whose a name is, and imported.

Of several distributions with one entry-point name the one called ``quantserve-NAME`` keeps it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, EntryPoints, distributions, entry_points
from typing import Any, Final

from quantserve import __version__
from quantserve.errors import one_line
from quantserve.plugins import foreign

RESERVED: Final = ("core", "config", "quantserve")
"""Entry-point names that would be taken for someone else in findings and in the provenance of engine arguments."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)


def installed(groups: Sequence[str]) -> tuple[EntryPoints, list[str]]:
    """The entry points of these groups; if a distribution's file cannot be parsed, those of the others and a note."""
    try:
        every = entry_points()
        return EntryPoints(point for group in groups for point in every.select(group=group)), []
    except Exception:
        found: list[EntryPoint] = []
        notes = []
        for dist in distributions():
            try:
                found += dist.entry_points
            except Exception as error:
                notes.append(f"entry_points.txt of {dist.name} cannot be read: {one_line(error)}")
        return EntryPoints(found), notes


def unique(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Drop what one distribution seen twice on sys.path repeats word for word."""
    return list({(point.name, point.value, origin(point)[0]): point for point in points}.values())


def origin(point: EntryPoint) -> tuple[str, str]:
    """Distribution name and version of an entry point."""
    return _named(point.dist) if point.dist else ("unknown distribution", "?")


def _named(dist: Distribution) -> tuple[str, str]:
    name, version = (next(iter(_headers(dist).get(key, ())), "") for key in ("name", "version"))
    return name or "unknown distribution", version or "?"


@lru_cache
def _headers(dist: Distribution) -> dict[str, list[str]]:
    """Lines of a distribution's metadata by lower-case name; importlib.metadata parses the file for each of them."""
    text = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or ""
    headers = defaultdict(list)
    for line in text.partition("\n\n")[0].splitlines():
        name, colon, value = line.partition(":")
        if colon and not name[:1].isspace():
            headers[name.lower()].append(value.strip())
    return dict(headers)


def package_of(point: EntryPoint) -> str:
    """First part of the name of the module that an entry point names."""
    return point.value.replace(":", ".").partition(".")[0].strip()


def resolve(point: EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        Breach: its value is no ``module`` or ``module:name``.
    """
    if not point.pattern.match(point.value):
        raise foreign.Breach(f"the entry point's value {point.value!r:.80} is no 'module' or 'module:name'")
    return point.load()


def unmet_requirement(point: EntryPoint) -> tuple[str, str] | None:
    """What the distribution requires of quantserve and this one is not, and the fix."""
    distribution, _ = origin(point)
    requires = _headers(point.dist).get("requires-dist", ()) if point.dist else ()
    lines = [line for line in requires if re.match(r"quantserve(?![\w.-])", line, re.I) and not _plainly_met(line)]
    if not lines:
        return None
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import Version

    for line in lines:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if wanted.name.lower() != "quantserve" or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        if not wanted.specifier.contains(__version__, prereleases=True):
            newer = any(
                spec.operator in (">=", ">", "~=", "==") and Version(spec.version.rstrip(".*")) > Version(__version__)
                for spec in wanted.specifier
            )
            reason = f"needs quantserve{wanted.specifier}, this is {__version__}"
            return reason, f"upgrade {'quantserve' if newer else distribution}"
    return None


def _plainly_met(line: str) -> bool:
    """Whether a requirement is met that has only lower and upper bounds, as most have; spares importing packaging."""
    wanted = line[len("quantserve") :].split(",")
    bounds = [re.fullmatch(r"\s*(>=|<)\s*(\d+(?:\.\d+)*)\s*", bound, re.ASCII) for bound in wanted]
    if not all(bounds) or not re.fullmatch(r"\d+(?:\.\d+)*", __version__, re.ASCII):
        return False
    return all((_parts(__version__) >= _parts(b[2])) == (b[1] == ">=") for b in bounds if b)


def _parts(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def named_for(distribution: str, name: str) -> bool:
    """Whether a distribution is called ``quantserve-NAME``."""
    return _normal(distribution) == _normal(f"quantserve-{name}")


def unusable_name(name: str) -> str:
    """Why an entry point cannot have this name; "" when it can."""
    if name in RESERVED:
        return f"the entry-point name {name!r} is reserved for quantserve itself"
    if not _NAME.fullmatch(name):
        return f"the entry-point name {name!r:.80} must be letters, digits and . _ + -, at most 64"
    return ""


def duplicate(name: str, owners: Sequence[tuple[str, str]], distribution: str) -> tuple[str, str] | None:
    """Why a distribution cannot have this entry-point name, and the fix; None when it can.

    Args:
        name: the entry point.
        owners: distribution and version of all that have it.
        distribution: one of them.
    """
    if len(owners) < 2:
        return None
    keepers = [owner for owner, _ in owners if named_for(owner, name)]
    who = " and ".join(f"{owner} {version}" for owner, version in owners)
    if len(keepers) == 1 and sum(owner == keepers[0] for owner, _ in owners) == 1:
        if distribution == keepers[0]:
            return None
        reason = f"entry-point name {name!r} is claimed by {who}; it belongs to {keepers[0]}"
        return reason, f"uninstall {distribution}, or QUANTSERVE_DISABLE={distribution}"
    names = list(dict.fromkeys(owner for owner, _ in owners))
    options = " or ".join(names)
    return (
        f"entry-point name {name!r} is claimed by {who}; neither is used",
        f"uninstall {options}" + (f", or QUANTSERVE_DISABLE={options}" if len(names) > 1 else ""),
    )


def names_in(value: str | None) -> frozenset[str] | None:
    """Names of a comma-separated variable; None when unset, empty set when empty."""
    return None if value is None else frozenset(name.strip() for name in value.split(",") if name.strip())


def left_out(point: EntryPoint, allowed: frozenset[str] | None, denied: frozenset[str]) -> str:
    """Why an entry point is switched off, by its name or its distribution's; "" when it is not."""
    names = {point.name, origin(point)[0]}
    if names & denied:
        return "named in QUANTSERVE_DISABLE"
    if allowed is not None and not names & allowed:
        return "not named in QUANTSERVE_PLUGINS"
    return ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
