"""Which failed connections are the client's own fault, and what the message says to do."""

from __future__ import annotations

import errno
import os
import socket
import ssl

import pytest

from quantserve_bench.causes import FIXES, OWN, connect_failure, with_fix
from quantserve_bench.request import Target

TARGET = Target("https://api.example.org:8443", "m")


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "code", "own", "fix"),
    [
        (of(errno.EMFILE), "open-files", True, "ulimit -Hn"),
        (of(errno.ENFILE), "open-files", True, "ulimit -Hn"),
        (of(errno.EADDRNOTAVAIL), "local-ports", True, "ip_local_port_range"),
        (of(errno.ENOBUFS), "memory", True, "free memory"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "dns", True, "--url"),
        (ssl.SSLCertVerificationError("self-signed"), "certificate", True, "SSL_CERT_FILE"),
        (ssl.SSLError(1, "wrong version number"), "tls", False, "http://"),
        (of(errno.ECONNREFUSED), "refused", False, "start the server"),
        (of(errno.EHOSTUNREACH), "connect", False, ""),
        (of(errno.ECONNRESET), "connect", False, ""),
    ],
)
def test_failed_connections(error: OSError, code: str, own: bool, fix: str) -> None:
    failure = connect_failure(TARGET, error)
    assert failure.code == code
    assert (failure.code in OWN) is own
    assert failure.message
    assert fix in FIXES.get(failure.code, "")
    assert ("\n  fix: " in with_fix(failure.message, failure.code)) is bool(fix)


def test_every_own_failure_has_a_fix() -> None:
    assert set(FIXES) >= OWN
