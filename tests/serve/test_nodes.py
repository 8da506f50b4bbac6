"""A node that vanishes under load, comes back, or only is slow: both ends of the connection notice in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantserve.serve.transport.client import ReplicaLost, Timing, Upstream
from quantserve.serve.transport.link import HANGS

from .load import Asked, Clients
from .nodes import Network, second_node
from .replica import TOKEN, run
from .server import BIN, Server, free_port, model, until
from .test_rolling import AT_ONCE, Cluster
from .test_rolling import TOKEN as TOKEN_OF_RAY

pytestmark = pytest.mark.alone

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
            noticed = time.monotonic()
            with pytest.raises(ReplicaLost, match=r"acknowledged nothing|cannot connect"):
                await upstream.request("GET", b"/")
            assert time.monotonic() - noticed < 2.0  # at once, without a connect timeout
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


@pytest.mark.parametrize("how", ["there", "here", "address"])
def test_a_loss_in_one_direction_is_noticed_at_both_ends(network: Network, how: str) -> None:
    """The other direction still works, and each end gets what the other one repeats. Without an address this end cannot
    even send.
    """
    silence_s = 3.0
    with replica(Timing(connect_s=2.0, silence_s=silence_s), network) as (upstream, process):
        assert process.stdout is not None

        async def work() -> None:
            stream = await upstream.request("POST", b"/stream")
            assert await stream.read()
            network.vanish(how)
            began = time.monotonic()
            with contextlib.suppress(ReplicaLost):
                while await stream.read():
                    pass
            assert time.monotonic() - began < HANGS * silence_s  # not only because nothing is heard any more

        run(work)
        lines = [process.stdout.readline().strip() for _ in range(2)]
        assert lines == ["begun /stream", "cancelled /stream"]


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


# --- Ray and engines on two nodes


@dataclass
class Watched:
    """A replica, asked from its own node."""

    lines: list[tuple[float, float, float]]

    def last(self) -> tuple[float, float]:
        """Requests running and served."""
        return self.lines[-1][1:] if self.lines else (-1.0, -1.0)


@pytest.fixture
def two_nodes(network: Network, tmp_path: Path) -> Iterator[Cluster]:
    """A Ray of two nodes with a place for one engine each; the gateway has its place on this one."""
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Ray's sockets need a short path
        shared = ["--block", "--num-cpus=3", "--disable-usage-stats", f"--object-store-memory={200 << 20}"]
        command = [str(BIN / "ray"), "start", *shared]
        first = [
            "--head", f"--node-ip-address={network.here}", f"--port={gcs}", "--include-dashboard=true",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
            '--resources={"engine": 1, "gateway": 1}',
        ]  # fmt: skip
        second = [f"--address={network.here}:{gcs}", f"--node-ip-address={network.there}", '--resources={"engine": 1}']
        # Ray would take the second node for dead after some 25 s, and that node would end its processes.
        patient = {"RAY_health_check_failure_threshold": "60", **AT_ONCE}
        head = Server([*command, *first], RAY_worker_niceness="0", **patient, **TOKEN_OF_RAY)
        try:
            head.wait_for("Ray runtime started")
            inside = ["ip", "netns", "exec", network.name]
            worker = Server([*inside, *command, *second], RAY_worker_niceness="0", **AT_ONCE, **TOKEN_OF_RAY)
            try:
                worker.wait_for("Ray runtime started")
                head.base = f"{network.here}:{gcs}"
                yield Cluster(head, dashboard, free_port(), tmp_path)
            finally:
                network.come_back()
                worker.stop(signal.SIGTERM)
        finally:
            head.stop(signal.SIGTERM)


@contextlib.contextmanager
def watched(network: Network, address: str) -> Iterator[Watched]:
    """Watch the replica of the model ``m`` on the second node from there."""
    probe = [sys.executable, str(PROGRAM.with_name("node_probe.py"))]
    env = {**os.environ, **TOKEN_OF_RAY}
    done = subprocess.run([*probe, "replicas", address, "m"], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["replicas"]) == {network.here, network.there}
    port = str(found["replicas"][network.there])
    process = network.popen([*probe, "watch", network.there, port, found["token"]], stdout=subprocess.PIPE)
    result = Watched([])

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            at, running, served = map(float, line.split())
            result.lines.append((at, running, served))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield result
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_node_of_the_cluster_vanishes_under_load_and_comes_back(
    demo: Path, network: Network, two_nodes: Cluster
) -> None:
    """Two replicas of one model, one on each node. The node of the second one vanishes for 30 s; for that one it is
    the loss of its gateway.
    """
    bound_s, slack_s = 20.0, 10.0
    address = two_nodes.head.base
    one = model("m", demo / "awq")
    one["scaling_config"]["resources_per_worker"] = {"engine": 1}
    one["deployment_config"]["num_replicas"] = 2
    gateway = {"name": "_gateway", "ray_actor_options": {"num_cpus": 0.1, "resources": {"gateway": 1}}}
    two_nodes.deploy(one, deployments=[gateway])
    server = two_nodes.head
    server.base = f"http://127.0.0.1:{two_nodes.port}"
    until(two_nodes.running, 400)
    until(lambda: server.request("GET", "/health").status_code == 200)
    long = {"max_tokens": 400}
    kinds = [Asked("m", True, long), Asked("m", True, long), Asked("m", True, long), Asked("m", False, long),
             Asked("m", False, long), Asked("m", True), Asked("m", False), Asked("m", False)]  # fmt: skip
    with watched(network, address) as second, Clients(server, kinds) as load:
        load.wait(lambda: second.last()[1] >= 6)
        load.wait(lambda: second.last()[0] >= 1)
        vanished = time.monotonic()
        network.vanish()
        load.wait(lambda: time.monotonic() > vanished + 30)
        network.come_back()
        back, served = time.monotonic(), second.last()[1]
        load.wait(lambda: second.last()[1] >= served + 3)  # it serves again
    failed = [outcome for outcome in load.outcomes if outcome.kind != "ok"]
    longest = max(outcome.took for outcome in load.outcomes)
    print(f"{len(load.outcomes)} requests, {len(failed)} failed, the longest took {longest:.1f} s")
    assert all(outcome.asked.stream and outcome.began < vanished + bound_s for outcome in failed), failed[:3]
    assert len(failed) <= len(kinds)  # only streams that had begun on the second node
    during = [outcome for outcome in load.outcomes if vanished < outcome.began < back]
    assert len(during) > len(kinds)
    assert longest < bound_s + slack_s
    assert max(outcome.took for outcome in during if outcome.began > vanished + bound_s) < slack_s
    quiet = [at for at, running, _ in second.lines if vanished < at < back and not running]
    assert quiet
    assert quiet[0] - vanished < bound_s
