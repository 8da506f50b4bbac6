"""The page at ``/``, made by another distribution. The API does not depend on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve import __version__
from quantserve.errors import QuantserveError, UsageError
from quantserve.plugins import foreign, pages
from quantserve.serve.asgi import header
from quantserve.serve.routes import local_path

if TYPE_CHECKING:
    from quantserve.serve.gateway.middleware.limits import Policy

PREFIX: Final = f"/{pages.NAME}"
READ_ONLY: Final = ("GET", "HEAD")

logger = logging.getLogger(__name__)


class Page:
    """ASGI app of a page, and which requests it gets.

    Args:
        app: of another distribution.
        name: the distribution, for messages.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.name = name
        self._app = app
        self._public: Callable[[str], object] | None = getattr(app, "public", None)

    def takes(self, scope: Scope) -> bool:
        """Whether a request is the page's: ``GET /``, unless it asks for JSON, and everything below ``/explorer``."""
        path = local_path(scope)
        if path == "/":
            return scope["method"] in READ_ONLY and not _wants_json(scope)
        return path == PREFIX or path.startswith(f"{PREFIX}/")

    def public(self, scope: Scope) -> bool:
        """Whether a request needs no API key."""
        if scope["type"] != "http" or scope["method"] not in READ_ONLY or not self._public or not self.takes(scope):
            return False
        try:
            return self._public(local_path(scope)) is True
        except Exception:
            logger.exception("%s cannot tell whether a path is public", self.name)
            return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            RuntimeError: the page tried to end the process.
        """
        try:
            await self._app({**scope, "path": local_path(scope), "root_path": ""}, receive, send)
        except SystemExit as error:
            raise RuntimeError(f"{self.name} called sys.exit") from error


def _wants_json(scope: Scope) -> bool:
    accepted = header(scope, b"accept")
    return b"application/json" in accepted and b"text/html" not in accepted


def page_settings(config: Mapping[str, Any], policy: Policy, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a page is made with: the config's section ``explorer``, and what it may know of the server."""
    methods = [
        {"id": name, "method": (model["card"].get("metadata") or {}).get("method")}
        for model in models
        for name in (model["card"]["id"], *model["aliases"])
    ]
    return {**config, "version": __version__, "keys": policy.has_keys, "models": methods}


def make_page(settings: Mapping[str, Any], found: Sequence[pages.Page] | None = None) -> Page | None:
    """The installed page; None without one. One that fails is logged.

    Args:
        settings: from `page_settings`.
        found: default: what is installed.
    """
    for page in pages.find() if found is None else found:
        try:
            return Page(_made(page, settings), page.origin)
        except UsageError:
            logger.info("page %s of %s is switched off", page.name, page.origin)
        except QuantserveError as error:
            logger.warning("no page at /: %s", error)
    return None


def _made(page: pages.Page, settings: Mapping[str, Any]) -> ASGIApp:
    """The page's app, made in a thread: in the main thread a page that never ends would end this process."""

    def make() -> ASGIApp:
        seconds = foreign.hook_seconds()
        factory = page.load(seconds)
        try:
            app: ASGIApp = foreign.run(lambda: factory(dict(settings)), f"page {page.name} ({page.origin})", seconds)
        except foreign.Raised as raised:
            raise page.blame(raised.error, "page") from raised.error
        return app

    with ThreadPoolExecutor(1, "page") as thread:
        app = thread.submit(make).result()
    if not callable(app):
        raise page.defect("page", f"page(settings) returned a {type(app).__name__}, not an ASGI app")
    return app
