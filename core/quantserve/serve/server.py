"""uvicorn as all our processes run it."""

from __future__ import annotations

from typing import Any

import uvicorn
from starlette.types import ASGIApp

from quantserve.serve.upstream import KEEP_ALIVE_S


def http_server(app: ASGIApp, **settings: Any) -> uvicorn.Server:
    """A server for `app`, to be run with sockets that are bound already."""
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        **settings,
    )
    return uvicorn.Server(config)
