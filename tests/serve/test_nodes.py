"""A node that vanishes under load, comes back, or only is slow: both ends of the connection notice in time."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantserve.serve.upstream import ReplicaLost, Timing, Upstream

from .nodes import Network, second_node
from .replica import TOKEN, run

PROGRAM = Path(__file__).with_name("node_replica.py")


@pytest.fixture
def network() -> Iterator[Network]:
    with second_node() as network:
        yield network


@contextlib.contextmanager
def replica(timing: Timing, network: Network | None = None) -> Iterator[tuple[Upstream, subprocess.Popen[str]]]:
    """A replica on the second node, or in another process on this one."""
    host = network.there if network else "127.0.0.1"
    command = [sys.executable, str(PROGRAM), host]
    if network:
        process = network.popen(command, stdout=subprocess.PIPE)
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Upstream(host, int(process.stdout.readline()), TOKEN, timing), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("how", ["silence", "down"])
def test_a_node_that_vanishes_under_load_is_noticed_at_both_ends(network: Network, how: str) -> None:
    with replica(Timing(connect_s=2.0, silence_s=2.0), network) as (upstream, process):
        assert process.stdout is not None

        async def work() -> None:
            stream = await upstream.request("POST", b"/hold")
            assert await stream.read() == b"first"
            network.vanish(how)
            sending = [asyncio.create_task(upstream.request("POST", b"/", (), bytes(size))) for size in (9, 9_000_000)]
            with pytest.raises(ReplicaLost, match="its host acknowledged nothing"):  # not: the process hangs
                await stream.read()
            for lost in await asyncio.gather(*sending, return_exceptions=True):
                assert isinstance(lost, ReplicaLost)
            with pytest.raises(ReplicaLost, match="cannot connect"):
                await upstream.request("GET", b"/")
            network.come_back()
            while True:
                with contextlib.suppress(ReplicaLost):
                    response = await upstream.request("POST", b"/", (), b"12345")
                    assert await response.read() == b"5"
                    break
                await asyncio.sleep(0.05)
            upstream.close()

        run(work)
        lines = [process.stdout.readline().strip() for _ in range(3)]
        assert sorted(lines) == ["begun /", "begun /hold", "cancelled /hold"]


def test_a_process_that_is_stopped_for_a_while_is_slow_and_not_lost() -> None:
    """Also with a body that fills the receive buffer of the stopped process."""
    silence_s = 1.0
    with replica(Timing(silence_s=silence_s)) as (upstream, process):

        async def work() -> None:
            stream = await upstream.request("POST", b"/hold")
            assert await stream.read() == b"first"
            process.send_signal(signal.SIGSTOP)
            sending = [asyncio.create_task(upstream.request("POST", b"/", (), bytes(size))) for size in (9, 32 << 20)]
            await asyncio.sleep(2 * silence_s)
            process.send_signal(signal.SIGCONT)
            answers = [await response.read() for response in await asyncio.gather(*sending)]
            assert answers == [b"9", b"%d" % (32 << 20)]
            process.send_signal(signal.SIGSTOP)  # and now for good
            with pytest.raises(ReplicaLost, match="no sign of life"):
                await stream.read()

        run(work)


def test_default_timeouts_notice_a_vanished_node_within_20_s() -> None:
    assert Timing().silence_s + Timing().connect_s <= 20
