"""CORS: which web pages may call the API from a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from quantserve.serve.asgi import Refused

EXPOSED: Final = ("x-request-id", "retry-after")


class Cors(CORSMiddleware):
    """Starlette's CORS layer for an API with keys in a header: no cookies, any request header, errors in the envelope.

    Args:
        app: the wrapped app.
        origins: origins of the allowed pages; ``*`` is every origin.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # OpenAI's client sends a dozen of its own
            expose_headers=EXPOSED,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        origin, method = request_headers["origin"][:200], request_headers["access-control-request-method"][:20]
        message = f"Pages from {origin} may not use {method} here. http.cors_origins lists the allowed origins."
        kept = {key: value for key, value in response.headers.items() if key == "vary"}
        return Refused(403, message, code="cors_refused", headers=kept).response
