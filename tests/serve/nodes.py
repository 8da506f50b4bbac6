"""A second node on this machine: a network namespace, joined to this one by a veth pair."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

NOWHERE = "02:00:00:00:00:99"
"""An address of no network card: what is sent there is lost without an error."""


@dataclass
class Network:
    """This node and the second one.

    Attributes:
        here, there: their addresses.
        name: of the namespace.
    """

    here: str
    there: str
    name: str

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process on the second node."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)

    def vanish(self, how: str = "silence") -> None:
        """Cut the nodes off from each other: with ``silence``, packets are lost both ways; with ``there`` or ``here``,
        those to that node; or the link is ``down``; or this node loses its ``address``.
        """
        if how == "address":
            _ip(f"addr del {self.here}/24 dev {self.name}a")
        if how == "down":
            _ip(f"-n {self.name} link set {self.name}b down")
        if how in ("silence", "there"):
            _ip(f"neigh replace {self.there} lladdr {NOWHERE} dev {self.name}a nud permanent")
        if how in ("silence", "here"):
            _ip(f"-n {self.name} neigh replace {self.here} lladdr {NOWHERE} dev {self.name}b nud permanent")

    def come_back(self) -> None:
        """Join them again."""
        _ip(f"-n {self.name} link set {self.name}b up")
        for restore in (
            f"addr add {self.here}/24 dev {self.name}a",
            f"neigh del {self.there} dev {self.name}a",
            f"-n {self.name} neigh del {self.here} dev {self.name}b",
        ):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(restore)


@contextlib.contextmanager
def second_node() -> Iterator[Network]:
    """A second node; the test is skipped where none can be made."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    name = f"qs{os.getpid()}"
    subnet = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 256}"
    network = Network(f"{subnet}.1", f"{subnet}.2", name)
    try:
        try:
            _ip(f"netns add {name}")
            _ip(f"link add {name}a type veth peer name {name}b netns {name}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces do not work here: {error.stderr.strip()}")
        _ip(f"addr add {network.here}/24 dev {name}a")
        _ip(f"link set {name}a up")
        _ip(f"-n {name} addr add {network.there}/24 dev {name}b")
        _ip(f"-n {name} link set {name}b up")
        _ip(f"-n {name} link set lo up")
        yield network
    finally:
        for remove in (f"link del {name}a", f"netns del {name}"):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(remove)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)
