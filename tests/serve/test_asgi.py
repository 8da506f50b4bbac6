"""What an answer must never show."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import HideInternals

from .asgi_client import request


@pytest.mark.parametrize("status", [500, 503, 504])
def test_internals_stay_inside(status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "CUDA error in /opt/secret.py"}}'})

    result = asyncio.run(request(HideInternals(app), "GET", "/"))
    assert result.status == status
    assert "secret" not in result.error["message"]
