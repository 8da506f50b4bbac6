"""The page at ``/`` of the gateway, through the entry-point group ``quantserve.pages``.

An entry point ``explorer = "module:page"`` names a callable ``page(settings) -> ASGI app``. The app gets ``GET /`` and
every request below ``/explorer/``. It may have a method ``public(path) -> bool``, which tells whether a GET or HEAD
request for that path needs no API key; without the method every request does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoints
from typing import Any, ClassVar, Final

from quantserve.errors import PluginError, QuantserveError, UsageError
from quantserve.plugins.entry_points import installed, names_in, origin, unique
from quantserve.plugins.extension import Extension, switched_off, without_rivals

GROUP: Final = "quantserve.pages"
NAME: Final = "explorer"


@dataclass(frozen=True)
class Page(Extension):
    """A page of another distribution."""

    kind: ClassVar[str] = "page"

    def load(self, seconds: float | None = None) -> Callable[[Mapping[str, Any]], Any]:
        """Import the callable; raises as `Extension.load`."""
        made: Callable[[Mapping[str, Any]], Any] = super().load(seconds)
        return made

    def problem(self, found: object) -> str:
        """Why it is no page."""
        return "" if callable(found) else f"is a {type(found).__name__}, not a callable page(settings)"


def find(environ: Mapping[str, str] = os.environ, points: EntryPoints | None = None) -> list[Page]:
    """The installed pages, also those that cannot be used; at most one can.

    Args:
        environ: for ``QUANTSERVE_DISABLE``, with names of pages or distributions.
        points: default: what is installed.
    """
    points = installed((GROUP,))[0] if points is None else points
    denied = names_in(environ.get("QUANTSERVE_DISABLE")) or frozenset()
    pages = []
    for point in sorted(unique(points.select(group=GROUP)), key=lambda point: (point.name, origin(point))):
        page = Page.of(point)
        refusal: QuantserveError | None = switched_off(page, denied)
        if not refusal and page.name != NAME:
            refusal = page.defect("names", f"the only page is {NAME!r}", f"name the entry point {NAME}")
        pages.append(replace(page, refusal=refusal))
    return without_rivals(pages)


def examine() -> tuple[str, PluginError | None]:
    """The installed page for `quantserve doctor`: its distribution ("" without one), and why it cannot be used."""
    failed: tuple[str, PluginError] | None = None
    for page in find():
        try:
            page.load()
            return page.origin, None
        except PluginError as error:
            failed = failed or (page.origin, error)
        except UsageError:
            pass
    return failed or ("", None)
