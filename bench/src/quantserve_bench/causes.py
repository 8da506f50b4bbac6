"""Causes of failed connections: whether the client's own machine is the cause, and what to do about it."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Mapping
from typing import Final

from quantserve.errors import one_line
from quantserve_bench.request import Target
from quantserve_bench.result import Failure

OWN: Final = frozenset({"open-files", "local-ports", "memory", "dns", "certificate"})
"""Codes of failures that the client's own machine or settings cause."""
FIXES: Final[Mapping[int | str, str]] = {
    "open-files": "raise the hard limit of open files (ulimit -Hn, LimitNOFILE in systemd), or reduce --concurrency",
    "local-ports": "reduce --concurrency or --rate, or widen the sysctl net.ipv4.ip_local_port_range",
    "memory": "reduce --concurrency, or free memory on this machine",
    "dns": "correct the host name in --url, or the DNS settings of this machine",
    "certificate": "set SSL_CERT_FILE to a PEM file with the server's certificate or its CA, and use a host name in "
    "--url for which the certificate is valid",
    "tls": "write http:// in --url if the server has no TLS",
    "refused": "start the server, or correct --url",
}
"""Code of a failure -> what to do about it."""
ERRNOS: Final = {
    errno.EMFILE: "open-files",
    errno.ENFILE: "open-files",
    errno.EADDRNOTAVAIL: "local-ports",
    errno.EADDRINUSE: "local-ports",
    errno.ENOBUFS: "memory",
    errno.ENOMEM: "memory",
}


def connect_failure(target: Target, error: OSError) -> Failure:
    """The failure of a connection attempt; its code is in `OWN` if the client's own machine is the cause."""
    place = f"{target.host}:{target.port}"
    if isinstance(error, socket.gaierror):
        return Failure("dns", f"cannot resolve the host name {target.host}: {error.strerror}")
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = getattr(error, "verify_message", "") or one_line(error)
        return Failure("certificate", f"cannot verify the certificate of {place}: {reason}")
    if isinstance(error, ssl.SSLError):
        return Failure("tls", f"no TLS connection to {place}: {getattr(error, 'reason', '') or one_line(error)}")
    if isinstance(error, ConnectionRefusedError):
        return Failure("refused", f"connection refused by {place}: no server listens there")
    return Failure(ERRNOS.get(error.errno or 0, "connect"), one_line(error))


def with_fix(message: str, code: int | str) -> str:
    """A message, with the fix for the code if there is one."""
    return f"{message}\n  fix: {FIXES[code]}" if code in FIXES else message
