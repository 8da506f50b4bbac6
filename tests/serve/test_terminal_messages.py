"""What `quantserve serve` prints: address errors before the start, and the lines around it."""

from __future__ import annotations

import errno
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from quantserve.errors import EngineError, UsageError
from quantserve.serve.driver.announce import announce
from quantserve.serve.driver.ray_cluster import listen


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied"),
            UsageError,
            "cannot bind port 80: permission denied\n"
            "  fix: use --port 8000 (any port above 1023), or grant CAP_NET_BIND_SERVICE",
        ),
        (
            OSError(errno.EADDRINUSE, "Address already in use"),
            EngineError,
            "port 80 on 127.0.0.1 is already in use\n"
            "  fix: stop the process that listens there, or choose another port with --port (0 picks a free one)",
        ),
        (
            OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"),
            UsageError,
            "cannot listen on --host 127.0.0.1, port 80: Cannot assign requested address\n"
            "  fix: use an address of this machine: 127.0.0.1 for local clients only, 0.0.0.0 for every interface",
        ),
    ],
)
def test_an_unusable_port_names_the_cause_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[Exception], message: str
) -> None:
    class Socket(socket.socket):
        def bind(self, address: Any) -> None:
            raise error

    monkeypatch.setattr(socket, "socket", Socket)
    with pytest.raises(kind) as found:
        listen("127.0.0.1", 80)
    assert str(found.value) == message


def test_an_unknown_host_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on --host no\.such\.host\.invalid, port 0: .*\n  fix: "):
        listen("no.such.host.invalid", 0)


def test_the_ready_lines_have_urls_a_request_and_how_to_stop(capsys: pytest.CaptureFixture[str]) -> None:
    plans: Any = [SimpleNamespace(model_id=name, route_prefix=f"/{name}") for name in ("a", "longer")]
    announce(plans, 2, "0.0.0.0", 9000, keys=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "Ready:",
        "  all models  http://127.0.0.1:9000/v1",
        "  a           http://127.0.0.1:9000/a/v1",
        "  longer      http://127.0.0.1:9000/longer/v1",
    ]
    assert lines[4] == "Try:"
    assert lines[5].startswith('  curl http://127.0.0.1:9000/v1/chat/completions -H "Authorization: Bearer $KEY"')
    assert lines[6] == "Press Ctrl-C to stop."
    announce(plans, 2, "::", 9000, keys=True, page=True)
    assert "Explorer: http://[::1]:9000/" in capsys.readouterr().out.splitlines()
