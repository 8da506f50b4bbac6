"""The limit on requests of one API key, so that one key cannot fill the queue of a model."""

from __future__ import annotations

from collections import Counter
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import Refused
from quantserve.serve.gateway.middleware.api_keys import KEY_DIGEST

RETRY_S: Final = 1


class KeyLimit:
    """Pure ASGI layer that refuses requests of a key that has too many in progress or queued: 429.

    POST requests count, from their head to the end of the response; the others do no work of an engine. Requests
    without a key are not counted.

    Args:
        app: the protected app.
        limit: most requests of one key; None without a limit.
    """

    def __init__(self, app: ASGIApp, limit: int | None) -> None:
        self.app = app
        self.limit = limit
        self.ongoing: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count an HTTP request while it is in progress."""
        key = scope.get(KEY_DIGEST)
        if self.limit is None or key is None or scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.ongoing[key] >= self.limit:
            message = f"This API key has {self.limit} requests in progress, which is its limit. Retry when one is done."
            raise Refused(429, message, code="key_limit", headers={"retry-after": str(RETRY_S)})
        self.ongoing[key] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.ongoing[key] -= 1
            if not self.ongoing[key]:
                del self.ongoing[key]
