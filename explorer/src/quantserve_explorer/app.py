"""The page's ASGI app: its files, its settings and the votes. `page` is the entry point in ``quantserve.pages``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from quantserve.serve.asgi import Refused, header, read_body
from quantserve_explorer import csv_text
from quantserve_explorer.ballot import MOST_BYTES, ballot
from quantserve_explorer.files import File, read_files
from quantserve_explorer.statistics import summary
from quantserve_explorer.votes import Votes

PREFIX: Final = "/explorer"
STATIC: Final = Path(__file__).parent / "static"
SHOWN: Final = ("version", "keys", "votes", "blind", "price_per_hour", "currency", "grafana_url")
"""Settings that the page gets, without an API key."""
SECURITY: Final = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def page(settings: Mapping[str, Any]) -> Explorer:
    """The page of a gateway.

    Args:
        settings: the config's section ``explorer``, ``version``, ``keys`` (whether requests need a key) and ``models``,
            each with ``id`` and ``method``.
    """
    return Explorer(settings)


class Explorer:
    """ASGI app for ``GET /`` and everything below ``/explorer``.

    Args:
        settings: see `page`.
        static: folder of the page's files.
    """

    def __init__(self, settings: Mapping[str, Any], static: Path = STATIC) -> None:
        self._files = read_files(static, PREFIX)
        self._files["/"] = self._files[f"{PREFIX}/index.html"]
        self._shown = {name: settings[name] for name in SHOWN}
        self._methods = {str(model["id"]): str(model.get("method") or "unknown") for model in settings["models"]}
        self._votes = Votes(Path(settings["votes_file"])) if settings["votes"] else None

    def public(self, path: str) -> bool:
        """Whether a GET request for a path needs no API key: files and settings, but no votes."""
        return path in self._files or path in (PREFIX, f"{PREFIX}/settings.json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            Refused: 404, 405, 400 and others; the gateway makes the response.
        """
        response = await self._answer(scope, receive)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *SECURITY]}
            await send(message)

        await response(scope, receive, secured)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        path, method = scope["path"], scope["method"]
        if path == f"{PREFIX}/votes" and method == "POST":
            return await self._vote(scope, receive)
        if not self.public(path) and path not in (f"{PREFIX}/votes", f"{PREFIX}/votes.csv"):
            raise Refused(404, f"Unknown path {path[:200]}.", code="unknown_url")
        if method not in ("GET", "HEAD"):
            allowed = "GET, HEAD, POST" if path == f"{PREFIX}/votes" else "GET, HEAD"
            message = f"Method {method} is not allowed here; use GET."
            raise Refused(405, message, code="method_not_allowed", headers={"allow": allowed})
        if file := self._files.get(path):
            return _file_response(file, scope)
        if path == PREFIX:  # relative to the address in the browser, which may have a prefix and a slash at its end
            return RedirectResponse("../" if scope.get("raw_path", b"").endswith(b"/") else "./", 307)
        if path == f"{PREFIX}/settings.json":
            return JSONResponse(self._shown, headers={"cache-control": "no-store"})
        votes = self._opened()
        if path == f"{PREFIX}/votes":
            return JSONResponse(summary(*await votes.everyone()), headers={"cache-control": "no-store"})
        headers = {"cache-control": "no-store", "content-disposition": 'attachment; filename="explorer-votes.csv"'}
        return StreamingResponse(_csv(votes), headers=headers, media_type="text/csv")

    async def _vote(self, scope: Scope, receive: Receive) -> Response:
        votes = self._opened()
        if header(scope, b"content-type").split(b";")[0].strip().lower() != b"application/json":
            # A page of another origin could send other types without asking first.
            raise Refused(415, "Send the vote as application/json.", code="unsupported_media_type")
        body = await read_body(receive)
        if len(body) > MOST_BYTES:
            message = f"The vote has {len(body)} bytes; at most {MOST_BYTES} are allowed."
            raise Refused(413, message, code="request_too_large")
        return JSONResponse({"votes": await votes.add(ballot(body, self._methods))}, 201)

    def _opened(self) -> Votes:
        if self._votes is None:
            message = "Votes are off on this server; `explorer: {votes: true}` in its config turns them on."
            raise Refused(404, message, code="votes_off")
        return self._votes


def _file_response(file: File, scope: Scope) -> Response:
    """A file, compressed where the client takes that, or 304 when the client has it."""
    headers = {"etag": file.etag, "cache-control": "no-cache", "vary": "accept-encoding"}
    if file.path == f"{PREFIX}/index.html":
        headers["vary"] = "accept, accept-encoding"
    known = header(scope, b"if-none-match").decode("latin-1")
    if known == "*" or file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    content = file.content
    if file.compressed and b"gzip" in header(scope, b"accept-encoding"):
        content = file.compressed
        headers["content-encoding"] = "gzip"
    return Response(content, headers=headers, media_type=file.media_type)


async def _csv(votes: Votes) -> AsyncIterator[bytes]:
    yield csv_text.rows([csv_text.COLUMNS])
    async for some in votes.in_parts():
        yield csv_text.rows([csv_text.cells(vote) for vote in some])
