"""Addresses of servers, as this machine sees them."""

from __future__ import annotations

import ipaddress


def base_url(host: str, port: int) -> str:
    """The address, from this machine, of a server that listens on a host and a port."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
